"""The blocked top-k against a full sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmm4rec_cli.evaluation import top_k as module
from mmm4rec_cli.evaluation.top_k import top_k


def brute(user, table, ids, k, hidden):
    pairs = set(zip(*(x.tolist() for x in hidden), strict=True))
    rows = []
    for b, scores in enumerate((user @ table.T).tolist()):
        found = [(-s, i) for s, i in zip(scores, ids.tolist(), strict=True) if (b, i) not in pairs]
        rows.append([(-s, i) for s, i in sorted(found)[:k]])
    return rows


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 200))
def test_blocks_of_any_size_equal_a_full_sort_with_ties_by_item_id(seed, k, elements):
    generator = torch.Generator().manual_seed(seed)
    user = torch.randint(-2, 3, (7, 3), generator=generator).float()
    table = torch.randint(-9, 10, (29, 3), generator=generator).float()
    ids = torch.randperm(60, generator=generator)[:29].sort().values + 1
    hidden = torch.randint(0, 7, (20,), generator=generator), torch.randint(1, 62, (20,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_ELEMENTS", {"cpu": elements})
        patch.setattr(module, "_GROUP", 1 + seed % 4)
        scores, items = top_k(user, table, ids, k, hidden=hidden)
    got = [
        [(s, i) for s, i in zip(*row, strict=True) if s > float("-inf")]
        for row in zip(scores.tolist(), items.tolist(), strict=True)
    ]
    assert got == brute(user, table, ids, k, hidden)


def test_no_users_no_candidates_and_numbers_that_are_none():
    table, ids = torch.ones(4, 2), torch.arange(1, 5)
    assert top_k(torch.ones(0, 2), table, ids, 3)[1].shape == (0, 3)
    assert top_k(torch.ones(2, 2), table[:0], ids[:0], 3)[1].shape == (2, 0)
    with pytest.raises(ValueError, match="finite"):
        top_k(torch.full((1, 2), torch.nan), table, ids, 3)
    table[2, 1] = -torch.nan
    with pytest.raises(ValueError, match="finite"):
        top_k(torch.ones(1, 2), table, ids, 1)


def test_minus_zero_equals_zero():
    scores, items = top_k(torch.ones(1, 1), torch.tensor([[-0.0], [0.0]]), torch.tensor([1, 2]), 2)
    assert items.tolist() == [[1, 2]]
    assert scores.tolist() == [[0, 0]]
