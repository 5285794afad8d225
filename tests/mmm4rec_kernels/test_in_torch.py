"""The public functions inside what torch does with functions: torch.compile, autocast, CUDA graphs.

On a GPU and in Triton's interpreter (see test_interpreted) the kernels are tried, elsewhere the torch backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from mmm4rec_kernels import (
    CrossProjections,
    causal_conv1d,
    compare_counts,
    gated_rms_norm,
    hardswish_dropout,
    linear,
    lookup,
    residual_norm,
    softmax_cross_entropy,
    ssd,
    ssd_block,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
BACKEND = "triton" if ON_GPU or INTERPRETED else "torch"
H, P, G, N = 2, 16, 1, 16
E, GN, C = H * P, G * N, H * P + 2 * G * N

Case = tuple[Callable[..., torch.Tensor], dict[str, torch.Tensor]]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def scan(batch: int = 2, length: int = 5, dtype: torch.dtype = torch.float32, **options: object) -> Case:
    wide = {k: normal(batch, length, n, 16, dtype=dtype) for k, n in (("x", H), ("B", G), ("C", G))}
    rest = {
        "dt": normal(batch, length, H, dtype=dtype),
        "A": -normal(H).exp(),
        "D": normal(H),
        "dt_bias": normal(H) - 2,
    }
    return lambda **t: ssd(**t, backend=BACKEND, **options), wide | rest


def block(
    batch: int = 2, length: int = 5, dtype: torch.dtype = torch.float32, cross: bool = False, **options: object
) -> Case:
    parameters = {
        "conv_weight_CK": normal(C, 4) / 2,
        "conv_bias_C": normal(C),
        "A_log_H": normal(H),
        "D_H": normal(H),
        "dt_bias_H": normal(H) - 2,
        "norm_weight_E": normal(E),
    }
    fixed = {"n_groups": G, "eps": 1e-5, "backend": BACKEND} | options
    if not cross:
        projected = {"projected": normal(batch, length, 2 * E + 2 * GN + H, dtype=dtype)}
        return lambda projected, **t: ssd_block(projected, **t, **fixed), projected | parameters
    streams = {
        "xBdt": normal(batch, length, E + GN + H, dtype=dtype),
        "z": normal(batch, length, E, dtype=dtype),
        "read": normal(batch, length, GN, dtype=dtype),
    }
    return lambda xBdt, z, read, **t: ssd_block(CrossProjections(xBdt, z, read), **t, **fixed), streams | parameters


def cases(dtype: torch.dtype = torch.float32) -> dict[str, Case]:
    """Inputs in `dtype`, parameters in float32, as autocast has them."""
    taps = {"weight_CK": normal(8, 4), "bias": normal(8)}
    lengths, offsets = torch.tensor([3, 5], device=DEVICE), torch.tensor([0, 2, 5], device=DEVICE)
    packed = {"cu_seqlens": offsets, "max_length": 3}
    target = torch.tensor([1, 4, 0], device=DEVICE)
    fixed = {"backend": BACKEND}
    found = {
        "ssd": scan(dtype=dtype),
        "ssd, long": scan(length=70, dtype=dtype, skip="dt_x"),
        "ssd, padded": scan(dtype=dtype, lengths=lengths),
        "causal_conv1d": (
            lambda **t: causal_conv1d(**t, activation="silu", backend=BACKEND),
            {"x_BLC": normal(2, 5, 8, dtype=dtype), **taps},
        ),
        "gated_rms_norm": (
            lambda **t: gated_rms_norm(**t, eps=1e-5, backend=BACKEND),
            {"y": normal(2, 5, 8, dtype=dtype), "z": normal(2, 5, 8, dtype=dtype), "weight": normal(8)},
        ),
        "ssd_block": block(dtype=dtype),
        "ssd_block, padded": block(dtype=dtype, lengths=lengths),
        "ssd_block, longer": block(length=20, dtype=dtype),
        "ssd_block, cross": block(dtype=dtype, cross=True),
        "softmax_cross_entropy": (
            lambda query, table: softmax_cross_entropy(query, table, target, **fixed),
            {"query": normal(3, 16, dtype=dtype), "table": normal(9, 16, dtype=dtype)},
        ),
        "lookup": (lambda table: lookup(table, target, **fixed), {"table": normal(9, 16)}),
        "compare_counts": (
            lambda score: torch.stack(compare_counts(score, score[:, 2], **fixed)),
            {"score": normal(3, 9)},
        ),
        "residual_norm": (
            lambda x, weight, bias, residual: residual_norm(x, weight, bias, residual=residual),
            {"x": normal(3, 8), "weight": normal(8), "bias": normal(8) + 1, "residual": normal(3, 8) * 2},
        ),
        "hardswish_dropout": (lambda x: hardswish_dropout(x), {"x": normal(3, 8)}),
        "linear": (linear, {"x": normal(3, 8), "weight": normal(4, 8), "bias": normal(4)}),
    }
    if BACKEND == "triton":  # the torch backend unpacks to a shape that only the offsets' values say
        found["ssd, packed"] = scan(1, dtype=dtype, **packed)
        found["ssd_block, packed"] = block(batch=1, dtype=dtype, **packed)
        found["causal_conv1d, packed"] = (
            lambda **t: causal_conv1d(**t, backend=BACKEND, **packed),
            {"x_BLC": normal(1, 5, 8, dtype=dtype), **taps},
        )
    return found


NAMES = [pytest.param(name, marks=[pytest.mark.slow] if ", " in name else []) for name in cases()]


def outcome(
    function: Callable[..., torch.Tensor], tensors: dict[str, torch.Tensor], autocast: bool = False
) -> list[torch.Tensor]:
    """Result and gradients."""
    leaves = {k: t.detach().clone().requires_grad_() for k, t in tensors.items()}
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        y = function(**leaves)
    if not y.requires_grad:
        return [y]
    weights = torch.linspace(-1, 2, y.numel(), device=DEVICE).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), list(leaves.values()))]


# Dynamo itself makes an instance of every autograd.Function that it meets.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_compiles_in_one_graph(name):
    function, tensors = cases()[name]
    torch.compiler.reset()
    backend = "inductor" if ON_GPU and name in ("ssd", "ssd_block") else "aot_eager"
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for got, expected in zip(outcome(compiled, tensors), outcome(function, tensors), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in cases() if name != "linear"])
def test_autocast_leaves_the_arithmetic_as_it_is(name):
    """Inputs of bfloat16 and parameters of float32, as they come out of autocast's own products."""
    function, tensors = cases(torch.bfloat16)[name]
    plain, under = outcome(function, tensors), outcome(function, tensors, autocast=True)
    assert [t.dtype for t in under] == [t.dtype for t in plain]
    assert all(torch.equal(got, expected) for got, expected in zip(under, plain, strict=True))


def test_autocast_narrows_what_torch_narrows():
    function, tensors = cases()["linear"]
    assert outcome(function, tensors, autocast=True)[0].dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", list(cases()))
def test_is_recorded_as_a_cuda_graph(name):
    """Forward and backward, replayed on other numbers than it was recorded with."""
    function, tensors = cases()[name]
    leaves = {k: t.detach().clone().requires_grad_() for k, t in tensors.items()}
    with torch.no_grad():
        weights = torch.linspace(-1, 2, function(**leaves).numel(), device=DEVICE)

    def step() -> list[torch.Tensor]:
        y = function(**leaves)
        if not y.requires_grad:
            return [y]
        return [y.detach(), *torch.autograd.grad((y * weights.view(y.shape)).sum(), list(leaves.values()))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.mul_(0.75)
    graph.replay()
    for got, expected in zip(recorded, step(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
