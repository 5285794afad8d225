"""Loss, lookup and counts against their definitions, on every backend that can run here.

The kernels run on a GPU, or in Triton's interpreter (see test_interpreted). Letters: B queries, V rows, D width.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from mmm4rec_kernels import BackendUnavailable, compare_counts, lookup, order_of, softmax_cross_entropy, sum_by_row
from mmm4rec_kernels.agreement import disagreement
from mmm4rec_kernels.scoring import eager, ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
BACKENDS = ["torch", *(["triton"] if INTERPRETED or ON_GPU else [])]
FAST = BACKENDS[1:]

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def inputs(queries, rows, width, first=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(queries + rows)
    query, table = (torch.randn(n, width, generator=generator) * scale for n in (queries, rows))
    target = torch.randint(first, rows, (queries,), generator=generator)
    return query.to(DEVICE, dtype), table.to(DEVICE, dtype), target.to(DEVICE)


def outcome(function, query, table, weight=None):
    """The loss and its gradients, for a different weight a query."""
    query, table = query.detach().requires_grad_(), table.detach().requires_grad_()
    loss = function(query, table)
    weight = torch.linspace(-1, 2, len(loss)) if weight is None else weight
    (loss * weight.to(loss)).sum().backward()
    return {"loss": loss.detach(), "d_query": query.grad, "d_table": table.grad}


def shrink(monkeypatch, blocks):
    """Make small cases take the path of large ones: nothing is kept, blocks hold a few rows."""
    if blocks:
        monkeypatch.setattr(ops, "KEPT", 0)
        monkeypatch.setattr(eager, "BLOCK", 5 * 7)
        if FAST:
            from mmm4rec_kernels.scoring import fused

            monkeypatch.setattr(fused, "BLOCK", 5 * 16)
            monkeypatch.setattr(fused, "COLUMNS", 16)


def test_loss_worked_by_hand():
    table = torch.tensor([[100.0], [0.0], [1.0], [2.0]], device=DEVICE)
    query, target = torch.ones(1, 1, device=DEVICE), torch.tensor([2], device=DEVICE)
    sums = torch.tensor([0.0, 1.0, 2.0]).exp().sum().log()
    for backend in ("reference", *BACKENDS):
        loss = softmax_cross_entropy(query, table, target, first_row=1, backend=backend)
        torch.testing.assert_close(loss.cpu(), sums[None] - 1)


@every_backend
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("queries", "rows", "width", "first"), [(5, 37, 12, 1), (1, 1, 3, 0), (7, 100, 16, 0)])
def test_loss_and_gradients(monkeypatch, backend, blocks, queries, rows, width, first):
    shrink(monkeypatch, blocks)
    query, table, target = inputs(queries, rows, width, first)

    def naive(query, table):
        return F.cross_entropy(query @ table[first:].T, target - first, reduction="none")

    def ours(query, table):
        return softmax_cross_entropy(query, table, target, first_row=first, backend=backend)

    truth, yardstick, got = outcome(naive, query.double(), table.double()), outcome(naive, query, table), None
    for _ in range(2):
        again = outcome(ours, query, table)
        assert not disagreement(again, truth, yardstick)
        assert got is None or all(torch.equal(got[name], again[name]) for name in got)
        got = again
    assert not got["d_table"][:first].any()


@every_backend
@pytest.mark.parametrize("blocks", [False, True])
def test_scores_far_apart_keep_the_loss_finite(monkeypatch, backend, blocks):
    shrink(monkeypatch, blocks)
    table = torch.tensor([[0.0], [300.0], [-300.0], *([[-1.0]] * 40)], device=DEVICE)
    query, target = torch.ones(2, 1, device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    got = outcome(lambda q, t: softmax_cross_entropy(q, t, target, backend=backend), query, table, torch.ones(2))
    assert got["loss"].tolist() == [0, 600]
    assert got["d_query"].tolist() == [[0], [600]]


@every_backend
@pytest.mark.parametrize("blocks", [False, True])
def test_narrow_inputs_are_summed_in_float32(monkeypatch, backend, blocks):
    shrink(monkeypatch, blocks)
    query, table, target = inputs(6, 50, 16, dtype=torch.bfloat16)

    def wide(query, table):
        return F.cross_entropy(query.float() @ table.float().T, target, reduction="none")

    truth = outcome(wide, query.double(), table.double())
    got = outcome(lambda q, t: softmax_cross_entropy(q, t, target, backend=backend), query, table)
    assert got["loss"].dtype == torch.float32
    assert got["d_table"].dtype == torch.bfloat16
    torch.testing.assert_close(got["loss"].double(), truth["loss"].double(), rtol=1e-5, atol=1e-5)
    assert not disagreement(got, truth, {name: t.bfloat16() for name, t in truth.items()}, floor=4e-3)


def test_float64_keeps_its_digits():
    query, table, target = (t.cpu() for t in inputs(5, 30, 8))
    got = softmax_cross_entropy(query.double(), table.double(), target)
    expected = F.cross_entropy(query.double() @ table.double().T, target, reduction="none")
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


def test_autocast_decides_the_products():
    query, table, target = inputs(5, 30, 8)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = outcome(lambda q, t: softmax_cross_entropy(q, t, target), query, table)
    expected = outcome(lambda q, t: softmax_cross_entropy(q, t, target), query.bfloat16(), table.bfloat16())
    assert torch.equal(got["loss"], expected["loss"])
    assert got["d_table"].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_BD": torch.ones(2, 3, 1)}, "query_BD"),
        ({"table_VD": torch.ones(4, 2)}, "table_VD"),
        ({"table_VD": torch.ones(4, 3, dtype=torch.float64)}, "table_VD"),
        ({"target_B": torch.ones(3, dtype=torch.int64)}, "target_B"),
        ({"target_B": torch.ones(2, dtype=torch.int32)}, "int64"),
        ({"first_row": 4}, "first_row"),
    ],
)
def test_loss_names_a_bad_argument(change, message):
    call = {"query_BD": torch.ones(2, 3), "table_VD": torch.ones(4, 3), "target_B": torch.ones(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        softmax_cross_entropy(**call | change)


def zipf(places, rows):
    generator = torch.Generator().manual_seed(places)
    return (torch.rand(places, generator=generator) ** 4 * rows).long()


@every_backend
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "index",
    [zipf(3, 5), zipf(200, 40), torch.full((700,), 3), torch.arange(64), torch.arange(96).repeat_interleave(20) % 7],
    ids=["few", "skewed", "one", "distinct", "runs"],
)
def test_lookup_sums_gradients_by_row(backend, shared, index):
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(70, 20, generator=generator).to(DEVICE)
    weight = torch.randn(len(index), 20, generator=generator).to(DEVICE)
    index = index.to(DEVICE)
    order = order_of(index, 70) if shared else None
    truth = torch.zeros(70, 20, dtype=torch.float64, device=DEVICE).index_add_(0, index, weight.double())
    gradients = []
    for _ in range(2):
        leaf = table.clone().requires_grad_()
        rows = lookup(leaf, index, order=order, backend=backend)
        assert torch.equal(rows, table[index])
        rows.backward(weight)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    torch.testing.assert_close(gradients[0].double(), truth, rtol=1e-5, atol=1e-5)


@every_backend
def test_lookup_takes_any_shape_width_and_type(backend):
    table = torch.randn(40000, 3, device=DEVICE).bfloat16().requires_grad_()
    index = torch.tensor([[39999, 0], [5, 39999]], device=DEVICE)
    rows = lookup(table, index, backend=backend)
    assert rows.shape == (2, 2, 3)
    rows.transpose(0, 2).sum().backward()
    assert table.grad[:, 0].nonzero().squeeze(1).tolist() == [0, 5, 39999]
    assert table.grad[39999].tolist() == [2, 2, 2]
    assert lookup(table, index[:0], backend=backend).shape == (0, 2, 3)
    assert torch.equal(lookup(table, index, backend="reference"), rows)


@every_backend
def test_sums_by_row_are_lookups_gradient(backend):
    generator = torch.Generator().manual_seed(0)
    part = torch.randint(-4, 5, (300, 9), generator=generator).float().to(DEVICE)
    index = torch.randint(0, 40, (300,), generator=generator).to(DEVICE)
    index[:90] = 7  # crosses several tiles
    table = torch.zeros(41, 9, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad(lookup(table, index, backend="reference"), table, part)
    assert torch.equal(sum_by_row(part, index, 41, backend=backend), expected)
    with pytest.raises(ValueError, match="index_N"):
        sum_by_row(part, index[:5], 41)


def test_lookup_names_a_bad_argument():
    with pytest.raises(ValueError, match="table_VD"):
        lookup(torch.ones(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="index"):
        lookup(torch.ones(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="order"):
        lookup(torch.ones(3, 2), torch.zeros(2, dtype=torch.int64), order=order_of(torch.zeros(3, dtype=torch.long), 3))


@every_backend
def test_counts_worked_by_hand(backend):
    score = torch.tensor([[1.0, 2.0, 2.0, float("-inf")], [0.0, -0.0, 5.0, float("nan")]], device=DEVICE)
    above, equal = compare_counts(score, torch.tensor([2.0, 0.0], device=DEVICE), backend=backend)
    assert (above.tolist(), equal.tolist()) == ([0, 1], [2, 2])
    assert above.dtype == equal.dtype == torch.int64


@every_backend
def test_counts_of_long_rows(backend):
    generator = torch.Generator().manual_seed(0)
    wide = torch.randint(0, 50, (3, 9001), generator=generator).float().to(DEVICE)
    for score in (wide, wide[:, :4097]):
        own = score[:, 7].clone()
        got, expected = (compare_counts(score, own, backend=name) for name in (backend, "reference"))
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_counts_name_a_bad_argument():
    with pytest.raises(ValueError, match="own_B"):
        compare_counts(torch.ones(2, 3), torch.ones(3))
    if FAST:
        with pytest.raises(BackendUnavailable, match="contiguous"):
            compare_counts(torch.ones(3, 2, device=DEVICE).T, torch.ones(2, device=DEVICE), backend="triton")


@pytest.mark.skipif(not FAST, reason="needs a GPU or TRITON_INTERPRET=1")
def test_operators_are_well_formed():
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    query, table, target = inputs(4, 19, 16)
    query.requires_grad_()
    table.requires_grad_()
    for keep in (False, True):
        torch.library.opcheck(ops.cross_entropy_forward.overload, (query, table, target, 1, keep), test_utils=checks)
        kept = ops.cross_entropy_forward(query, table, target, 1, keep)
        tensors = [t.detach() for t in (query, table, target, *kept[1:])]
        torch.library.opcheck(ops.cross_entropy_backward.overload, (torch.ones(4, device=DEVICE), *tensors, 1))
    torch.library.opcheck(ops.lookup.overload, (table, target, None, None), test_utils=checks)
    order = order_of(target, 19)
    torch.library.opcheck(ops.lookup.overload, (table, target, *order), test_utils=checks)
    torch.library.opcheck(ops.lookup_backward.overload, (query.detach(), *order, 19))
    torch.library.opcheck(ops.compare_counts.overload, (query.detach() @ table.detach().T, query.detach()[:, 0]))


@pytest.mark.skipif(not FAST, reason="needs a GPU or TRITON_INTERPRET=1")
def test_a_target_outside_the_rows_is_not_silent():
    query, table, _ = inputs(2, 19, 16)
    loss = softmax_cross_entropy(query, table, torch.tensor([0, 5], device=DEVICE), first_row=1, backend="triton")
    assert loss.isnan().tolist() == [True, False]


@pytest.mark.skipif(not FAST, reason="needs a GPU or TRITON_INTERPRET=1")
def test_a_wrong_kernel_is_caught(monkeypatch):
    from mmm4rec_kernels.scoring import fused

    query, table, target = inputs(5, 37, 12)

    def naive(query, table):
        return F.cross_entropy(query @ table.T, target, reduction="none")

    right = fused.cross_entropy_backward
    monkeypatch.setattr(fused, "cross_entropy_backward", lambda *a: tuple(t * 1.0001 for t in right(*a)))
    got = outcome(lambda q, t: softmax_cross_entropy(q, t, target, backend="triton"), query, table)
    truth, yardstick = outcome(naive, query.double(), table.double()), outcome(naive, query, table)
    assert [line.split(":")[0] for line in disagreement(got, truth, yardstick)] == ["d_query", "d_table"]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("queries", "rows"), [(1024, 4385), (300, 25986), (1024, 70001), (3, 446975)])
@pytest.mark.parametrize("first", [0, 1])
def test_loss_at_full_size(queries, rows, first):
    query, table, target = inputs(queries, rows, 256, first, scale=0.2)

    def naive(query, table):
        return F.cross_entropy(query @ table[first:].T, target - first, reduction="none")

    def ours(query, table):
        return softmax_cross_entropy(query, table, target, first_row=first)

    weight = torch.full((queries,), 1 / queries)
    truth, yardstick = outcome(naive, query.double(), table.double(), weight), outcome(naive, query, table, weight)
    got, again = (outcome(ours, query, table, weight) for _ in range(2))
    assert not disagreement(got, truth, yardstick)
    assert all(torch.equal(got[name], again[name]) for name in got)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rows", [25986, 70001])
def test_steps_are_captured_in_a_graph(rows):
    query, table, target = inputs(1024, rows, 256, 1, scale=0.2)
    index = zipf(20000, rows).to(DEVICE)
    query.requires_grad_()
    table.requires_grad_()

    def step():
        loss = softmax_cross_entropy(query, table, target, first_row=1).mean() + lookup(table, index).square().mean()
        return torch.autograd.grad(loss, (query, table))

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(2):
        graph.replay()
    torch.testing.assert_close(got, expected)
