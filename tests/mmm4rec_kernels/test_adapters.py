"""Kernels of other projects behind our functions: looked for, refused, and called so that they mean the same.

What needs no GPU is tried against stand-ins for the packages, written after their documentation; the packages
themselves are compared with the recurrence where they are (marker `gpu`).
Letters: B sequences, L places, H heads, P head dim, G groups, N state, C channels, K taps.
"""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from mmm4rec_kernels import BackendUnavailable, backend, causal_conv1d, selective_scan, ssd
from mmm4rec_kernels.agreement import disagreement

TF32, BFLOAT16 = 2e-2, 4e-2
"""What one-pass TF32 products, and bfloat16 states, may lose more than the recurrence."""

SCAN = """
import torch
calls = []
def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None,
                              seq_idx=None, cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")),
                              return_final_states=False, return_varlen_states=False):
    calls.append(dict(chunk_size=chunk_size, seq_idx=seq_idx))
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = torch.nn.functional.softplus(dt)
    dt = dt.clamp(*dt_limit)
    repeat = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(repeat, 2) for t in (B, C))
    state = x.new_zeros(*x[:, 0].shape, B.shape[3]) if initial_states is None else initial_states
    out = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t and seq_idx[0, t] != seq_idx[0, t - 1]:
            state = torch.zeros_like(state)
        state = (dt[:, t] * A).clamp(max=0).exp()[..., None, None] * state
        state = state + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        y = (state * C[:, t, :, None]).sum(-1)
        out.append(y if D is None else y + (D[:, None] if D.dim() == 1 else D) * x[:, t])
    y = torch.stack(out, 1)
    return (y, state) if return_final_states else y
"""
SELECTIVE = """
import torch
def selective_scan_fn(u, delta, A, B, C, D):
    state, out = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        decay = (delta[..., t, None] * A).exp()
        state = decay * state + (delta[..., t] * u[..., t])[..., None] * B[:, None, :, t]
        out.append((state * C[:, None, :, t]).sum(-1) + D * u[..., t])
    return torch.stack(out, -1)
"""
CONV = """
import torch
calls = []
class Checked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.view_as(y)
    @staticmethod
    def backward(ctx, grad):
        assert grad.stride(1) == 1 and grad.stride(0) % 8 == 0 and grad.stride(2) % 8 == 0
        return grad
def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
                     final_states_out=None, activation=None):
    assert x.stride(1) == 1 and x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
    assert x.data_ptr() % 16 == 0 and (bias is None or bias.dtype == weight.dtype)
    calls.append(x)
    taps, length = weight.shape[1], x.shape[2]
    y = torch.zeros_like(x) if bias is None else bias[:, None].expand_as(x)
    for back in range(min(taps, length)):
        moved = torch.nn.functional.pad(x, (back, 0))[..., :length]
        if seq_idx is not None:
            same = torch.nn.functional.pad(seq_idx, (back, 0), value=-1)[:, :length] == seq_idx
            moved = moved * same[:, None]
        y = y + weight[:, taps - 1 - back, None] * moved
    return Checked.apply((torch.nn.functional.silu(y) if activation == "silu" else y).to(x.dtype))
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Puts packages on the import path, and takes them away again."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    backend._version.cache_clear()

    def write(files: dict[str, str], distribution: str = "") -> None:
        for name, source in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        if distribution:
            about = tmp_path / f"{distribution.replace('-', '_')}-9.1.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 9.1\n")
        importlib.invalidate_caches()
        backend._version.cache_clear()

    yield write
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in backend.OTHERS:
            del sys.modules[name]
    backend._failed.clear()
    backend._version.cache_clear()


@pytest.fixture
def mamba(place):
    place(
        {
            "mamba_ssm/__init__.py": "",
            "mamba_ssm/ops/triton/ssd_combined.py": SCAN,
            "mamba_ssm/ops/selective_scan_interface.py": SELECTIVE,
            "selective_scan_cuda.py": "",
        },
        "mamba-ssm",
    )


@pytest.fixture
def conv(place):
    place({"causal_conv1d/__init__.py": CONV, "causal_conv1d_cuda.py": ""}, "causal-conv1d")


@pytest.fixture
def with_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")


def lay_out(place, package, source=None, extension=True):
    distribution, compiled = backend.OTHERS[package]
    source = source or "raise RuntimeError('nobody may import me to ask for me')"
    place({f"{package}/__init__.py": source} | ({f"{compiled}.py": ""} if extension else {}), distribution)


@pytest.mark.parametrize("package", list(backend.OTHERS))
class TestProbing:
    def test_an_absent_package_says_how_to_have_it(self, monkeypatch, package):
        monkeypatch.setattr(backend, "_version", lambda *_: None)
        state = backend.availability(package)
        assert not state.available
        assert state.why.endswith(
            "is not installed (pip install --no-build-isolation 'mmm4rec[cuda]', which compiles it)"
        )

    def test_a_package_without_its_compiled_part_is_not_taken(self, place, with_gpu, monkeypatch, package):
        monkeypatch.setitem(backend.OTHERS, package, (backend.OTHERS[package][0], "not_compiled"))
        lay_out(place, package, extension=False)
        assert "9.1 lies here without its compiled not_compiled" in backend.availability(package).why
        assert package not in sys.modules

    def test_without_a_gpu_it_is_not_taken(self, place, monkeypatch, package):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        lay_out(place, package)
        assert backend.availability(package).why.endswith("9.1 is installed, but torch sees no CUDA device")

    def test_what_looks_whole_is_taken_without_importing_it(self, place, with_gpu, package):
        lay_out(place, package)
        assert backend.availability(package).available
        assert package not in sys.modules

    def test_a_failed_import_is_said_in_one_line_and_kept(self, place, with_gpu, package):
        lay_out(place, package, "raise ImportError('undefined symbol: _ZN3c10\\nand much more')")
        with pytest.raises(BackendUnavailable) as caught:
            backend.load(package, package)
        assert str(caught.value).endswith("failed: undefined symbol: _ZN3c10")
        state = backend.availability(package)
        assert not state.available
        assert "undefined symbol" in state.why
        assert "\n" not in state.why

    def test_auto_leaves_it_alone(self, place, with_gpu, package):
        lay_out(place, package)
        operation = next(name for name, backends in backend.OPERATIONS.items() if package in backends)
        assert backend.choose(operation, "auto", torch.ones(1)) == "torch"


def test_an_explicit_backend_that_cannot_run_says_why(scan_inputs, monkeypatch):
    inputs = scan_inputs(1, 3)
    inputs.pop("cotangent")
    monkeypatch.setattr(backend, "_version", lambda *_: None)
    with pytest.raises(BackendUnavailable, match=r"ssd: .*cannot run here: mamba-ssm is not installed"):
        ssd(**inputs, backend="mamba_ssm")
    with pytest.raises(BackendUnavailable, match=r"causal_conv1d: .*cannot run here: causal-conv1d is not installed"):
        causal_conv1d(torch.ones(1, 3, 8), torch.ones(8, 4), backend="causal_conv1d")


@pytest.mark.usefixtures("with_gpu")
def test_tensors_elsewhere_are_refused(scan_inputs, mamba, conv):
    inputs = scan_inputs(1, 3)
    inputs.pop("cotangent")
    with pytest.raises(BackendUnavailable, match="ssd: backend 'mamba_ssm' needs CUDA tensors, got cpu"):
        ssd(**inputs, backend="mamba_ssm")
    with pytest.raises(BackendUnavailable, match="causal_conv1d' needs CUDA tensors, got cpu"):
        causal_conv1d(torch.ones(1, 3, 8), torch.ones(8, 4), backend="causal_conv1d")


@pytest.fixture
def anywhere(monkeypatch):
    """Lets an explicit backend take CPU tensors, for the stand-ins."""
    for module in ("ssd", "conv1d", "selective"):
        package = importlib.import_module(f"mmm4rec_kernels.{module}")
        monkeypatch.setattr(package, "choose", lambda operation, backend, *_, **__: backend)


def compare(run, function, inputs, theirs, floor=1e-5, **options):
    if not options.get("dt_softplus", True):
        inputs = inputs | {k: inputs[k].abs() for k in ("dt", "dt_bias")}
    truth = run(function, inputs, torch.float64, backend="reference", **options)
    yardstick = run(function, inputs, backend="reference", **options)
    assert not disagreement(run(function, inputs, backend=theirs, **options), truth, yardstick, floor)


SCANS = {
    "raw skip": {},
    "skip times step": {"skip": "dt_x"},
    "no softplus": {"dt_softplus": False},
    "limits": {"dt_limit": (0.02, 0.3)},
    "padded": {"lengths": torch.tensor([5, 0, 9])},
    "padded, skip times step, limits": {"lengths": torch.tensor([5, 1, 9]), "skip": "dt_x", "dt_limit": (0.02, 0.3)},
}


@pytest.mark.parametrize("case", SCANS)
def test_the_scan_means_the_same_with_every_option(scan_inputs, run, mamba, anywhere, case):
    options = SCANS[case]
    compare(run, ssd, scan_inputs(3, 9, heads=4, width=6, groups=2, state=5), "mamba_ssm", **options)


def test_the_scan_of_mamba_1_means_the_same(mamba, anywhere):
    torch.manual_seed(0)
    x, dt, B, C = (torch.randn(2, 7, width) for width in (6, 6, 5, 5))
    inputs = (x, dt.exp(), -torch.rand(6, 5), B, C, torch.randn(6))
    theirs, ours = (selective_scan(*inputs, backend=name) for name in ("mamba_ssm", "reference"))
    torch.testing.assert_close(theirs, ours)


def test_padding_reaches_nothing_in_the_scan(scan_inputs, run, mamba, anywhere):
    inputs, lengths = scan_inputs(3, 9), torch.tensor([5, 1, 9])
    clean = run(ssd, inputs, lengths=lengths, backend="mamba_ssm")
    for k in ("x", "dt", "B", "C"):
        inputs[k][0, 5:] = torch.nan
    dirty = run(ssd, inputs, lengths=lengths, backend="mamba_ssm")
    assert all(torch.equal(clean[k], dirty[k]) for k in clean)


def test_packed_sequences_are_numbered_for_the_scan(scan_inputs, run, mamba, anywhere):
    offsets = torch.tensor([0, 3, 3, 4, 9])
    compare(run, ssd, scan_inputs(1, 9), "mamba_ssm", cu_seqlens=offsets)
    (call, *_) = sys.modules["mamba_ssm.ops.triton.ssd_combined"].calls
    assert call["seq_idx"].tolist() == [[0, 0, 0, 2, 3, 3, 3, 3, 3]]
    assert call["seq_idx"].dtype == torch.int32


def test_states_pass_through_the_scan(scan_inputs, mamba, anywhere):
    inputs = scan_inputs(3, 9)
    inputs.pop("cotangent")
    states = torch.randn(3, 4, 16, 16)
    options = {"initial_states": states, "return_final_states": True, "lengths": torch.tensor([5, 0, 9])}
    for got, expected in zip(
        ssd(**inputs, **options, backend="mamba_ssm"), ssd(**inputs, **options, backend="torch"), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    offsets = torch.tensor([0, 9])
    one = {k: t[:1] if k in ("x", "dt", "B", "C") else t for k, t in inputs.items()}
    with pytest.raises(BackendUnavailable, match="cannot take this call: packed sequences with states"):
        ssd(**one, cu_seqlens=offsets, return_final_states=True, backend="mamba_ssm")


@pytest.mark.parametrize("length", [1, 20, 31, 4096])
def test_chunks_are_powers_of_two(length):
    from mmm4rec_kernels.ssd.adapter import chunk_size

    size = chunk_size(length)
    assert size & (size - 1) == 0
    assert size >= min(length, 32)


CONVOLUTIONS = {
    "plain": {},
    "silu": {"activation": "silu"},
    "padded": {"lengths": torch.tensor([5, 0, 9])},
    "packed": {"cu_seqlens": torch.tensor([0, 3, 3, 4, 9]), "activation": "silu"},
}


def convolution_inputs(batch, length, channels, taps=4, bias=True, device="cpu", dtype=torch.float32):
    """A view of wider rows, as the model has it, whose strides are not those of the channels."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    inputs = {"x_BLC": normal(batch, length, channels + 12).to(dtype)[..., 3 : channels + 3]}
    inputs |= {"weight_CK": normal(channels, taps), "cotangent": normal(batch, length, channels).to(dtype)}
    return inputs | ({"bias": normal(channels)} if bias else {})


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_the_convolution_means_the_same_with_every_option(run, conv, anywhere, case, taps):
    inputs = convolution_inputs(1 if case == "packed" else 3, 9, 16, taps, bias=taps != 3)
    compare(run, causal_conv1d, inputs, "causal_conv1d", **CONVOLUTIONS[case])


