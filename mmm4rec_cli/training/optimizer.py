"""NAdam or Adam over all parameters of a model as one tensor."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.optim.adam import adam
from torch.optim.nadam import nadam

from mmm4rec_cli.settings.schema import Optimisation

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
_ALIGNED = 32
"""Elements: every parameter starts on a 128-byte line, as it would on its own."""


class FlatParameters:
    """The trained parameters of a model as views into one tensor, and their gradients as views into another.

    So clearing, adding up over processes and stepping are one operation each, whatever the number of parameters. What
    lies between two parameters is zero and stays zero. Names, values and shapes in the model do not change.

    Args:
        model: on its device; its parameters are of one dtype.
        apart: names of parameters that are trained by other means.
    """

    def __init__(self, model: nn.Module, apart: Collection[str] = ()) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name not in apart]
        self.model, self.apart = model, frozenset(apart)
        sizes = [-(-p.numel() // _ALIGNED) * _ALIGNED for _, p in named]
        first = named[0][1]
        self.layout = [(name, p.numel()) for name, p in named]
        self.values = nn.Parameter(first.new_zeros(sum(sizes)))
        self.gradient = torch.zeros_like(self.values)
        self.values.grad = self.gradient
        parts = zip(named, torch.split(self.values.detach(), sizes), torch.split(self.gradient, sizes), strict=True)
        for (_, parameter), value, gradient in parts:
            view = value[: parameter.numel()].view_as(parameter)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = gradient[: parameter.numel()].view_as(parameter)

    def marked(self, of: Callable[[str, nn.Parameter], bool]) -> Tensor:
        """A tensor as the values, 1 where `of` says yes to the parameter's name and itself, else 0."""
        mark = torch.zeros_like(self.gradient)
        start = self.values.data_ptr()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and name not in self.apart and of(name, parameter):
                begin = (parameter.data_ptr() - start) // mark.element_size()
                mark[begin : begin + parameter.numel()] = 1
        return mark

    def clear(self) -> None:
        """Set all gradients to zero."""
        self.gradient.zero_()


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether `decayed = matrices` decays it: matrices and taps, not vectors and nothing bound to single items."""
    return parameter.dim() > 1 and name.rsplit(".", 1)[-1] not in ("item_bias", "fusion_weight")


class FlatOptimizer(ABC):
    """Moves flat parameters in place, by torch's functions.

    Not one of torch's optimisers: making one of those imports torch's compiler, which takes a second or more.

    Args:
        values: the parameters, their gradient in place.
        optimisation: learning rate, weight decay (coupled, on everything), momentum decay.
    """

    def __init__(self, values: nn.Parameter, optimisation: Optimisation) -> None:
        self.values, self.lr = values, optimisation.lr
        """The learning rate may be set before each step."""
        self.weight_decay, self.momentum_decay = optimisation.weight_decay, optimisation.momentum_decay
        self.state = {"exp_avg": torch.zeros_like(values.detach()), "exp_avg_sq": torch.zeros_like(values.detach())}
        """All that is saved, by torch's names."""

    @abstractmethod
    def step(self) -> None:
        """Move the parameters; nothing waits for the GPU."""

    @property
    def gradient(self) -> Tensor:
        """Of the parameters."""
        assert self.values.grad is not None
        return self.values.grad


class Adam(FlatOptimizer):
    """Adam; the step count lies where the parameters do."""

    def __init__(self, values: nn.Parameter, optimisation: Optimisation) -> None:
        super().__init__(values, optimisation)
        self.state["step"] = torch.zeros((), dtype=torch.float32, device=values.device)

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters, on a GPU with one kernel."""
        adam(
            [self.values],
            [self.gradient],
            [self.state["exp_avg"]],
            [self.state["exp_avg_sq"]],
            [],
            [self.state["step"]],
            fused=self.values.is_cuda,
            amsgrad=False,
            beta1=BETA1,
            beta2=BETA2,
            lr=self.lr,
            weight_decay=self.weight_decay,
            eps=EPS,
            maximize=False,
        )


class NAdam(FlatOptimizer):
    """NAdam (spec 5; the published marks against decay are ignored); float32 on a GPU as one kernel, which torch lacks.

    Step count and momentum product live on the CPU.
    """

    def __init__(self, values: nn.Parameter, optimisation: Optimisation) -> None:
        super().__init__(values, optimisation)
        self.by_kernel = values.is_cuda and values.dtype == torch.float32
        numbers = torch.float64 if self.by_kernel else torch.float32  # as torch's own
        self.state |= {"step": torch.zeros((), dtype=numbers), "mu_product": torch.ones((), dtype=numbers)}

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters."""
        if self.by_kernel:
            self._step_by_kernel()
            return
        nadam(
            [self.values],
            [self.gradient],
            [self.state["exp_avg"]],
            [self.state["exp_avg_sq"]],
            [self.state["mu_product"]],
            [self.state["step"]],
            foreach=True,
            beta1=BETA1,
            beta2=BETA2,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum_decay=self.momentum_decay,
            eps=EPS,
        )

    def _step_by_kernel(self) -> None:
        from mmm4rec_kernels.rows import fused

        state = self.state
        state["step"] += 1
        step = float(state["step"])
        now, following = (BETA1 * (1 - 0.5 * 0.96 ** (k * self.momentum_decay)) for k in (step, step + 1))
        state["mu_product"] *= now
        product = float(state["mu_product"])
        fused.nadam(
            self.values.detach(),
            self.gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            self.lr * (1 - now) / (1 - product),
            self.lr * following / (1 - product * following),
            BETA1,
            BETA2,
            1 - BETA2**step,
            EPS,
            self.weight_decay,
        )


def optimizer_of(values: nn.Parameter, optimisation: Optimisation, *, decays: bool = True) -> FlatOptimizer:
    """The optimiser that the settings name; weight decay is coupled and acts on everything, or is left to others."""
    if not decays:
        optimisation = optimisation.model_copy(update={"weight_decay": 0.0})
    return (NAdam if optimisation.optimizer == "nadam" else Adam)(values, optimisation)
