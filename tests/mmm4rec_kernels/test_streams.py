"""Stages of time streams: the torch form against float64, and the kernels in the interpreter or on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmm4rec_kernels import BackendUnavailable, ComplexMap, StreamGate, StreamMaps, spectral_filter, stream_stage
from mmm4rec_kernels.streams import MAX_PLACES, ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BY_KERNEL = INTERPRETED or torch.cuda.is_available()
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
BACKEND = "triton" if BY_KERNEL else "torch"
by_kernel = pytest.mark.skipif(not BY_KERNEL, reason="runs in test_the_kernels_interpreted, and on a GPU")


def draws(*shapes: tuple[int, ...], scale: float = 1.0, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).to(DEVICE) for shape in shapes]


def stage_inputs(streams: int, users: int, heads: int, places: int, gates: int, taps: int = 4) -> list[torch.Tensor]:
    square = (places, places)
    stream = draws((streams, users, heads, places), seed=places)
    maps = draws(square, (places,), square, (places,), scale=0.5, seed=1)
    convs = draws((heads, taps), (heads,), (heads, taps), (heads,), scale=0.5, seed=2)
    gate = draws((gates, places), (gates,), (places,), (places,), seed=3) if gates else []
    return [*stream, *maps, *convs, *gate]


def stage(given: list[torch.Tensor], **options: object) -> tuple[torch.Tensor, torch.Tensor | None]:
    gate = StreamGate(*given[9:], eps=1e-12) if len(given) > 9 else None
    kernel = BACKEND if given[0].dtype == torch.float32 and given[0].shape[-1] <= MAX_PLACES else "torch"
    return stream_stage(given[0], StreamMaps(*given[1:9]), gate, **{"backend": kernel, **options})


def gradients(outputs, given):
    generator = torch.Generator().manual_seed(5)
    total = 0.0
    for out in outputs:
        if out is not None:
            total = total + (out * torch.randn(out.shape, generator=generator).to(out)).sum()
    return torch.autograd.grad(total, given)


def close(got, want, tolerance=1e-5):
    assert float((got.detach().double() - want.detach()).norm() / want.detach().norm()) < tolerance


@pytest.mark.parametrize(
    ("streams", "users", "heads", "places", "gates"),
    [(1, 3, 2, 5, 0), (2, 35, 2, 20, 1), (1, 70, 3, 17, 17), (2, 2, 1, 32, 32), (1, 4, 2, 40, 1)],
)
def test_a_stage_and_its_gradients(streams, users, heads, places, gates):
    given = [t.requires_grad_() for t in stage_inputs(streams, users, heads, places, gates)]
    double = [t.detach().double().requires_grad_() for t in given]
    got, want = stage(given), stage(double)
    for out, right in zip(got, want, strict=True):
        assert (out is None) == (right is None) == (gates == 0 and right is want[1])
        if out is not None:
            assert out.shape == right.shape
            close(out, right)
    for name, (out, right) in enumerate(zip(gradients(got, given), gradients(want, double), strict=True)):
        assert out.shape == right.shape
        assert float((out.double() - right).norm() / right.norm()) < 1e-4, name


def test_a_stream_shared_by_the_heads_is_read_in_place():
    given = stage_inputs(2, 5, 3, 20, 1)
    shared = given[0][:, :, :1].detach().requires_grad_()
    wide = shared.detach().expand(-1, -1, 3, -1).contiguous().requires_grad_()
    one, other = (stage([t, *given[1:]]) for t in (shared.expand(-1, -1, 3, -1), wide))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)
    (got,), (want,) = gradients(one, [shared]), gradients(other, [wide])
    torch.testing.assert_close(got, want.sum(2, keepdim=True), rtol=1e-4, atol=1e-4)


def test_only_one_result_may_be_used():
    given = [t.requires_grad_() for t in stage_inputs(1, 4, 2, 20, 1)]
    double = [t.detach().double().requires_grad_() for t in given]
    for which in (0, 1):
        got = torch.autograd.grad(stage(given)[which].square().sum(), given, allow_unused=True)
        want = torch.autograd.grad(stage(double)[which].square().sum(), double, allow_unused=True)
        for out, right in zip(got, want, strict=True):
            assert (right is None) <= (out is None or not out.any())
            if right is not None:
                close(out, right, 1e-4)


def test_dropout_acts_before_both_maps_and_nowhere_else():
    given = stage_inputs(2, 40, 2, 20, 1)
    still = stage(given)
    torch.manual_seed(1)
    first, second = (stage(given, p=0.4, training=True) for _ in range(2))
    for i in range(2):
        torch.testing.assert_close(stage(given, p=0.4)[i], still[i])
        assert not torch.equal(first[i], second[i])
    calm = [*given]
    calm[1], calm[9] = torch.zeros_like(given[1]), torch.zeros_like(given[9])
    for a, b in zip(stage(calm, p=0.4, training=True), stage(calm), strict=True):
        torch.testing.assert_close(a, b)


@by_kernel
def test_the_gradient_of_a_stage_sees_the_same_dropout():
    given = stage_inputs(1, 6, 2, 8, 1)
    seed = torch.tensor([11], device=DEVICE)
    rows = given[0][0].double().requires_grad_()
    size = rows.numel()

    def value(stream):
        w, following, _ = ops.stage(stream.float(), given[1:9], given[9:], seed, 0.5, 1e-12)
        return (w.double() * weights[0]).sum() + (following.double() * weights[1]).sum()

    weights = [torch.randn(6, 8, 2).to(rows), torch.randn(6, 2, 8).to(rows)]
    (got,) = torch.autograd.grad(value(rows), rows)
    change = torch.randn_like(rows)
    step = 1e-2
    with torch.no_grad():
        slope = (value(rows + step * change) - value(rows - step * change)) / (2 * step)
    assert size
    assert float(slope) == pytest.approx(float((got * change).sum()), rel=2e-2, abs=2e-2)


def filter_inputs(streams: int, users: int, heads: int, places: int) -> list[torch.Tensor]:
    bins = places // 2 + 1
    maps = [draws((bins, bins), (bins, bins), (bins,), (bins,), scale=0.4, seed=i) for i in range(3)]
    return [*draws((streams, users, heads, places), seed=9), *(t for part in maps for t in part)]


def filtered(given: list[torch.Tensor]) -> torch.Tensor:
    kernel = BACKEND if given[0].dtype == torch.float32 and given[0].shape[-1] <= MAX_PLACES else "torch"
    return spectral_filter(given[0], *(ComplexMap(*given[i : i + 4]) for i in (1, 5, 9)), backend=kernel)


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize(("users", "heads", "places"), [(3, 2, 5), (40, 2, 20), (3, 3, 17), (2, 1, 32), (2, 2, 41)])
def test_the_filter_and_its_gradients(streams, users, heads, places):
    given = [t.requires_grad_() for t in filter_inputs(streams, users, heads, places)]
    double = [t.detach().double().requires_grad_() for t in given]
    got, want = filtered(given), filtered(double)
    assert got.shape == want.shape == (users, heads, places)
    close(got, want)
    for name, (out, right) in enumerate(zip(gradients([got], given), gradients([want], double), strict=True)):
        assert float((out.double() - right).norm() / right.norm()) < 1e-4, name


def test_a_backend_that_cannot_take_a_call_says_so():
    given = stage_inputs(1, 2, 2, 40, 0)
    with pytest.raises(BackendUnavailable, match="got 40" if BY_KERNEL else "triton"):
        stage(given, backend="triton")
    with pytest.raises(ValueError, match="expected auto, torch or triton"):
        stage(given, backend="cuda")


@by_kernel
def test_operators_are_well_formed_and_repeat():
    given = stage_inputs(1, 70, 2, 20, 1)
    rows = given[0][0].requires_grad_()
    arguments = (rows, given[1:9], given[9:], torch.tensor([3], device=DEVICE), 0.4, 1e-12)
    torch.library.opcheck(ops.stage.overload, arguments, test_utils=["test_schema", "test_faketensor"])
    maps = torch.randn(6 * (11 * 11 + 11), device=DEVICE)
    torch.library.opcheck(ops.spectral.overload, (rows, None, maps), test_utils=["test_schema", "test_faketensor"])
    up = torch.randn(70, 20, 2, device=DEVICE)
    kept = ops.stage(*arguments)[2]
    options = (*arguments[1:4], kept, *arguments[4:])
    one, two = (ops.stage_backward(up, rows.detach(), rows, *options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.skipif(BY_KERNEL, reason="the kernels run here without it")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_kernels_interpreted():
    pytest.importorskip("triton")
    here = Path(__file__)
    paths = [str(here.parents[2] / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert " 1 skipped" in result.stdout.splitlines()[-1]


def test_the_filter_takes_what_autocast_gives():
    given = filter_inputs(2, 3, 2, 20)
    maps = [ComplexMap(*given[i : i + 4]) for i in (1, 5, 9)]
    want = spectral_filter(given[0].float(), *maps, backend="torch")
    with torch.autocast(DEVICE, torch.bfloat16):
        got = spectral_filter(given[0].bfloat16(), *maps, backend="torch")
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
