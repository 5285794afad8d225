"""The gated norm as operators of torch, with shapes for tracing and a gradient.

The kernels are imported when one runs.
"""

from __future__ import annotations

from typing import Any

import torch

from mmm4rec_kernels.operators import operator

MAX_WIDTH = 8192
"""Largest row that the kernels take."""


@operator("mmm4rec_kernels::gated_rms_norm")
def norm_forward(
    y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, before: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result [B, L, E] and 1/rms [B, L]."""
    from mmm4rec_kernels.norm import fused

    return fused.forward(y, z, weight, eps, before)


@norm_forward.register_fake
def _forward_shapes(y: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape[:2], dtype=torch.float32)


@operator("mmm4rec_kernels::gated_rms_norm_backward")
def norm_backward(
    grad: torch.Tensor, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, before: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of y, z and, in float32, the weight."""
    from mmm4rec_kernels.norm import fused

    return fused.backward(grad, y, z, weight, scale, before)


@norm_backward.register_fake
def _backward_shapes(
    grad: torch.Tensor, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return y.new_empty(y.shape), z.new_empty(z.shape), y.new_empty(weight.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.before = inputs[4]
    ctx.save_for_backward(*inputs[:3], output[1])


def _backward(ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    y, z, weight, scale = ctx.saved_tensors
    d_y, d_z, d_weight = norm_backward(grad, y, z, weight, scale, ctx.before)
    return d_y, d_z, d_weight.to(weight.dtype), None, None


norm_forward.register_autograd(_backward, setup_context=_save)
