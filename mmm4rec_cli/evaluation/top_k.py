"""The best K items of each user, without the score matrix of all users and all items.

Letters: B users in the block, V candidate rows, D width, K places, N pairs.
"""

import torch
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 23


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
        ValueError: scores that are not finite: their order means nothing.
    """
    if not (torch.isfinite(user_BD).all() and torch.isfinite(item_VD).all()):
        raise ValueError("user_BD and item_VD must be finite")
    users, rows = len(user_BD), len(item_VD)
    k = min(k, rows)
    row_N, place_N = _places(hidden, item_id_V) if hidden is not None and rows else (None, None)
    best_BK = user_BD.new_empty(users, 0)
    id_BK = item_id_V.new_empty(users, 0)
    step = max(1, _BLOCK_ELEMENTS // max(users, 1))
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        score_BV = user_BD @ item_VD[begin:end].T
        if row_N is not None and place_N is not None:
            here_N = (place_N >= begin) & (place_N < end)
            score_BV[row_N[here_N], place_N[here_N] - begin] = float("-inf")
        block_BK, block_id_BK = _block_top(score_BV, item_id_V[begin:end], k)
        best_BK, id_BK = torch.cat([best_BK, block_BK], 1), torch.cat([id_BK, block_id_BK], 1)
        kept_BK = _keys(best_BK, id_BK).topk(min(k, best_BK.shape[1])).indices
        best_BK, id_BK = best_BK.gather(1, kept_BK), id_BK.gather(1, kept_BK)
    return best_BK, id_BK


def _places(hidden: tuple[Tensor, Tensor], item_id_V: Tensor) -> tuple[Tensor, Tensor]:
    row_N, item_N = hidden
    place_N = torch.searchsorted(item_id_V, item_N).clamp(max=len(item_id_V) - 1)
    candidate_N = item_id_V[place_N] == item_N
    return row_N[candidate_N], place_N[candidate_N]


def _block_top(score_BV: Tensor, item_id_V: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best of one block, in any order; where equal scores lie across the border, the lowest ids are in."""
    k = min(k, score_BV.shape[1])
    index_BK = score_BV.topk(k, sorted=False).indices
    top_BK = score_BV.gather(1, index_BK)
    last_B1 = top_BK.min(1, keepdim=True).values
    torn_B = (score_BV == last_B1).sum(1) > (top_BK == last_B1).sum(1)
    if torn_B.any():
        torn_BV = score_BV[torn_B]
        index_BK[torn_B] = _keys(torn_BV, item_id_V.expand_as(torn_BV)).topk(k, sorted=False).indices
        top_BK = score_BV.gather(1, index_BK)
    return top_BK, item_id_V[index_BK]


def _keys(score: Tensor, item_id: Tensor) -> Tensor:
    """One int64 a candidate, greater for a higher score and, among equal scores, for a lower item id."""
    # The bits of a float32 order like an integer once those of negative numbers are turned round; + 0.0 mends -0.0.
    bits = (score.float() + 0.0).view(torch.int32)
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    return (ordered.long() << 32) + (0xFFFFFFFF - item_id)
