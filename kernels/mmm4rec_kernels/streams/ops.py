"""Stages of the time streams as operators of torch, with shapes for tracing and gradients.

The kernels are imported when one runs. Letters as in `fused`.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.library.custom_op("mmm4rec_kernels::stream_stage", mutates_args=())
def stage(
    stream: torch.Tensor,
    parameters: list[torch.Tensor],
    gate: list[torch.Tensor],
    seed: torch.Tensor | None,
    p: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor [N, T, H] and, with a gate, the next stream [N, H, T] (else empty)."""
    from mmm4rec_kernels.streams import fused

    return fused.stage(stream, parameters, gate, seed, p, eps)


@stage.register_fake
def _stage_shapes(
    stream: torch.Tensor, parameters: list[torch.Tensor], gate: list[torch.Tensor], *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, places = stream.shape
    w = stream.new_empty(rows, places, heads, dtype=torch.float32)
    return w, w.new_empty(rows, heads, places) if gate else w.new_empty(0)


@torch.library.custom_op("mmm4rec_kernels::stream_stage_backward", mutates_args=())
def stage_backward(
    d_w: torch.Tensor | None,
    d_next: torch.Tensor | None,
    stream: torch.Tensor,
    parameters: list[torch.Tensor],
    gate: list[torch.Tensor],
    seed: torch.Tensor | None,
    p: float,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the stream [N, H, T], and of all parameters, one behind the other."""
    from mmm4rec_kernels.streams import fused

    d_next = d_next if d_next is None else d_next.contiguous()
    return fused.stage_gradients(d_w, d_next, stream, parameters, gate, seed, p, eps)


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


def _save_stage(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    stream, parameters, gate, seed, ctx.p, ctx.eps = inputs
    ctx.set_materialize_grads(False)
    ctx.gates = len(gate)
    if not gate:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(stream, seed, *parameters, *gate)


def _backward_stage(ctx: Any, d_w: torch.Tensor | None, d_next: torch.Tensor | None) -> tuple[Any, ...]:
    stream, seed, *given = ctx.saved_tensors
    parameters, gate = given[:8], given[8:]
    if d_w is None and d_next is None:
        return None, [None] * 8, [None] * ctx.gates, None, None, None
    d_stream, flat = stage_backward(d_w, d_next, stream, parameters, gate, seed, ctx.p, ctx.eps)
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


@torch.library.custom_op("mmm4rec_kernels::spectral_filter", mutates_args=())
def spectral(image: torch.Tensor, text: torch.Tensor | None, maps: torch.Tensor) -> torch.Tensor:
    """The joint stream [..., T]."""
    from mmm4rec_kernels.streams import fused

    return fused.spectral(image, text, maps)


@spectral.register_fake
def _spectral_shape(image: torch.Tensor, text: torch.Tensor | None, maps: torch.Tensor) -> torch.Tensor:
    return image.new_empty(image.shape, dtype=torch.float32)


@torch.library.custom_op("mmm4rec_kernels::spectral_filter_backward", mutates_args=())
def spectral_backward(
    grad: torch.Tensor, image: torch.Tensor, text: torch.Tensor | None, maps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of both streams (the second empty if there is one) and of the maps."""
    from mmm4rec_kernels.streams import fused

    return fused.spectral_gradients(grad, image, text, maps)


@spectral_backward.register_fake
def _spectral_backward_shapes(
    grad: torch.Tensor, image: torch.Tensor, text: torch.Tensor | None, maps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    d_image = image.new_empty(image.shape, dtype=torch.float32)
    d_text = d_image.new_empty(0 if text is None else text.shape)
    return d_image, d_text, maps.new_empty(maps.shape, dtype=torch.float32)


def _save_spectral(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_spectral(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    image, text, maps = ctx.saved_tensors
    d_image, d_text, d_maps = spectral_backward(grad, image, text, maps)
    return d_image.to(image.dtype), None if text is None else d_text.to(text.dtype), d_maps.to(maps.dtype)


spectral.register_autograd(_backward_spectral, setup_context=_save_spectral)