def test_padding_reaches_nothing_in_the_convolution(run, conv, anywhere):
    inputs, lengths = convolution_inputs(3, 9, 8), torch.tensor([5, 1, 9])
    clean = run(causal_conv1d, inputs, lengths=lengths, backend="causal_conv1d")
    inputs["x_BLC"][0, 5:] = torch.nan
    dirty = run(causal_conv1d, inputs, lengths=lengths, backend="causal_conv1d")
    assert all(torch.equal(clean[k], dirty[k]) for k in clean)


def test_columns_that_fit_are_not_copied(conv, anywhere):
    wide = torch.randn(2, 5, 32)
    causal_conv1d(wide[..., 8:24], torch.randn(16, 4), backend="causal_conv1d")
    assert sys.modules["causal_conv1d"].calls[0].data_ptr() == wide[..., 8:].data_ptr()


def test_gradients_of_any_layout_reach_the_convolution(conv, anywhere):
    x = torch.randn(2, 5, 8, requires_grad=True)
    y = causal_conv1d(x, torch.randn(8, 4), backend="causal_conv1d")
    torch.cat([y, torch.ones(2, 5, 3)], -1).square().sum().backward()
    assert x.grad.isfinite().all()


def test_odd_channels_are_refused(conv, anywhere):
    with pytest.raises(BackendUnavailable, match="cannot take this call: 12 channels, no multiple of 8"):
        causal_conv1d(torch.ones(1, 3, 12), torch.ones(12, 4), backend="causal_conv1d")


