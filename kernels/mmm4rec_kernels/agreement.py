"""How far a result is from the truth, and how far it may be.

The truth is the sequential definition in float64. The yardstick is the same definition in the dtype under test:
whatever that loses, a fast form may lose four times over, and one part in a million more. Two distances count: root
mean square of the difference over that of the truth, and the worst element over the largest of the truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FACTOR = 4.0
FLOOR = 1e-6


@dataclass(frozen=True)
class Distance:
    """Distance of a tensor from the truth; NaN anywhere makes both infinite."""

    rms: float
    worst: float


def distance(candidate: torch.Tensor, truth: torch.Tensor) -> Distance:
    """Distance of `candidate` from `truth`, any shapes that are equal, any float dtypes.

    Raises:
        ValueError: if the shapes differ.
    """
    if candidate.shape != truth.shape:
        raise ValueError(f"candidate: expected shape {list(truth.shape)}, got {list(candidate.shape)}")
    if truth.numel() == 0:
        return Distance(0.0, 0.0)
    truth = truth.detach().double()
    difference = candidate.detach().to(truth) - truth
    if not bool(difference.isfinite().all()):
        return Distance(float("inf"), float("inf"))
    rms = float(truth.square().mean().sqrt())
    largest = float(truth.abs().max())
    return Distance(
        float(difference.square().mean().sqrt()) / (rms or 1.0), float(difference.abs().max()) / (largest or 1.0)
    )


def allowed(yardstick: Distance, floor: float = FLOOR) -> Distance:
    """The largest distance that passes, given the yardstick's own."""
    return Distance(FACTOR * yardstick.rms + floor, FACTOR * yardstick.worst + floor)


def disagreement(
    candidate: dict[str, torch.Tensor],
    truth: dict[str, torch.Tensor],
    yardstick: dict[str, torch.Tensor],
    floor: float = FLOOR,
) -> list[str]:
    """One line for each named tensor of `candidate` that is further from the truth than allowed; empty if all agree."""
    lines = []
    for name, true in truth.items():
        got, limit = distance(candidate[name], true), allowed(distance(yardstick[name], true), floor)
        if not (got.rms <= limit.rms and got.worst <= limit.worst):
            lines.append(
                f"{name}: rms {got.rms:.2e} (allowed {limit.rms:.2e}), "
                f"worst {got.worst:.2e} (allowed {limit.worst:.2e})"
            )
    return lines
