"""Ranks without sorting, against a brute force that compares every candidate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmm4rec_cli.evaluation import ranks
from mmm4rec_cli.evaluation.ranks import target_ranks

SHARE = {"half": 0.5, "optimistic": 0.0, "pessimistic": 1.0}


def brute(user, table, target, ties, mask=None, padding=False):
    out = []
    for b in range(len(user)):
        scores = [float(user[b].double() @ row.double()) for row in table]
        own = scores[target[b]]
        rivals = [v for v in range(0 if padding else 1, len(table)) if v != target[b]]
        if mask is not None:
            rivals = [v for v in rivals if not mask[b, v]]
        above = sum(scores[v] > own for v in rivals)
        out.append(above + SHARE[ties] * sum(scores[v] == own for v in rivals))
    return out


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(list(SHARE)), st.booleans(), st.booleans())
def test_ranks_equal_brute_force_on_integer_vectors(seed, ties, masked, padding):
    generator = torch.Generator().manual_seed(seed)
    users, items, width = 7, 23, 3
    user = torch.randint(-2, 3, (users, width), generator=generator).float()
    table = torch.randint(-2, 3, (items, width), generator=generator).float()
    target = torch.randint(1, items, (users,), generator=generator)
    mask = torch.rand(users, items, generator=generator) < 0.3 if masked else None
    got = target_ranks(user, table, target, ties=ties, mask=mask, padding_candidate=padding)
    assert got.tolist() == brute(user, table, target, ties, mask, padding)


@pytest.mark.parametrize("elements", [1, 130, 1000])
def test_blocks_change_nothing(monkeypatch, elements):
    generator = torch.Generator().manual_seed(0)
    user = torch.randint(-3, 4, (50, 4), generator=generator).float()
    table = torch.randint(-3, 4, (40, 4), generator=generator).float()
    target = torch.randint(1, 40, (50,), generator=generator)
    hidden = torch.randint(0, 50, (90,), generator=generator), torch.randint(0, 40, (90,), generator=generator)
    mask = torch.zeros(50, 40, dtype=torch.bool)
    mask[hidden] = True
    monkeypatch.setattr(ranks, "_USERS", {"cpu": 13})
    monkeypatch.setattr(ranks, "_BLOCK_ELEMENTS", {"cpu": elements})
    for padding in (False, True):
        expected = brute(user, table, target, "half", padding=padding)
        assert target_ranks(user, table, target, padding_candidate=padding).tolist() == expected
        expected = brute(user, table, target, "half", mask, padding)
        for left_out in ({"mask": mask}, {"hidden": hidden}):
            assert target_ranks(user, table, target, padding_candidate=padding, **left_out).tolist() == expected


def test_the_number_of_users_in_a_call_moves_only_near_ties():
    generator = torch.Generator().manual_seed(3)
    user, table = torch.randn(300, 64, generator=generator), torch.randn(2000, 64, generator=generator)
    table[1000:1500] = table[500:1000]
    target = torch.randint(1, 2000, (300,), generator=generator)
    whole = target_ranks(user, table, target)
    for size in (1, 7, 100):
        parts = [target_ranks(*pair) for pair in zip(user.split(size), [table] * 300, target.split(size), strict=False)]
        score = user.double() @ table.double().T
        own = score.gather(1, target[:, None])
        near = ((score - own).abs() <= 4 * torch.finfo(torch.float32).eps * own.abs()).sum(1) - 1
        assert ((torch.cat(parts) - whole).abs() <= near).all()


def test_the_target_is_never_masked_and_padding_never_competes():
    table = torch.tensor([[100.0], [1.0], [2.0], [3.0]])
    user = torch.ones(1, 1)
    everything = torch.ones(1, 4, dtype=torch.bool)
    assert target_ranks(user, table, torch.tensor([1]), mask=everything).item() == 0
    assert target_ranks(user, table, torch.tensor([1])).item() == 2
    assert target_ranks(user, table, torch.tensor([1]), padding_candidate=True).item() == 3


@pytest.mark.parametrize(
    ("user", "table", "target", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 2), torch.tensor([1, 1]), "user_BD"),
        (torch.ones(2, 3), torch.ones(4, 3), torch.tensor([1]), "target_B"),
        (torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]), "from 1 to 3"),
        (torch.full((2, 3), torch.nan), torch.ones(4, 3), torch.tensor([1, 1]), "finite"),
    ],
)
def test_bad_input_is_named(user, table, target, message):
    with pytest.raises(ValueError, match=message):
        target_ranks(user, table, target)


def test_no_users_give_no_ranks():
    assert target_ranks(torch.ones(0, 3), torch.ones(4, 3), torch.zeros(0, dtype=torch.long)).shape == (0,)
