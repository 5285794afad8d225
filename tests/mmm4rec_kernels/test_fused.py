"""The Triton kernels against the recurrence: on a GPU, or in Triton's interpreter (see test_interpreted).

Letters: B sequences, L places, E width, H heads, P head dim, G groups, N state, C channels, K taps.
"""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmm4rec_kernels import BackendUnavailable, CrossProjections, causal_conv1d, gated_rms_norm, ssd, ssd_block
from mmm4rec_kernels.agreement import FLOOR, disagreement

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
LENGTHS = [1, 2, 3, 15, 16, 17, 20, 31, 32, 33, 50, 63, 64, 65, 200, 255, 257, 500, 1024, 4096]

THREE_PASS_FLOOR = 4e-6
"""On a GPU a float32 product is three TF32 ones whose sums tensor cores take: not IEEE float32. The norm's backward
subtracts what nearly cancels and makes that visible in the block's worst elements; single operations hold FLOOR."""

needs_triton = pytest.mark.skipif(not (INTERPRETED or ON_GPU), reason="needs a GPU or TRITON_INTERPRET=1")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
pytestmark = needs_triton


def outcome(function, inputs, dtype=None, **options):
    """Outputs and every gradient of one call."""
    leaves = {k: (t if dtype is None else t.to(dtype)).detach().requires_grad_() for k, t in inputs.items()}
    result = function(**leaves, **options)
    outputs = result if isinstance(result, tuple) else (result,)
    generator = torch.Generator().manual_seed(7)
    total = sum((y * torch.randn(y.shape, generator=generator).to(y)).sum() for y in outputs)
    total.backward()
    named = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"d_{k}": t.grad for k, t in leaves.items()}


