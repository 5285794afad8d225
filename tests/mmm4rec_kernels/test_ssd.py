"""The scan: published numbers, agreement of the backends, properties. Letters: B L H P G N as in the package."""

from __future__ import annotations

import pytest
import torch

from mmm4rec_kernels import BackendUnavailable, ssd
from mmm4rec_kernels.agreement import disagreement, distance
from mmm4rec_kernels.ssd import eager


@pytest.fixture(params=["by heads", "as compiled"])
def form(request, monkeypatch):
    """The torch backend's form for CPUs, and that for other devices and compilers, which a CPU can run too."""
    if request.param == "as compiled":
        monkeypatch.setattr(eager, "_by_heads", lambda *tensors: False)


@pytest.mark.parametrize("case", ["ssd_gh", "ssd_g1"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_published_numbers(golden, run, case, backend):
    names = {"x": "X", "dt": "dt", "A": "A", "B": "B", "C": "C", "D": "D", "dt_bias": "dt_bias"}
    inputs = {k: golden[f"{case}/in/{name}"] for k, name in names.items()}
    inputs["cotangent"] = golden[f"{case}/in/cotangent"]
    got = run(ssd, inputs, skip="dt_x", backend=backend)
    torch.testing.assert_close(got["y"], golden[f"{case}/out/Y"], rtol=1e-10, atol=1e-10)
    for k, name in names.items():
        torch.testing.assert_close(got[f"d_{k}"], golden[f"{case}/grad/{name}"], rtol=1e-9, atol=1e-10, msg=k)


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 20, 31, 33, 63, 64, 65, 130])
@pytest.mark.parametrize("extreme", [False, True])
def test_torch_agrees_with_the_recurrence(scan_inputs, run, length, extreme, form):
    inputs = scan_inputs(3, length, heads=6, width=5, groups=3, state=7, extreme=extreme, seed=length)
    truth = run(ssd, inputs, torch.float64, backend="reference")
    yardstick = run(ssd, inputs, backend="reference")
    assert not disagreement(run(ssd, inputs, backend="torch"), truth, yardstick)


