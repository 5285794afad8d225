"""What every backend of the scan in plain torch shares: step sizes and groups. Letters as in `reference`."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def step_sizes(
    dt_BLH: torch.Tensor, bias_H: torch.Tensor | None, softplus: bool, limit: tuple[float, float] | None
) -> torch.Tensor:
    """Raw step sizes to final ones: + bias, softplus, clamp."""
    if bias_H is not None:
        dt_BLH = dt_BLH + bias_H
    if softplus:
        dt_BLH = F.softplus(dt_BLH)
    if limit is not None:
        dt_BLH = dt_BLH.clamp(limit[0], limit[1])
    return dt_BLH


def spread_groups(t_BLGN: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, L, G, N] to [B, L, H, N]: H/G neighbouring heads share a group."""
    groups = t_BLGN.shape[2]
    return t_BLGN if groups == heads else t_BLGN.repeat_interleave(heads // groups, dim=2)
