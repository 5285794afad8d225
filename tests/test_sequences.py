"""Windows gathered from flat tensors, against the published construction written out plainly."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmm4rec_cli.data.sequences import Sequences, Windows
from mmm4rec_cli.errors import DataError

DAY = 86_400

histories = st.lists(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), min_size=0, max_size=15), min_size=1, max_size=6
)


def build(users):
    """Sequences and, per user, the list of (item, absolute time)."""
    plain, rows = [], []
    for user, events in enumerate(users):
        time = 1_000_000_000
        timed = []
        for item, gap in events:
            time += gap * DAY
            timed.append((item, time))
            rows.append((user, item, time))
        plain.append(timed)
    columns = list(zip(*rows, strict=True)) if rows else [[], [], []]
    user, item, time = (np.array(c, d) for c, d in zip(columns, (np.int32, np.int32, np.int64), strict=True))
    return Sequences.of(user, item, time, len(users)), plain


def published_window(prefix, max_len):
    """Spec 7.4, one line of m elements whose last one is the label."""
    m = len(prefix)
    items, stamps = [i for i, _ in prefix], [t for _, t in prefix]
    if m > max_len:
        return items[m - 1 - max_len : m - 1], stamps[m - 1 - max_len : m - 1], max_len
    pad = [0] * (max_len - (m - 1))
    return items[:-1] + pad, (stamps + [0] * max_len)[:max_len], m - 1


@settings(max_examples=60, deadline=None)
@given(histories, st.integers(2, 8))
def test_windows_equal_the_published_construction(users, max_len):
    sequences, plain = build(users)
    targets = sequences.all_targets()
    windows = sequences.windows(targets, max_len, with_target_time=True)
    observed = sequences.windows(targets, max_len, with_target_time=False)
    expected = [(user, n) for user, events in enumerate(plain) for n in range(2, len(events) + 1)]
    assert len(targets) == len(expected)
    for row, (user, n) in enumerate(expected):
        items, stamps, length = published_window(plain[user][:n], max_len)
        assert windows.items_BT[row].tolist() == items
        assert windows.timestamps_BT[row].tolist() == stamps
        assert int(windows.lengths_B[row]) == length
        assert int(windows.target_B[row]) == plain[user][n - 1][0]
        assert observed.timestamps_BT[row].tolist() == stamps[:length] + [0] * (max_len - length)
        assert torch.equal(observed.items_BT[row], windows.items_BT[row])


@settings(max_examples=40, deadline=None)
@given(histories)
def test_leave_one_out_holds_out_the_last_two_elements(users):
    sequences, plain = build(users)
    split = sequences.split("leave_one_out")
    start = np.cumsum([0, *map(len, plain)])
    train = [start[u] + p for u, e in enumerate(plain) for p in range(1, len(e) - 2)]
    assert split.train.tolist() == train
    assert split.test.tolist() == [start[u] + len(e) - 1 for u, e in enumerate(plain) if len(e) > 1]
    assert split.valid.tolist() == [start[u] + len(e) - 2 for u, e in enumerate(plain) if len(e) > 2]
    known = [p < len(e) - 2 for e in plain for p in range(len(e))]
    assert split.known_N.tolist() == known
    if train:
        users_of = sequences.users_of(split.train).tolist()
        assert users_of == [u for u, e in enumerate(plain) for _ in range(1, len(e) - 2)]


@settings(max_examples=60, deadline=None)
@given(histories, st.sampled_from([0.1, 0.25, 0.4]))
def test_the_temporal_split_trains_on_nothing_of_the_future(users, share):
    sequences, plain = build(users)
    times = sorted(t for e in plain for _, t in e)
    if not times:
        return
    split = sequences.split("temporal", share)
    first, second = (times[min(int(len(times) * (1 - n * share)), len(times) - 1)] for n in (2, 1))
    start = np.cumsum([0, *map(len, plain)])
    train, valid, test = [], [], []
    for u, events in enumerate(plain):
        moments = [t for _, t in events]
        train += [start[u] + p for p, t in enumerate(moments) if p and t < first]
        between = [p for p, t in enumerate(moments) if first <= t < second]
        after = [p for p, t in enumerate(moments) if t >= second]
        valid += [start[u] + p for p in between[:1] if p]
        test += [start[u] + p for p in after[:1] if p]
    assert (split.train.tolist(), split.valid.tolist(), split.test.tolist()) == (train, valid, test)
    assert split.known_N.tolist() == [t < first for e in plain for _, t in e]


@settings(max_examples=40, deadline=None)
@given(histories)
def test_repeats_and_ties_are_found(users):
    sequences, plain = build(users)
    targets = sequences.all_targets()
    wanted = [(u, n) for u, e in enumerate(plain) for n in range(1, len(e))]
    if not wanted:
        return
    assert sequences.repeated(targets).tolist() == [plain[u][n][0] in {i for i, _ in plain[u][:n]} for u, n in wanted]
    assert sequences.tied(targets).tolist() == [plain[u][n][1] == plain[u][n - 1][1] for u, n in wanted]


def test_a_user_without_interactions_takes_no_place():
    sequences = Sequences.of(
        np.array([1, 1], np.int32), np.array([3, 4], np.int32), np.array([5, 6], np.int64), n_users=3
    )
    assert sequences.counts_U.tolist() == [0, 2, 0]
    split = sequences.split("leave_one_out")
    assert split.targets("test").tolist() == [1]
    with pytest.raises(DataError, match="no valid target"):
        split.targets("valid")
    with pytest.raises(ValueError, match="random"):
        sequences.split("random")


def test_parts_hold_every_window_once_beside_those_of_about_its_length():
    lengths = torch.tensor([1, 20, 3, 3, 18, 1, 20, 2, 20, 1])
    items = torch.arange(10)[:, None].expand(10, 20)
    parts = Windows(items, lengths, items * 10, items[:, 0] + 100).parts(rows=40, padding=3)
    found = torch.cat([index for index, _ in parts])
    assert sorted(found.tolist()) == list(range(10))
    for index, part in parts:
        assert torch.equal(part.lengths_B, lengths[index])
        assert part.items_BT[:, 0].tolist() == index.tolist()
        assert part.target_B.tolist() == [i + 100 for i in index.tolist()]
        whole = len(index) * int(part.lengths_B.max())
        assert len(index) == 1 or (whole <= 40 and whole - int(part.lengths_B.sum()) <= 3)
    assert [len(index) for index, _ in parts] == [4, 2, 2, 2]