@pytest.mark.parametrize("length", [20, 150])
def test_states_pass_through(scan_inputs, length, form):
    inputs = scan_inputs(2, length, dtype=torch.float64)
    inputs.pop("cotangent")
    for backend in ("reference", "torch"):
        y, final = ssd(**inputs, return_final_states=True, backend=backend)
        cut = length // 3
        first = {k: t[:, :cut] if k in ["x", "dt", "B", "C"] else t for k, t in inputs.items()}
        second = {k: t[:, cut:] if k in ["x", "dt", "B", "C"] else t for k, t in inputs.items()}
        y1, state = ssd(**first, return_final_states=True, backend=backend)
        y2, last = ssd(**second, initial_states=state, return_final_states=True, backend=backend)
        torch.testing.assert_close(torch.cat([y1, y2], 1), y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last, final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_padding_and_packing_change_nothing(scan_inputs, backend):
    lengths = torch.tensor([3, 9, 1, 0, 6])
    inputs = scan_inputs(5, 9)
    inputs.pop("cotangent")
    for k in ("x", "dt", "B", "C"):
        for row, length in enumerate(lengths.tolist()):
            inputs[k][row, length:] = torch.nan
    padded, states = ssd(**inputs, lengths=lengths, return_final_states=True, backend=backend)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    inside = torch.arange(9) < lengths[:, None]
    packed = {k: t[inside][None] if k in ["x", "dt", "B", "C"] else t for k, t in inputs.items()}
    joined, packed_states = ssd(**packed, cu_seqlens=offsets, return_final_states=True, backend=backend)
    torch.testing.assert_close(padded[inside], joined[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states, packed_states, rtol=1e-5, atol=1e-6)
    assert (padded[~inside] == 0).all()
    for row, length in enumerate(lengths.tolist()):
        if length:
            alone = {k: t[row : row + 1, :length] if k in ["x", "dt", "B", "C"] else t for k, t in inputs.items()}
            torch.testing.assert_close(ssd(**alone, backend=backend)[0], padded[row, :length], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_padding_reaches_no_gradient(scan_inputs, run, backend):
    inputs, lengths = scan_inputs(3, 9), torch.tensor([5, 1, 9])
    clean = run(ssd, inputs, lengths=lengths, backend=backend)
    for k in ("x", "dt", "B", "C"):
        inputs[k][0, 5:] = torch.nan
    dirty = run(ssd, inputs, lengths=lengths, backend=backend)
    assert all(torch.equal(clean[k], dirty[k]) for k in clean)


def test_a_bound_on_packed_lengths_changes_nothing(scan_inputs, run):
    inputs, offsets = scan_inputs(1, 9), torch.tensor([0, 3, 3, 9])
    read = run(ssd, inputs, cu_seqlens=offsets, backend="torch")
    given = run(ssd, inputs, cu_seqlens=offsets, max_length=8, backend="torch")
    assert not disagreement(given, read, read)


@pytest.mark.parametrize("length", [20, 150])
def test_later_places_do_not_reach_back(scan_inputs, length):
    inputs = scan_inputs(2, length)
    inputs.pop("cotangent")
    before = ssd(**inputs, backend="torch")
    for k in ("x", "dt", "B", "C"):
        inputs[k][:, length // 2 :] += 1
    assert torch.equal(ssd(**inputs, backend="torch")[:, : length // 2], before[:, : length // 2])


def test_gradients_are_those_of_finite_differences(scan_inputs, form, monkeypatch):
    monkeypatch.setattr(eager, "CHUNK", 2)
    inputs = scan_inputs(2, 5, heads=2, width=3, groups=1, state=2, dtype=torch.float64)
    inputs.pop("cotangent")
    inputs = {k: t.double().requires_grad_() for k, t in inputs.items()}
    start = torch.randn(2, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def call(start, *tensors):
        return ssd(
            **dict(zip(inputs, tensors, strict=True)), initial_states=start, return_final_states=True, backend="torch"
        )

    assert torch.autograd.gradcheck(call, (start, *inputs.values()))


def test_dtype_is_kept(scan_inputs):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        inputs = scan_inputs(1, 4, dtype=dtype)
        inputs.pop("cotangent")
        y, state = ssd(**inputs, return_final_states=True)
        assert y.dtype == dtype
        assert state.dtype == torch.promote_types(dtype, torch.float32)


def test_skip_per_channel_and_step_limits(scan_inputs):
    inputs = scan_inputs(2, 6, dtype=torch.float64)
    inputs.pop("cotangent")
    D = torch.randn(4, 16, dtype=torch.float64)
    with_skip = ssd(**inputs | {"D": D}, dt_limit=(0.01, 0.1), backend="torch")
    without = ssd(**inputs | {"D": None}, dt_limit=(0.01, 0.1), backend="reference")
    torch.testing.assert_close(with_skip, without + D * inputs["x"])
    step = torch.nn.functional.softplus(inputs["dt"] + inputs["dt_bias"]).clamp(0.01, 0.1)
    given = {**inputs, "D": D, "dt": step, "dt_bias": None}
    torch.testing.assert_close(ssd(**given, dt_softplus=False, backend="torch"), with_skip)


def test_a_wrong_scan_fails_the_checker(scan_inputs, run):
    inputs = scan_inputs(2, 20)
    truth = run(ssd, inputs, torch.float64, backend="reference")
    yardstick = run(ssd, inputs, backend="reference")
    wrong_skip = run(ssd, inputs, backend="torch", skip="dt_x")
    assert any(line.startswith("y:") for line in disagreement(wrong_skip, truth, yardstick))
    slightly_off = {**yardstick, "d_A": yardstick["d_A"] * (1 + 1e-4)}
    assert [line[:4] for line in disagreement(slightly_off, truth, yardstick)] == ["d_A:"]
    unwritten = yardstick["y"].clone()
    unwritten[0, 3, 1, 2] = torch.nan
    assert distance(unwritten, truth["y"]).worst == float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 4)}, r"x: expected shape \[B, L, H, P\]"),
        ({"x": torch.zeros(2, 5, 4, 16, dtype=torch.int64)}, "x: expected a floating-point"),
        ({"dt": torch.zeros(2, 5, 3)}, r"dt: expected shape \[B, L, H\] = \[2, 5, 4\]"),
        ({"A": torch.zeros(3)}, r"A: expected shape \[H\] = \[4\]"),
        ({"B": torch.zeros(2, 5, 3, 16)}, "B: .* G dividing H = 4, got G = 3"),
        ({"C": torch.zeros(2, 5, 2, 16)}, r"C: expected shape \[B, L, G, N\] = \[2, 5, 4, 16\]"),
        ({"C": torch.zeros(2, 5, 4, 16, dtype=torch.float64)}, "C: expected dtype torch.float32"),
        ({"D": torch.zeros(4, 3)}, r"D: expected shape \[H\]"),
        ({"dt_bias": torch.zeros(5)}, "dt_bias: expected shape"),
        ({"A": torch.zeros(4, device="meta")}, "A: expected device cpu"),
        ({"skip": "y"}, "skip: expected one of 'x', 'dt_x'"),
        ({"dt_limit": (1.0, 0.0)}, "dt_limit"),
        ({"lengths": torch.tensor([1, -1])}, "lengths: expected values from 0 to L = 5"),
        ({"lengths": torch.tensor([1, 6])}, "lengths: expected values"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "lengths: expected an int32 or int64"),
        ({"lengths": torch.tensor([1])}, r"lengths: expected shape \[B\] = \[2\]"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: expected packed inputs"),
        ({"initial_states": torch.zeros(2, 4, 16, 3)}, r"initial_states: expected shape \[B, H, P, N\]"),
        ({"backend": "cuda"}, "backend: ssd has"),
    ],
)
def test_bad_input_is_named(scan_inputs, change, message):
    inputs = scan_inputs(2, 5)
    inputs.pop("cotangent")
    with pytest.raises(ValueError, match=message):
        ssd(**inputs | change)


def test_bad_offsets_are_named(scan_inputs):
    inputs = scan_inputs(1, 5)
    inputs.pop("cotangent")
    for offsets in ([0, 4], [1, 5], [0, 3, 2, 5]):
        with pytest.raises(ValueError, match="cu_seqlens: expected offsets"):
            ssd(**inputs, cu_seqlens=torch.tensor(offsets))


def test_an_absent_backend_says_why(scan_inputs):
    inputs = scan_inputs(1, 5)
    inputs.pop("cotangent")
    if torch.cuda.is_available():
        pytest.skip("Triton can run here")
    with pytest.raises(BackendUnavailable, match="triton' cannot run here"):
        ssd(**inputs, backend="triton")


@pytest.mark.parametrize("skip", ["x", "dt_x"])
@pytest.mark.parametrize("wide_skip", [False, True])
def test_views_and_gradients_of_any_layout_on_a_cpu(scan_inputs, skip, wide_skip):
    inputs = scan_inputs(3, 20, heads=4, groups=2, dtype=torch.float64)
    cotangent = inputs.pop("cotangent").transpose(-1, -2).contiguous().transpose(-1, -2)
    if wide_skip:
        inputs["D"] = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outcomes = []
    for backend in ("reference", "torch"):
        leaves = {k: t.detach().clone().requires_grad_() for k, t in inputs.items()}
        joined = torch.cat([leaves[k].flatten(2) for k in ("x", "B", "C")], -1)
        x, B, C = (t.unflatten(-1, (-1, 16)) for t in joined.split([64, 32, 32], -1))
        y = ssd(**leaves | {"x": x, "B": B, "C": C}, skip=skip, backend=backend)
        outcomes.append([y, *torch.autograd.grad(y, list(leaves.values()), cotangent)])
    for expected, got in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected)