needs_mamba = pytest.mark.skipif(not backend.availability("mamba_ssm").available, reason="needs a GPU and mamba-ssm")
needs_conv = pytest.mark.skipif(
    not backend.availability("causal_conv1d").available, reason="needs a GPU and causal-conv1d"
)


@pytest.mark.gpu
@needs_mamba
@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 20, 31, 33, 63, 64, 65, 200, 257, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mamba_ssm_agrees_with_the_recurrence(scan_inputs, run, length, dtype):
    inputs = scan_inputs(3, length, heads=8, width=64, groups=8, state=64, dtype=dtype, device="cuda", seed=length)
    floor = TF32 if dtype == torch.float32 else BFLOAT16
    compare(run, ssd, inputs, "mamba_ssm", floor, skip="dt_x" if length % 2 else "x")


@pytest.mark.gpu
@needs_mamba
@pytest.mark.parametrize("case", SCANS)
def test_mamba_ssm_takes_every_option(scan_inputs, run, case):
    options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in SCANS[case].items()}
    inputs = scan_inputs(3, 9, heads=4, width=32, groups=2, state=32, device="cuda")
    compare(run, ssd, inputs, "mamba_ssm", TF32, **options)


@pytest.mark.gpu
@needs_mamba
def test_mamba_ssm_takes_packed_sequences(scan_inputs, run):
    inputs = scan_inputs(1, 300, heads=4, width=64, groups=4, state=64, device="cuda")
    offsets = torch.tensor([0, 3, 3, 20, 84, 85, 290, 300], device="cuda")
    compare(run, ssd, inputs, "mamba_ssm", TF32, cu_seqlens=offsets)


@pytest.mark.gpu
@needs_conv
@pytest.mark.parametrize("length", [1, 2, 3, 4, 20, 65, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_the_package_causal_conv1d_agrees_with_the_definition(run, length, dtype, taps):
    inputs = convolution_inputs(3, length, 48, taps, bias=taps != 3, device="cuda", dtype=dtype)
    floor = 1e-5 if dtype == torch.float32 else BFLOAT16
    compare(run, causal_conv1d, inputs, "causal_conv1d", floor, activation="silu" if taps > 2 else None)


@pytest.mark.gpu
@needs_conv
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_the_package_causal_conv1d_takes_every_option(run, case):
    options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in CONVOLUTIONS[case].items()}
    inputs = convolution_inputs(1 if case == "packed" else 3, 9, 16, device="cuda")
    compare(run, causal_conv1d, inputs, "causal_conv1d", **options)
