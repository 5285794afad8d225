"""The rank of a target among the whole catalogue, without sorting.

Letters: B users, D width, V catalogue rows with padding row 0.
"""

from typing import Literal

import torch
from torch import Tensor

Ties = Literal["half", "optimistic", "pessimistic"]
_BLOCK_ELEMENTS = 1 << 26
_SHARE = {"half": 0.5, "optimistic": 0.0, "pessimistic": 1.0}


def target_ranks(
    user_BD: Tensor,
    item_VD: Tensor,
    target_B: Tensor,
    *,
    ties: Ties = "half",
    mask: Tensor | None = None,
    padding_candidate: bool = False,
) -> Tensor:
    """rank0 of each target, [B] float64, 0 is best.

    rank0 = number of other candidates with a higher score + a share of those with an equal one: half of them, none
    (`optimistic`) or all (`pessimistic`). The target is left out by its index; its score comes from the same product
    as all others. Scores are computed in blocks of users; no [users, items] matrix of the whole input exists.

    Args:
        user_BD: user vectors, float.
        item_VD: item table, float; row 0 is padding and no candidate.
        target_B: item ids, int64, 1 to V - 1.
        ties: what a candidate with the target's score counts.
        mask: bool [B, V], candidates to leave out, or None; the target is never left out.
        padding_candidate: published behaviour Q11: row 0 competes too.

    Raises:
        ValueError: shapes that do not fit, or vectors that are not finite (a rank among NaN means nothing).
    """
    if user_BD.dim() != 2 or item_VD.dim() != 2 or user_BD.shape[1] != item_VD.shape[1]:
        raise ValueError(f"user_BD [B, D] and item_VD [V, D] expected, got {[*user_BD.shape]} and {[*item_VD.shape]}")
    if target_B.shape != user_BD.shape[:1]:
        raise ValueError(f"target_B must be [{len(user_BD)}], got {[*target_B.shape]}")
    if mask is not None and mask.shape != (len(user_BD), len(item_VD)):
        raise ValueError(f"mask must be [{len(user_BD)}, {len(item_VD)}], got {[*mask.shape]}")
    if len(target_B) and not (int(target_B.min()) >= 1 and int(target_B.max()) < len(item_VD)):
        raise ValueError(f"target_B must hold item ids from 1 to {len(item_VD) - 1}")
    if not (torch.isfinite(user_BD).all() and torch.isfinite(item_VD).all()):
        raise ValueError("user_BD and item_VD must be finite")
    block = max(1, _BLOCK_ELEMENTS // len(item_VD))
    ranks = [
        _block_ranks(user_BD[i : i + block], item_VD, target_B[i : i + block], ties, mask_block, padding_candidate)
        for i in range(0, len(user_BD), block)
        for mask_block in [None if mask is None else mask[i : i + block]]
    ]
    return torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.float64, device=user_BD.device)


def _block_ranks(
    user_BD: Tensor, item_VD: Tensor, target_B: Tensor, ties: Ties, mask_BV: Tensor | None, padding_candidate: bool
) -> Tensor:
    scores_BV = user_BD @ item_VD.T
    target_B1 = target_B[:, None]
    own_B1 = scores_BV.gather(1, target_B1)
    above_BV, equal_BV = scores_BV > own_B1, scores_BV == own_B1
    for counted_BV in (above_BV, equal_BV):
        if mask_BV is not None:
            counted_BV &= ~mask_BV
        counted_BV.scatter_(1, target_B1, False)
        if not padding_candidate:
            counted_BV[:, 0] = False
    return above_BV.sum(1).double() + _SHARE[ties] * equal_BV.sum(1).double()