@contextlib.contextmanager
def poisoned():
    """Inside, memory that is asked for and not yet written holds NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def agree(function, *draws, floor=FLOOR, **options):
    """Compares outputs and gradients over all draws of the inputs together.

    A tensor of a few elements needs several draws: in one, the yardstick's own error may be small by luck.
    """
    runs = []
    for inputs in draws:
        inputs = {k: t.to(DEVICE) for k, t in inputs.items()}
        truth = outcome(function, inputs, torch.float64, backend="reference", **options)
        yardstick = outcome(function, inputs, backend="reference", **options)
        with poisoned():
            got = outcome(function, inputs, backend="triton", **options)
        again = outcome(function, inputs, backend="triton", **options)
        assert all(torch.equal(got[k], again[k]) for k in got)
        runs.append((got, truth, yardstick))
    joined = [{k: torch.stack([run[k] for run in tensors]) for k in tensors[0]} for tensors in zip(*runs, strict=True)]
    assert not disagreement(*joined, floor)


def scan(scan_inputs, *args, **options):
    inputs = scan_inputs(*args, **options)
    inputs.pop("cotangent")
    return inputs


@pytest.mark.parametrize("length", [1, 3, 17, 20, 33, 65])
@pytest.mark.parametrize("extreme", [False, True])
def test_scan(scan_inputs, length, extreme):
    inputs = scan(scan_inputs, 2, length, heads=2, width=12, groups=2, state=7, extreme=extreme, seed=length)
    agree(ssd, inputs, skip="dt_x")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scan_at_every_length(scan_inputs, length, dtype):
    sizes = {"heads": 8, "width": 64, "groups": 8, "state": 64}
    draws = [scan(scan_inputs, 3, length, **sizes, dtype=dtype, seed=seed) for seed in range(3)]
    agree(ssd, *draws, skip="dt_x")


@pytest.mark.gpu
@needs_gpu
def test_scan_of_a_very_long_sequence(scan_inputs):
    agree(ssd, scan(scan_inputs, 1, 16384, heads=2, width=64, groups=2, state=64))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("width", "state"), [(16, 128), (24, 40), (128, 16), (100, 96)])
@pytest.mark.parametrize("length", [20, 130])
def test_scan_at_other_sizes(scan_inputs, width, state, length):
    agree(ssd, scan(scan_inputs, 3, length, heads=4, width=width, groups=2, state=state, extreme=True))


@pytest.mark.parametrize("groups", [1, 2])
def test_scan_with_shared_groups_and_wide_skip(scan_inputs, groups):
    inputs = scan(scan_inputs, 2, 5, heads=4, width=6, groups=groups, state=9)
    agree(ssd, {**inputs, "D": torch.randn(4, 6)}, dt_limit=(0.05, 0.2))


@pytest.mark.parametrize("length", [9, 70])
def test_scan_with_states_and_lengths(scan_inputs, length):
    inputs = scan(scan_inputs, 3, length, heads=2, groups=2)
    states = {"initial_states": torch.randn(3, 2, 16, 16)}
    lengths = torch.tensor([0, 5, length], device=DEVICE)
    agree(ssd, inputs | states, return_final_states=True, lengths=lengths)


def test_scan_of_packed_sequences(scan_inputs):
    inputs = scan(scan_inputs, 1, 80, heads=2, groups=2, extreme=True)
    agree(ssd, inputs, cu_seqlens=torch.tensor([0, 70, 70, 80], device=DEVICE), return_final_states=True)


@pytest.mark.parametrize("programs", [1, 12])
@pytest.mark.parametrize("packed", [False, True])
def test_scan_of_one_segment_and_of_several(scan_inputs, monkeypatch, programs, packed):
    from mmm4rec_kernels.ssd import fused

    monkeypatch.setattr(fused, "PROGRAMS", programs)
    given = {"initial_states": torch.randn(3, 2, 10, 16), "D": torch.randn(2, 10)}
    inputs = scan(scan_inputs, 1 if packed else 3, 300, heads=2, width=10, groups=1, extreme=True) | given
    if packed:
        where = {"cu_seqlens": torch.tensor([0, 260, 260, 300], device=DEVICE)}
    else:
        where = {"lengths": torch.tensor([300, 0, 130], device=DEVICE)}
    agree(ssd, inputs, return_final_states=True, **where)
    inputs = {k: t.to(DEVICE) for k, t in inputs.items()}
    kept = ssd(**{k: t.clone().requires_grad_() for k, t in inputs.items()}, backend="triton", **where)
    assert torch.equal(ssd(**inputs, backend="triton", **where), kept)


def test_scan_reads_nothing_behind_the_end(scan_inputs):
    inputs = {k: t.to(DEVICE) for k, t in scan(scan_inputs, 2, 20, heads=2, groups=2).items()}
    lengths = torch.tensor([4, 20], device=DEVICE)
    before = outcome(ssd, inputs, backend="triton", lengths=lengths)
    for k in ("x", "dt", "B", "C"):
        inputs[k][0, 4:] = torch.nan
    after = outcome(ssd, inputs, backend="triton", lengths=lengths)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_scan_of_zeros_and_of_single_places(scan_inputs):
    inputs = scan(scan_inputs, 3, 4, heads=2, groups=2)
    for k in ("x", "B", "C"):
        inputs[k][1] = 0
    agree(ssd, inputs, lengths=torch.tensor([1, 4, 0], device=DEVICE))
    inputs = scan(scan_inputs, 1, 3, heads=2, groups=2)
    agree(ssd, inputs, cu_seqlens=torch.tensor([0, 1, 2, 3], device=DEVICE), return_final_states=True)


@pytest.mark.parametrize("case", ["ssd_gh", "ssd_g1"])
def test_published_numbers_of_the_scan(golden, case):
    names = {"x": "X", "dt": "dt", "A": "A", "B": "B", "C": "C", "D": "D", "dt_bias": "dt_bias"}
    results = []
    for backend in ("triton", "reference"):
        leaves = {k: golden[f"{case}/in/{n}"].float().to(DEVICE).requires_grad_() for k, n in names.items()}
        y = ssd(**leaves, skip="dt_x", backend=backend)
        grads = torch.autograd.grad(y, list(leaves.values()), golden[f"{case}/in/cotangent"].to(y))
        results.append({"Y": y.detach().cpu()} | {n: g.cpu() for n, g in zip(names.values(), grads, strict=True)})
    truth = {"Y": golden[f"{case}/out/Y"]} | {n: golden[f"{case}/grad/{n}"] for n in names.values()}
    assert not disagreement(results[0], truth, results[1])


def test_published_numbers_of_convolution_and_norm(golden):
    g = {k: t.float().to(DEVICE) for k, t in golden.items() if k.startswith(("conv/", "rms/"))}
    results = []
    for backend in ("triton", "reference"):
        x = g["conv/in/x"].transpose(1, 2)
        conv = causal_conv1d(x, g["conv/in/weight"][:, 0], g["conv/in/bias"], activation="silu", backend=backend)
        norm = gated_rms_norm(g["rms/in/x"], g["rms/in/z"], g["rms/in/weight"], eps=1e-12, backend=backend)
        results.append({"conv": conv.transpose(1, 2).cpu(), "norm": norm.cpu()})
    truth = {"conv": golden["conv/out/silu"], "norm": golden["rms/out/y"]}
    assert not disagreement(results[0], truth, results[1])


def test_strided_inputs(scan_inputs):
    inputs = {k: t.to(DEVICE) for k, t in scan(scan_inputs, 2, 9, heads=4, width=16, state=16).items()}
    joined = torch.cat([inputs[k].flatten(2) for k in ("x", "B", "C")], -1)
    views = {k: joined[..., i * 64 : i * 64 + 64].unflatten(-1, (4, 16)) for i, k in enumerate(("x", "B", "C"))}
    views["dt"] = inputs["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    strided = outcome(ssd, inputs | views, backend="triton")
    plain = outcome(ssd, inputs, backend="triton")
    assert all(torch.equal(strided[k], plain[k]) for k in plain)


def test_strided_inputs_of_the_convolution():
    torch.manual_seed(0)
    wide = torch.randn(2, 9, 30, device=DEVICE)
    inputs = {"x_BLC": wide[:, ::2, 7:19], "weight_CK": torch.randn(12, 3, device=DEVICE)}
    strided = outcome(causal_conv1d, inputs, backend="triton")
    plain = outcome(causal_conv1d, {k: t.contiguous() for k, t in inputs.items()}, backend="triton")
    assert all(torch.equal(strided[k], plain[k]) for k in plain)


def test_convolution_reads_nothing_behind_the_end():
    torch.manual_seed(0)
    inputs = {"x_BLC": torch.randn(3, 7, 5, device=DEVICE), "weight_CK": torch.randn(5, 4, device=DEVICE)}
    lengths = torch.tensor([4, 7, 0], device=DEVICE)
    before = outcome(causal_conv1d, inputs, backend="triton", lengths=lengths)
    inputs["x_BLC"][0, 4:] = torch.nan
    inputs["x_BLC"][2] = torch.nan
    after = outcome(causal_conv1d, inputs, backend="triton", lengths=lengths)
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 3, 20, 70])
def test_convolution(taps, length):
    torch.manual_seed(length)
    inputs = {
        "x_BLC": torch.randn(2, length, 20),
        "weight_CK": torch.randn(20, taps),
        "bias": torch.randn(20),
    }
    agree(causal_conv1d, inputs, activation="silu")
    inputs.pop("bias")
    agree(causal_conv1d, inputs, lengths=torch.tensor([0, length], device=DEVICE))


def test_convolution_of_packed_sequences():
    inputs = {"x_BLC": torch.randn(1, 140, 6), "weight_CK": torch.randn(6, 4), "bias": torch.randn(6)}
    offsets = torch.tensor([0, 130, 130, 140], device=DEVICE)
    agree(causal_conv1d, inputs, activation="silu", cu_seqlens=offsets)


@pytest.mark.parametrize("before", [False, True])
def test_norm(before):
    torch.manual_seed(0)
    inputs = {"y": torch.randn(2, 5, 12), "z": torch.randn(2, 5, 12), "weight": torch.randn(12)}
    agree(gated_rms_norm, inputs, eps=1e-5, norm_before_gate=before)


def block(projected, **rest):
    return ssd_block(projected, n_groups=rest.pop("groups"), eps=1e-12, **rest)


def crossing(xBdt, z, C, **rest):
    return ssd_block(CrossProjections(xBdt, z, C), n_groups=rest.pop("groups"), eps=1e-12, **rest)


def block_inputs(kind, batch, length, heads=2, width=16, groups=2, state=16, seed=0):
    generator = torch.Generator().manual_seed(length + 1000 * seed)
    E, GN = heads * width, groups * state

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    if kind == "self":
        inputs = {"projected": normal(batch, length, 2 * E + 2 * GN + heads)}
    else:
        inputs = {
            "xBdt": normal(batch, length, E + GN + heads),
            "z": normal(batch, length, E),
            "C": normal(batch, length, GN),
        }
    return inputs | {
        "conv_weight_CK": normal(E + 2 * GN, 4) / 2,
        "conv_bias_C": normal(E + 2 * GN) / 2,
        "A_log_H": normal(heads),
        "D_H": normal(heads),
        "dt_bias_H": normal(heads) - 2,
        "norm_weight_E": normal(E),
        "time_factor_BLH": normal(batch, heads, length).transpose(1, 2),
    }


@pytest.mark.parametrize(("kind", "length"), [("self", 5), ("self", 20), ("self", 70), ("cross", 9), ("cross", 17)])
def test_block(kind, length):
    draws = [block_inputs(kind, 2, length, groups=2, seed=seed) for seed in range(4 if length < 20 else 1)]
    agree(block if kind == "self" else crossing, *draws, groups=2)


def test_who_takes_a_call_of_the_block():
    from mmm4rec_kernels.block.ops import several_in_a_tile

    one_kernel_backward = [n for n in range(1, 50) if several_in_a_tile(False, n, True, True)]
    assert one_kernel_backward == [*range(1, 9), *range(13, 33)]
    assert [n for n in range(1, 50) if several_in_a_tile(False, n, True, False)] == [*range(1, 9)]
    assert [n for n in range(1, 50) if several_in_a_tile(False, n, False, False)] == [*range(1, 33)]
    assert [n for n in range(1, 50) if several_in_a_tile(True, n, True, False)] == [*range(1, 33)]


def test_block_without_gradients_takes_one_kernel_and_gives_the_same():
    from mmm4rec_kernels.block.ops import SHORT, SHORT_FORWARD

    assert SHORT < 20 <= SHORT_FORWARD
    inputs = {k: t.to(DEVICE) for k, t in block_inputs("self", 3, 20).items()}
    results = [block(**inputs, groups=2, backend=backend) for backend in ("triton", "reference")]
    truth = block(**{k: t.double() for k, t in inputs.items()}, groups=2, backend="reference")
    got, yardstick, truth = ({"y": t} for t in (*results, truth))
    assert not disagreement(got, truth, yardstick, FLOOR)


@pytest.mark.parametrize(("kind", "length"), [("self", 13), ("self", 20), ("self", 32), ("cross", 14), ("cross", 17)])
def test_block_joined(kind, length):
    draws = [block_inputs(kind, 3, length, seed=seed) for seed in range(4 if length < 20 else 1)]
    agree(block if kind == "self" else crossing, *draws, groups=2)


@pytest.mark.parametrize(("length", "taps"), [(14, 2), (20, 3)])
def test_block_joined_with_lengths_few_taps_and_no_factor(length, taps):
    inputs = block_inputs("cross", 5, length, width=12, state=5)
    inputs.pop("time_factor_BLH")
    inputs["conv_weight_CK"] = inputs["conv_weight_CK"][:, :taps].contiguous()
    agree(crossing, inputs, groups=2, skip="x", lengths=torch.tensor([9, 0, length, 1, length], device=DEVICE))


@pytest.mark.parametrize("length", [9, 20])
def test_block_with_kernels_for_any_length_gives_the_same(monkeypatch, length):
    inputs = {k: t.to(DEVICE) for k, t in block_inputs("self", 4, length).items()}
    lengths = torch.tensor([length, 5, 0, length], device=DEVICE)
    y = block(**inputs, groups=2, lengths=lengths, backend="triton")
    monkeypatch.setattr("mmm4rec_kernels.block.ops.SHORT", 32)
    torch.testing.assert_close(y, block(**inputs, groups=2, lengths=lengths, backend="triton"))


def test_block_joined_reads_nothing_behind_the_end():
    inputs = {k: t.to(DEVICE) for k, t in block_inputs("self", 3, 20).items()}
    lengths = torch.tensor([4, 20, 0], device=DEVICE)
    before = outcome(block, inputs, backend="triton", groups=2, lengths=lengths)
    inputs["projected"][0, 4:] = torch.nan
    inputs["projected"][2] = torch.nan
    after = outcome(block, inputs, backend="triton", groups=2, lengths=lengths)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_block_with_lengths_shared_groups_and_no_factor():
    inputs = block_inputs("self", 2, 17, heads=4, width=12, groups=1, state=5)
    inputs.pop("time_factor_BLH")
    agree(block, inputs, groups=1, skip="x", lengths=torch.tensor([9, 17], device=DEVICE))


def test_block_of_packed_sequences():
    offsets = torch.tensor([0, 5, 5, 12], device=DEVICE)
    draws = [block_inputs("cross", 1, 12, seed=seed) for seed in range(4)]
    agree(crossing, *draws, groups=2, cu_seqlens=offsets, max_length=7)


def test_block_of_packed_sequences_over_several_tiles():
    inputs = block_inputs("self", 1, 70, heads=2, width=12, groups=1, state=5)
    inputs.pop("time_factor_BLH")
    offsets = torch.tensor([0, 3, 12, 32, 33, 46, 47, 66, 70], device=DEVICE)
    agree(block, inputs, groups=1, skip="x", cu_seqlens=offsets, max_length=20)


def test_block_of_packed_sequences_that_forget_within_a_place():
    # A tile reaches behind the last row, and the decays before that add up to far less than 2^-128.
    inputs = block_inputs("self", 1, 70, heads=2, width=12, groups=1, state=5)
    inputs.pop("time_factor_BLH")
    inputs["projected"][..., -2:] *= 10
    inputs["A_log_H"].fill_(2.5)
    offsets = torch.tensor([0, 3, 12, 32, 33, 46, 47, 66, 70], device=DEVICE)
    agree(block, inputs, groups=1, skip="x", cu_seqlens=offsets, max_length=20)


def test_block_of_short_sequences_with_lengths():
    inputs = block_inputs("cross", 11, 6, heads=2)
    lengths = torch.tensor([6, 0, 3, 1, 6, 2, 5, 6, 4, 6, 1], device=DEVICE)
    agree(crossing, inputs, groups=2, lengths=lengths)


def test_block_leaves_places_behind_the_last_sequence_zero():
    from mmm4rec_kernels.block.ops import short_forward

    b = {k: t.to(DEVICE) for k, t in block_inputs("self", 1, 20).items()}
    b["projected"][:, 12:] = torch.nan
    b["projected"].requires_grad_()
    names = ("conv_weight_CK", "conv_bias_C", "A_log_H", "D_H", "dt_bias_H", "norm_weight_E")
    tensors = (b["projected"], None, None, b["time_factor_BLH"], *(b[k] for k in names))
    offsets = torch.tensor([0, 5, 12, 12], device=DEVICE)
    out, *_ = short_forward(*tensors, offsets, True, 7, 2, 1e-12, True)
    out.sum().backward()
    assert (out[:, 12:] == 0).all()
    assert (out[:, :12] != 0).any()
    assert (b["projected"].grad[:, 12:] == 0).all()
    assert b["projected"].grad.isfinite().all()


def tiles_of(lengths, longest, behind):
    """Checks that tiles hold whole sequences and every place once; their sizes."""
    from mmm4rec_kernels.block import tiling
    from mmm4rec_kernels.block.ops import TILE, planned_tiles

    bounds = torch.tensor([0, *lengths]).cumsum(0)
    rows = int(bounds[-1]) + behind
    with poisoned():
        projected, ends = torch.zeros(1, rows, 1, device=DEVICE), bounds.to(DEVICE)
        _, places, _ = tiling.prepare(projected, None, *torch.zeros(2, 1, device=DEVICE), ends, True, longest)
    first, start, stop = (t.cpu() for t in torch.split(places, [rows, *[planned_tiles(rows, longest)] * 2]))
    owner = torch.searchsorted(bounds, torch.arange(rows), right=True) - 1
    assert torch.equal(first, torch.where(owner < len(lengths), bounds[owner], -1).int())
    held = stop > start
    size = (stop - start)[held]
    assert size.max() <= TILE
    start, order = start[held].sort()
    assert torch.equal(torch.cat([start, torch.tensor([rows])]), torch.cat([torch.tensor([0]), stop[held][order]]))
    assert set(start.tolist()) <= {*bounds.tolist(), *range(int(bounds[-1]), rows)}
    return size


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([1, 17, 20, 32]), st.sampled_from([0, 1, 70]))
def test_tiles_hold_whole_sequences_and_every_place_once(data, longest, behind):
    lengths = data.draw(st.lists(st.integers(0, longest), min_size=1, max_size=40))
    assume(sum(lengths) + behind)
    tiles_of(lengths, longest, behind)


@pytest.mark.parametrize(
    ("longest", "lengths"),
    [(32, [1, 32] * 40), (32, [32] * 33), (17, [17] * 65), (1, [1] * 1100), (16, [1, 16] * 80), (20, [16] * 64 + [20])],
)
def test_tiles_suffice_in_the_worst_case(longest, lengths):
    tiles_of(lengths, longest, 0)


def test_tiles_of_short_sequences_are_almost_full():
    lengths = torch.randint(1, 8, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    size = tiles_of(lengths, 20, 0)
    assert size.double().mean() > 0.85 * size.max()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 20, 31, 32, 33, 50, 63, 64, 65, 200])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_block_at_every_length(kind, length):
    draws = [block_inputs(kind, 5, length, heads=8, width=64, groups=8, state=64, seed=seed) for seed in range(3)]
    agree(block if kind == "self" else crossing, *draws, groups=8, floor=THREE_PASS_FLOOR)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("length", [1, 8, 9, 20, 32, 33])
def test_block_without_gradients_at_every_length(length):
    inputs = {k: t.to(DEVICE) for k, t in block_inputs("self", 5, length, 8, 64, 8, 64).items()}
    results = [block(**inputs, groups=8, backend=backend) for backend in ("triton", "reference")]
    truth = block(**{k: t.double() for k, t in inputs.items()}, groups=8, backend="reference")
    assert torch.equal(block(**inputs, groups=8, backend="triton"), results[0])
    got, yardstick, truth = ({"y": t} for t in (*results, truth))
    assert not disagreement(got, truth, yardstick, THREE_PASS_FLOOR)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("length", [7, 40, 150])
def test_block_at_other_sizes(length):
    draws = [block_inputs("self", 3, length, heads=4, width=24, groups=2, state=40, seed=seed) for seed in range(3)]
    agree(block, *draws, groups=2, lengths=torch.tensor([length, 0, 5], device=DEVICE))
    packed = [block_inputs("cross", 1, 3 * length, heads=4, width=24, groups=2, state=40, seed=s) for s in range(3)]
    offsets = torch.tensor([0, length, length + 1, 2 * length, 3 * length], device=DEVICE)
    agree(crossing, *packed, groups=2, cu_seqlens=offsets, max_length=length)


def test_operators_are_well_formed(scan_inputs):
    from mmm4rec_kernels.block.ops import short_forward, ssd_block_forward
    from mmm4rec_kernels.conv1d.ops import conv_forward
    from mmm4rec_kernels.norm.ops import norm_forward
    from mmm4rec_kernels.ssd.ops import scan_forward

    def leaf(*shape):
        return torch.randn(*shape, device=DEVICE, requires_grad=True)

    def checked(operator, arguments):
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(operator.overload, arguments, test_utils=checks)

    checked(conv_forward, (leaf(1, 3, 8), leaf(8, 4), leaf(8), None, False, 3, True))
    checked(norm_forward, (leaf(1, 2, 8), leaf(1, 2, 8), leaf(8), 1e-5, False))
    s = {k: t.to(DEVICE).requires_grad_() for k, t in scan(scan_inputs, 1, 3, heads=1, groups=1).items()}
    arguments = (s["x"], s["dt"], s["A"], s["B"], s["C"], s["D"], s["dt_bias"], None, None, False, 3, True, None)
    for want_final in (False, True):
        checked(scan_forward, (*arguments, True, want_final, True))
    b = {k: t.to(DEVICE).requires_grad_() for k, t in block_inputs("self", 1, 3).items()}
    names = ("conv_weight_CK", "conv_bias_C", "A_log_H", "D_H", "dt_bias_H", "norm_weight_E")
    tensors = (b["projected"], None, None, b["time_factor_BLH"], *(b[k] for k in names))
    checked(ssd_block_forward, (*tensors, None, False, 3, 2, 1e-12, True))
    offsets = torch.tensor([0, 1, 3], device=DEVICE)
    for where in ((None, False), (offsets, True)):
        checked(short_forward, (*tensors, *where, 3, 2, 1e-12, True))


def test_float64_is_refused(scan_inputs):
    inputs = {k: t.double() for k, t in scan(scan_inputs, 1, 3).items()}
    with pytest.raises(BackendUnavailable, match="float64"):
        ssd(**{k: t.to(DEVICE) for k, t in inputs.items()}, backend="triton")
