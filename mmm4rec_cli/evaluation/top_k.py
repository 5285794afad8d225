"""The best K items of each user, without the score matrix of all users and all items.

Letters: B users in the block, V candidate rows, D width, K places, N pairs.
"""

import torch
from torch import Tensor

from mmm4rec_kernels import compare_counts

_BLOCK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
"""Scores of one block: 32 and 256 MiB in float32."""
_GROUP = 32
"""Columns that are first represented by their greatest score."""


def top_k(
    user_BD: Tensor, item_VD: Tensor, item_id_V: Tensor, k: int, *, hidden: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The K highest scores of each user and their item ids, best first; equal scores stand in the order of item ids.

    Scores are computed for a block of items at a time, so that memory does not grow with the catalogue.

    Args:
        user_BD: user vectors, float32.
        item_VD: rows of the candidates, float32.
        item_id_V: their item ids, int64, ascending.
        k: places, at least 1; with fewer candidates there are fewer.
        hidden: pairs to leave out, (row of user_BD [N], item id [N]), both int64; ids that are no candidates are
            ignored.

    Returns:
        Scores [B, K] float32, -inf where a user has no candidate left, and item ids [B, K] int64.

    Raises:
        ValueError: user vectors or scores that are not finite: their order means nothing.
    """
    users, rows = len(user_BD), len(item_VD)
    k = min(k, rows)
    row_N, place_N = _places(hidden, item_id_V) if hidden is not None and rows else (None, None)
    best_BK = user_BD.new_empty(users, 0)
    id_BK = item_id_V.new_empty(users, 0)
    step = max(1, _BLOCK_ELEMENTS.get(user_BD.device.type, _BLOCK_ELEMENTS["cpu"]) // max(users, 1))
    finite = torch.isfinite(user_BD).all()
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        score_BV = user_BD @ item_VD[begin:end].T
        if row_N is not None and place_N is not None:
            here_N = (place_N >= begin) & (place_N < end)
            score_BV[row_N[here_N], place_N[here_N] - begin] = float("-inf")
        block_BK, block_id_BK = _block_top(score_BV, item_id_V[begin:end], k)
        finite = finite & (block_BK < float("inf")).all()
        best_BK, id_BK = torch.cat([best_BK, block_BK], 1), torch.cat([id_BK, block_id_BK], 1)
        kept_BK = _keys(best_BK, id_BK).topk(min(k, best_BK.shape[1])).indices
        best_BK, id_BK = best_BK.gather(1, kept_BK), id_BK.gather(1, kept_BK)
    if not finite:  # one wait; what is not a number counts as the greatest, so it is always among the best
        raise ValueError("user_BD and item_VD must be finite")
    return best_BK, id_BK


def _places(hidden: tuple[Tensor, Tensor], item_id_V: Tensor) -> tuple[Tensor, Tensor]:
    row_N, item_N = hidden
    place_N = torch.searchsorted(item_id_V, item_N).clamp(max=len(item_id_V) - 1)
    candidate_N = item_id_V[place_N] == item_N
    return row_N[candidate_N], place_N[candidate_N]


def _block_top(score_BV: Tensor, item_id_V: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best of one block, in any order; where equal scores lie across the border, the lowest ids are in."""
    k = min(k, score_BV.shape[1])
    index_BK = _highest(score_BV, k)
    top_BK = score_BV.gather(1, index_BK)
    last_B = top_BK.amin(1)
    _, equal_B = compare_counts(score_BV, last_B)
    torn_B = equal_B > (top_BK == last_B[:, None]).sum(1)
    if torn_B.any():
        torn_BV = score_BV[torn_B]
        index_BK[torn_B] = _keys(torn_BV, item_id_V.expand_as(torn_BV)).topk(k, sorted=False).indices
        top_BK = score_BV.gather(1, index_BK)
    return top_BK, item_id_V[index_BK]


def _highest(score_BV: Tensor, k: int) -> Tensor:
    """Columns of the K highest scores in any order: they lie in the K groups of columns with the highest peaks."""
    groups = score_BV.shape[1] // _GROUP
    if groups < 4 * k:
        return score_BV.topk(k, sorted=False).indices
    whole = groups * _GROUP
    peak_BG = score_BV[:, :whole].reshape(len(score_BV), _GROUP, groups).amax(1)
    group_BK = peak_BG.topk(k, sorted=False).indices
    member_1M1 = torch.arange(0, whole, groups, device=score_BV.device)[None, :, None]
    rest_BR = torch.arange(whole, score_BV.shape[1], device=score_BV.device).expand(len(score_BV), -1)
    index_BC = torch.cat([(group_BK[:, None] + member_1M1).flatten(1), rest_BR], 1)
    return index_BC.gather(1, score_BV.gather(1, index_BC).topk(k, sorted=False).indices)


def _keys(score: Tensor, item_id: Tensor) -> Tensor:
    """One int64 a candidate, greater for a higher score and, among equal scores, for a lower item id."""
    # The bits of a float32 order like an integer once those of negative numbers are turned round; + 0.0 mends -0.0.
    bits = (score.float() + 0.0).view(torch.int32)
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return (ordered.long() << 32) + (0xFFFFFFFF - item_id)
