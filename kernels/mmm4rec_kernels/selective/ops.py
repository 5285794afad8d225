"""The scan of Mamba-1 as operators of torch, with shapes for tracing and a gradient.

The kernels are imported when one runs.
"""

from __future__ import annotations

from typing import Any

import torch

from mmm4rec_kernels.operators import dispatched


@dispatched("mmm4rec_kernels::selective_scan")
def scan_forward(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor
) -> torch.Tensor:
    """Result [B, L, E]; all float32 and contiguous."""
    from mmm4rec_kernels.selective import fused

    return fused.forward(x, dt, A, B, C, D)


@scan_forward.register_fake
def _forward_shape(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


@dispatched("mmm4rec_kernels::selective_scan_backward")
def scan_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, dt, A, B, C and D."""
    from mmm4rec_kernels.selective import fused

    return fused.backward(grad, x, dt, A, B, C, D)


@scan_backward.register_fake
def _backward_shapes(grad: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    gradients: tuple[torch.Tensor, ...] = scan_backward(grad.contiguous(), *ctx.saved_tensors)
    return gradients


scan_forward.register_autograd(_backward, setup_context=_save)
