"""Stages of the time streams as operators of torch, with shapes for tracing and gradients.

The kernels are imported when one runs. Letters as in `fused`.
"""

from __future__ import annotations

from typing import Any

import torch

from mmm4rec_kernels.operators import dispatched


@dispatched("mmm4rec_kernels::stream_stage")
def stage(
    stream: torch.Tensor,
    parameters: list[torch.Tensor],
    gate: list[torch.Tensor],
    seed: torch.Tensor | None,
    p: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Factor [N, T, H]; with a gate, the next stream [N, H, T] (else empty); what backward needs [4 or 5, N, H, T]."""
    from mmm4rec_kernels.streams import fused

    return fused.stage(stream, parameters, gate, seed, p, eps)


@stage.register_fake
def _stage_shapes(
    stream: torch.Tensor, parameters: list[torch.Tensor], gate: list[torch.Tensor], *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, heads, places = stream.shape
    w = stream.new_empty(rows, places, heads, dtype=torch.float32)
    following = w.new_empty(rows, heads, places) if gate else w.new_empty(0)
    return w, following, w.new_empty(5 if gate else 4, rows, heads, places)


@dispatched("mmm4rec_kernels::stream_stage_backward")
def stage_backward(
    d_w: torch.Tensor | None,
    d_next: torch.Tensor | None,
    stream: torch.Tensor,
    parameters: list[torch.Tensor],
    gate: list[torch.Tensor],
    seed: torch.Tensor | None,
    kept: torch.Tensor,
    p: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the stream [N, H, T], and of all parameters, one behind the other."""
    from mmm4rec_kernels.streams import fused

    d_next = d_next if d_next is None else d_next.contiguous()
    return fused.stage_gradients(d_w, d_next, stream, parameters, gate, seed, kept, p, eps)


@stage_backward.register_fake
def _stage_backward_shapes(
    d_w: torch.Tensor | None,
    d_next: torch.Tensor | None,
    stream: torch.Tensor,
    parameters: list[torch.Tensor],
    gate: list[torch.Tensor],
    *arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    size = sum(t.numel() for t in [*parameters, *(gate if d_next is not None else [])])
    return stream.new_empty(stream.shape, dtype=torch.float32), stream.new_empty(size, dtype=torch.float32)


def _save_stage(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    stream, parameters, gate, seed, ctx.p, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.gates = len(gate)
    ctx.mark_non_differentiable(*(output[2:] if gate else output[1:]))
    ctx.save_for_backward(stream, seed, output[2], *parameters, *gate)


def _backward_stage(
    ctx: Any, d_w: torch.Tensor | None, d_next: torch.Tensor | None, _: torch.Tensor | None
) -> tuple[Any, ...]:
    stream, seed, kept, *given = ctx.saved_tensors
    parameters, gate = given[:8], given[8:]
    if d_w is None and d_next is None:
        return None, [None] * 8, [None] * ctx.gates, None, None, None
    d_stream, flat = stage_backward(d_w, d_next, stream, parameters, gate, seed, kept, ctx.p, ctx.eps)
    w1, b1, w2, b2, c1, d1, c2, d2 = parameters
    order = [w1, w2, b1, b2, c1, d1, c2, d2, *(gate if d_next is not None else [])]
    parts = torch.split(flat, [t.numel() for t in order])
    # Taps and biases come head by head behind each other, all heads of one tap together.
    g_w1, g_w2, g_b1, g_b2, g_c1, g_d1, g_c2, g_d2, *g_gate = (
        (part.view(t.shape[::-1]).T if t is c1 or t is c2 else part.view(t.shape)).to(t.dtype)
        for part, t in zip(parts, order, strict=True)
    )
    gates = g_gate if d_next is not None else [None] * ctx.gates
    return d_stream.to(stream.dtype), [g_w1, g_b1, g_w2, g_b2, g_c1, g_d1, g_c2, g_d2], gates, None, None, None


stage.register_autograd(_backward_stage, setup_context=_save_stage)


@dispatched("mmm4rec_kernels::spectral_filter")
def spectral(image: torch.Tensor, text: torch.Tensor | None, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The joint stream [..., T], and what backward needs [2, 4, N, F]."""
    from mmm4rec_kernels.streams import fused

    return fused.spectral(image, text, maps)


@spectral.register_fake
def _spectral_shapes(
    image: torch.Tensor, text: torch.Tensor | None, maps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    out = image.new_empty(image.shape, dtype=torch.float32)
    places = image.shape[-1]
    return out, out.new_empty(2, 4, image.numel() // places, places // 2 + 1)


@dispatched("mmm4rec_kernels::spectral_filter_backward")
def spectral_backward(grad: torch.Tensor, kept: torch.Tensor, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of both streams [2, ..., T], and of the maps."""
    from mmm4rec_kernels.streams import fused

    return fused.spectral_gradients(grad, kept, maps)


@spectral_backward.register_fake
def _spectral_backward_shapes(
    grad: torch.Tensor, kept: torch.Tensor, maps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    d_streams = grad.new_empty(2, *grad.shape, dtype=torch.float32)
    return d_streams, maps.new_empty(maps.shape, dtype=torch.float32)


def _save_spectral(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    image, text, maps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.dtypes = image.dtype, None if text is None else text.dtype
    ctx.save_for_backward(output[1], maps)


def _backward_spectral(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    kept, maps = ctx.saved_tensors
    d_streams, d_maps = spectral_backward(grad, kept, maps)
    dtype, other = ctx.dtypes
    if other is None:
        return d_streams.sum(0).to(dtype), None, d_maps.to(maps.dtype)
    return d_streams[0].to(dtype), d_streams[1].to(other), d_maps.to(maps.dtype)


spectral.register_autograd(_backward_spectral, setup_context=_save_spectral)
