"""The convolution as operators of torch, with shapes for tracing and a gradient.

The kernels are imported when one runs.
"""

from __future__ import annotations

from typing import Any

import torch

from mmm4rec_kernels.operators import operator


@operator("mmm4rec_kernels::causal_conv1d")
def conv_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    silu: bool,
) -> torch.Tensor:
    """Result [B, L, C]; arguments as in `fused.forward`."""
    from mmm4rec_kernels.conv1d import fused

    return fused.forward(x, weight, bias, ends, packed, longest, silu)


@conv_forward.register_fake
def _forward_shape(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


@operator("mmm4rec_kernels::causal_conv1d_backward")
def conv_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of x, and of taps and bias one behind the other."""
    from mmm4rec_kernels.conv1d import fused

    return fused.backward(grad, x, weight, bias, ends, packed, longest, silu)


@conv_backward.register_fake
def _backward_shapes(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(weight.numel() + weight.shape[0], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.options = inputs[4:]
    ctx.save_for_backward(*inputs[:4])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias, ends = ctx.saved_tensors
    d_x, flat = conv_backward(grad, x, weight, bias, ends, *ctx.options)
    d_weight = flat[: weight.numel()].view(weight.shape).to(weight.dtype)
    d_bias = None if bias is None else flat[weight.numel() :].to(bias.dtype)
    return d_x, d_weight, d_bias, None, None, None, None


conv_forward.register_autograd(_backward, setup_context=_save)
