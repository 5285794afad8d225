"""Windows before positions in sequences that lie one behind the other, and where their places go without padding.

Integers alone, no gradients. On a GPU one kernel each, elsewhere the plain torch form. Letters: N elements of all
sequences, B windows, T places, S rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from mmm4rec_kernels.backend import by_kernel

__all__ = ["Packing", "packing_of", "windows_before"]

MAX_PLACES = 1024
"""Longest window that the kernels take."""


def windows_before(
    value_N: torch.Tensor,
    time_N: torch.Tensor,
    first_N: torch.Tensor,
    target_B: torch.Tensor,
    length: int,
    *,
    with_next: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The up to `length` elements before each target, left-aligned.

    Args:
        value_N: int32.
        time_N: int64.
        first_N: where the sequence of each element begins, int64.
        target_B: positions, int64, none the first of its sequence.
        length: T.
        with_next: the target's own time stands in the first place behind a window that begins its sequence and has
            fewer than T elements.

    Returns:
        values [B, T], lengths [B], times [B, T], the targets' values [B]; int64, zeros behind each window.
    """
    if length <= MAX_PLACES and by_kernel(target_B):
        from mmm4rec_kernels.windows import fused

        return fused.before(value_N, time_N, first_N, target_B.contiguous(), length, with_next)
    begin_B = first_N[target_B]
    start_B = torch.maximum(begin_B, target_B - length)
    length_B = target_B - start_B
    place_T = torch.arange(length, device=target_B.device)
    flat_BT = start_B[:, None] + place_T
    real_BT = place_T < length_B[:, None]
    stamped_BT = real_BT
    if with_next:
        whole_B = (start_B == begin_B) & (length_B < length)
        stamped_BT = place_T < (length_B + whole_B)[:, None]
    flat_BT = flat_BT.clamp(max=len(value_N) - 1)
    values_BT = torch.where(real_BT, value_N[flat_BT].long(), 0)
    return values_BT, length_B, torch.where(stamped_BT, time_N[flat_BT], 0), value_N[target_B].long()


class Packing(NamedTuple):
    """Where the real places of windows go, one behind the other."""

    last_B: torch.Tensor
    """The row of each window's last place, int64."""
    slot_S: torch.Tensor
    """For each row its place in the flattened grid [B T], int64; 0 behind all windows."""
    offsets: torch.Tensor
    """First row of each window, the first behind all, then every T rows, the last one S; int32."""


def packing_of(length_B: torch.Tensor, length: int, rows: int) -> Packing:
    """Pack windows of `length_B` places, int64, 1 to `length`, into `rows` rows, at least as many as they have."""
    windows = len(length_B)
    if windows and length <= MAX_PLACES and by_kernel(length_B):
        from mmm4rec_kernels.windows import fused

        return Packing(*fused.packed(length_B.contiguous(), length, rows))
    end_B = length_B.cumsum(0)
    row_S = torch.arange(rows, device=length_B.device)
    owner_S = torch.searchsorted(end_B, row_S, right=True)
    start_B = end_B - length_B
    slot_S = owner_S * length + row_S - F.pad(start_B, (0, 1))[owner_S]
    slot_S = torch.where(row_S < end_B[-1], slot_S, 0)
    # The filling is shorter than the whole, which holds at least one row a window.
    fill_Q = torch.arange(1, (rows - windows) // length + 2, device=length_B.device) * length
    offsets = torch.cat([start_B, end_B[-1:], (end_B[-1] + fill_Q).clamp(max=rows)])
    return Packing(end_B - 1, slot_S, offsets.int())
