"""NAdam or Adam over all parameters of a model as one tensor."""

from collections.abc import Callable, Collection

import torch
from torch import nn

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

    def marked(self, of: Callable[[str, nn.Parameter], bool]) -> torch.Tensor:
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


def optimizer_of(values: nn.Parameter, optimisation: Optimisation, *, decays: bool = True) -> torch.optim.Optimizer:
    """The optimiser that the settings name; weight decay is coupled and acts on everything, or is left to others."""
    if not decays:
        optimisation = optimisation.model_copy(update={"weight_decay": 0.0})
    if optimisation.optimizer == "nadam":
        return nadam(values, optimisation)
    return torch.optim.Adam(
        [values],
        lr=optimisation.lr,
        betas=(BETA1, BETA2),
        eps=EPS,
        weight_decay=optimisation.weight_decay,
        fused=values.is_cuda,
    )


def nadam(values: nn.Parameter, optimisation: Optimisation) -> torch.optim.Optimizer:
    """NAdam with coupled weight decay on everything (spec 5; the published marks against decay are ignored)."""
    if values.is_cuda and values.dtype == torch.float32:
        return FusedNAdam(values, optimisation)
    return torch.optim.NAdam(
        [values],
        lr=optimisation.lr,
        betas=(BETA1, BETA2),
        eps=EPS,
        weight_decay=optimisation.weight_decay,
        momentum_decay=optimisation.momentum_decay,
        foreach=True,
    )


class FusedNAdam(torch.optim.Optimizer):
    """The same step as one kernel over the flat parameters; torch has no fused NAdam.

    Args:
        values: flat float32 parameters on a GPU, their gradient in place.
        optimisation: learning rate, weight decay, momentum decay.
    """

    def __init__(self, values: nn.Parameter, optimisation: Optimisation) -> None:
        decays = {"weight_decay": optimisation.weight_decay, "momentum_decay": optimisation.momentum_decay}
        super().__init__([values], {"lr": optimisation.lr, **decays})
        self.state[values] = {
            "step": torch.zeros((), dtype=torch.float64),
            "mu_product": torch.ones((), dtype=torch.float64),
            "exp_avg": torch.zeros_like(values.detach()),
            "exp_avg_sq": torch.zeros_like(values.detach()),
        }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the parameters; step count and momentum product live on the CPU, so that nothing waits for the GPU."""
        from mmm4rec_kernels.rows import fused

        (group,) = self.param_groups
        (values,) = group["params"]
        state = self.state[values]
        state["step"] += 1
        step = float(state["step"])
        now, following = (BETA1 * (1 - 0.5 * 0.96 ** (k * group["momentum_decay"])) for k in (step, step + 1))
        state["mu_product"] *= now
        product = float(state["mu_product"])
        fused.nadam(
            values.detach(),
            values.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            group["lr"] * (1 - now) / (1 - product),
            group["lr"] * following / (1 - product * following),
            BETA1,
            BETA2,
            1 - BETA2**step,
            EPS,
            group["weight_decay"],
        )
