"""How the in-projections' outputs are cut into the parts of the block. Letters as in `composed`; Q = GN."""

from __future__ import annotations

from typing import NamedTuple

import torch


class CrossProjections(NamedTuple):
    """Outputs of the three in-projections of a block that is written from one stream and read from another."""

    xBdt: torch.Tensor
    """[B, L, E + GN + H]: x, B and dt of the stream that writes the state."""
    z: torch.Tensor
    """[B, L, E]: the gate."""
    C: torch.Tensor
    """[B, L, GN]: what the other stream reads from the state."""


class Parts(NamedTuple):
    """Views into the projections."""

    z: torch.Tensor
    convolved: tuple[torch.Tensor, ...]
    """Neighbouring columns that are convolved together: (xBC,) or (xB, C)."""
    dt: torch.Tensor


def cut(projected: torch.Tensor | CrossProjections, width: int, states: int, heads: int) -> Parts:
    """Views of z [B, L, E], the convolved columns and dt [B, L, H]; `states` is GN."""
    if isinstance(projected, CrossProjections):
        xB, dt = torch.split(projected.xBdt, [width + states, heads], -1)
        return Parts(projected.z, (xB, projected.C), dt)
    z, xBC, dt = torch.split(projected, [width, width + 2 * states, heads], -1)
    return Parts(z, (xBC,), dt)
