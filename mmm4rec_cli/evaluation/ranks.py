"""The rank of a target among the whole catalogue, without sorting.

Letters: B users, D width, V catalogue rows with padding row 0, N pairs, C items of a block.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from mmm4rec_kernels import compare_counts

Ties = Literal["half", "optimistic", "pessimistic"]
_USERS = {"cpu": 256, "cuda": 1024}
_BLOCK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 25}
"""Scores of one block: 32 and 128 MiB in float32."""
_SHARE = {"half": 0.5, "optimistic": 0.0, "pessimistic": 1.0}


def target_ranks(
    user_BD: Tensor,
    item_VD: Tensor,
    target_B: Tensor,
    *,
    ties: Ties = "half",
    mask: Tensor | None = None,
    hidden: tuple[Tensor, Tensor] | None = None,
    padding_candidate: bool = False,
) -> Tensor:
    """rank0 of each target, [B] float64, 0 is best.

    rank0 = number of other candidates with a higher score + a share of those with an equal one: half of them, none
    (`optimistic`) or all (`pessimistic`). The target is left out by its index; its score comes from the same product
    as all others. Scores are computed in blocks of users and items, so memory does not grow with either; every block
    of a call has one shape whatever the number of users, so that a user's scores do not hang on who else is ranked.

    Args:
        user_BD: user vectors, float.
        item_VD: item table, float; row 0 is padding and no candidate.
        target_B: item ids, int64, 1 to V - 1.
        ties: what a candidate with the target's score counts.
        mask: bool [B, V], candidates to leave out, or None; the target is never left out.
        hidden: the same as pairs (row of user_BD [N], item id [N]), both int64, repeats allowed.
        padding_candidate: published behaviour Q11: row 0 competes too.

    Raises:
        ValueError: shapes that do not fit, or vectors that are not finite (a rank among NaN means nothing).
    """
    _check(user_BD, item_VD, target_B, mask)
    rows = len(item_VD)
    users = _USERS.get(user_BD.device.type, _USERS["cpu"])
    most = max(1, _BLOCK_ELEMENTS.get(user_BD.device.type, _BLOCK_ELEMENTS["cpu"]) // users)
    columns = -(-rows // -(-rows // most))  # as even as can be
    parts = None if hidden is None else _parted(*hidden, users, len(user_BD))
    ranks = [torch.zeros(0, dtype=torch.float64, device=user_BD.device)]
    for begin in range(0, len(user_BD), users):
        end = min(begin + users, len(user_BD))
        block_UD = torch.cat([user_BD[begin:end], user_BD.new_zeros(users - (end - begin), user_BD.shape[1])])
        here = None
        if parts is not None:
            row_N, item_N = parts[begin // users]
            here = row_N - begin, item_N
        mask_UV = None if mask is None else mask[begin:end]
        above, equal = _counts(block_UD, item_VD, target_B[begin:end], columns, mask_UV, here, padding_candidate)
        ranks.append(above.double() + _SHARE[ties] * equal.double())
    return torch.cat(ranks)


def _parted(key_N: Tensor, other_N: Tensor, step: int, end: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs in the order of their key, cut where it passes a multiple of `step`; one wait for the device."""
    key_N, order_N = key_N.sort()
    edges = torch.arange(0, end + step, step, device=key_N.device)
    sizes = torch.searchsorted(key_N, edges).diff().tolist()
    return list(zip(torch.split(key_N, sizes), torch.split(other_N[order_N], sizes), strict=True))


def _counts(
    user_UD: Tensor,
    item_VD: Tensor,
    target_B: Tensor,
    columns: int,
    mask_BV: Tensor | None,
    hidden: tuple[Tensor, Tensor] | None,
    padding_candidate: bool,
) -> tuple[Tensor, Tensor]:
    """Candidates above and equal to each of the first B users' targets; the other users fill the block."""
    size, rows = len(target_B), len(item_VD)
    user_B = torch.arange(size, device=target_B.device)
    if columns < rows:
        # One block more, of the targets' own rows: the same product, so equal rows get equal scores.
        picked_C = torch.zeros(max(columns, size), dtype=torch.int64, device=target_B.device)
        picked_C[:size] = target_B
        own_B = torch.cat(
            [
                (user_UD @ item_VD[picked_C[i : i + columns]].T)[
                    user_B[i : i + columns], user_B[: min(columns, size - i)]
                ]
                for i in range(0, size, columns)
            ]
        )
    parts = None if hidden is None else _parted(hidden[1], hidden[0], columns, rows)
    above_B, equal_B = (torch.zeros(size, dtype=torch.int64, device=target_B.device) for _ in range(2))
    for begin in range(0, rows, columns):
        first = max(0, min(begin, rows - columns))
        score_BC = (user_UD @ item_VD[first : first + columns].T)[:size]
        if columns == rows:
            own_B = score_BC.gather(1, target_B[:, None]).squeeze(1)
        if mask_BV is not None:
            score_BC.masked_fill_(mask_BV[:, first : first + columns], float("-inf"))
        if parts is not None:
            item_N, row_N = parts[begin // columns]
            score_BC[row_N, item_N - first] = float("-inf")
        # Written for every target, also for those of other blocks: choosing them would wait for the device.
        place_B1 = (target_B - first)[:, None]
        inside_B1 = (place_B1 >= 0) & (place_B1 < columns)
        place_B1 = place_B1.clamp(0, columns - 1)
        left_out_B1 = score_BC.gather(1, place_B1).masked_fill(inside_B1, float("-inf"))
        score_BC.scatter_(1, place_B1, left_out_B1)
        if first == 0 and not padding_candidate:
            score_BC[:, 0] = float("-inf")
        above, equal = compare_counts(score_BC[:, begin - first :], own_B)
        above_B += above
        equal_B += equal
    return above_B, equal_B


def _check(user_BD: Tensor, item_VD: Tensor, target_B: Tensor, mask: Tensor | None) -> None:
    if user_BD.dim() != 2 or item_VD.dim() != 2 or user_BD.shape[1] != item_VD.shape[1]:
        raise ValueError(f"user_BD [B, D] and item_VD [V, D] expected, got {[*user_BD.shape]} and {[*item_VD.shape]}")
    if target_B.shape != user_BD.shape[:1]:
        raise ValueError(f"target_B must be [{len(user_BD)}], got {[*target_B.shape]}")
    if mask is not None and mask.shape != (len(user_BD), len(item_VD)):
        raise ValueError(f"mask must be [{len(user_BD)}, {len(item_VD)}], got {[*mask.shape]}")
    if not len(target_B):
        return
    # Least and greatest are NaN where one element is; one transfer for all four and the targets.
    extremes = [bound.double() for vectors in (user_BD, item_VD) for bound in vectors.aminmax()]
    *bounds, low, high = torch.stack([*extremes, *(t.double() for t in target_B.aminmax())]).tolist()
    if not (low >= 1 and high < len(item_VD)):
        raise ValueError(f"target_B must hold item ids from 1 to {len(item_VD) - 1}")
    if not all(map(math.isfinite, bounds)):
        raise ValueError("user_BD and item_VD must be finite")
