"""Windows and packings: the torch form against plain loops, the kernels against the torch form."""

from __future__ import annotations

import os

import pytest
import torch

from mmm4rec_kernels import packing_of, windows, windows_before

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
FORMS = ["torch", *(["kernel"] if INTERPRETED or ON_GPU else [])]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(windows, "by_kernel", lambda *given: False)
    return request.param


@pytest.mark.parametrize("with_next", [False, True])
@pytest.mark.parametrize("length", [1, 5, 20])
def test_windows_are_what_stands_before(length, with_next, form):
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(2, 30, (23,), generator=generator)
    total = int(counts.sum())
    value = torch.randint(1, 1000, (total,), generator=generator).int()
    time = torch.randint(2**40, (total,), generator=generator)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    targets = (torch.arange(total) > first).nonzero().squeeze(1)
    targets = targets[torch.randperm(len(targets), generator=generator)]
    given = (t.to(DEVICE) for t in (value, time, first, targets))
    values, lengths, times, own = (t.cpu() for t in windows_before(*given, length, with_next=with_next))
    for i, target in enumerate(targets.tolist()):
        begin = max(int(first[target]), target - length)
        n = target - begin
        padding = [0] * (length - n)
        assert values[i].tolist() == [*value[begin:target].tolist(), *padding]
        assert (int(lengths[i]), int(own[i])) == (n, int(value[target]))
        stamped = n + (with_next and begin == first[target] and n < length)
        assert times[i].tolist() == [*time[begin : begin + stamped].tolist(), *([0] * (length - stamped))]


@pytest.mark.parametrize(("users", "length", "spare"), [(1, 3, 0), (5, 4, 1), (70, 20, 37), (70, 20, 0), (1300, 3, 9)])
def test_a_packing_holds_every_place_once(users, length, spare, form):
    lengths = torch.randint(1, length + 1, (users,), generator=torch.Generator().manual_seed(users))
    total = int(lengths.sum())
    last, slots, offsets = (t.cpu() for t in packing_of(lengths.to(DEVICE), length, total + spare))
    ends = lengths.cumsum(0)
    assert torch.equal(last, ends - 1)
    wanted = [u * length + t for u, n in enumerate(lengths.tolist()) for t in range(n)]
    assert slots.tolist() == [*wanted, *([0] * spare)]
    assert offsets[: users + 1].tolist() == [0, *ends.tolist()]
    rest = offsets[users:].diff()
    assert bool((rest >= 0).all())
    assert int(rest.max()) <= length
    assert int(offsets[-1]) == total + spare
