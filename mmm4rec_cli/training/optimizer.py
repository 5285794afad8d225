"""NAdam or Adam over all parameters of a model as one tensor."""

import torch
from torch import Tensor, nn

from mmm4rec_cli.settings.schema import Optimisation

_ALIGNED = 32
"""Elements: every parameter starts on a 128-byte line, as it would on its own."""


class FlatParameters:
    """The trained parameters of a model as views into one tensor, and their gradients as views into another.

    So clearing, adding up over processes and stepping are one operation each, whatever the number of parameters. What
    lies between two parameters is zero and stays zero. Names, values and shapes in the model do not change.

    Args:
        model: on its device; its parameters are of one dtype.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
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

    def clear(self) -> None:
        """Set all gradients to zero."""
        self.gradient.zero_()


def optimizer_of(values: Tensor, optimisation: Optimisation) -> torch.optim.Optimizer:
    """The optimiser that the settings name; weight decay is coupled and acts on everything."""
    if optimisation.optimizer == "nadam":
        return nadam(values, optimisation)
    return torch.optim.Adam(
        [values],
        lr=optimisation.lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=optimisation.weight_decay,
        foreach=True,
        capturable=values.is_cuda,
    )


def nadam(values: Tensor, optimisation: Optimisation) -> torch.optim.NAdam:
    """NAdam with coupled weight decay on everything (spec 5; the published marks against decay are ignored)."""
    return torch.optim.NAdam(
        [values],
        lr=optimisation.lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=optimisation.weight_decay,
        momentum_decay=optimisation.momentum_decay,
        foreach=True,
        # Step count and momentum product stay on the GPU: nothing waits for it.
        capturable=values.is_cuda,
    )
