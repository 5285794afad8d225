"""The scan at the last places of each sequence as operators of torch, with shapes for tracing and gradients.

The kernels are imported when one runs. Letters as in `tail_fused`.
"""

from __future__ import annotations

from typing import Any

import torch

from mmm4rec_kernels.operators import dispatched


@dispatched("mmm4rec_kernels::ssd_block_tail")
def tail_forward(
    xBdt: torch.Tensor,
    shift: torch.Tensor | None,
    C: torch.Tensor,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    ends: torch.Tensor | None,
    lengths: torch.Tensor,
    longest: int,
    skip_dt: bool,
) -> torch.Tensor:
    """The result y [B, J, E] before gate and norm."""
    from mmm4rec_kernels.block import tail_fused

    return tail_fused.forward(xBdt, shift, C, factor, weight, bias, A_log, D, dt_bias, ends, lengths, longest, skip_dt)


@tail_forward.register_fake
def _shapes(
    xBdt: torch.Tensor,
    shift: torch.Tensor | None,
    C: torch.Tensor,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    A_log: torch.Tensor,
    *arguments: Any,
) -> torch.Tensor:
    width = xBdt.shape[-1] - C.shape[2] - A_log.shape[0]
    return xBdt.new_empty(C.shape[0], C.shape[1] - weight.shape[1] + 1, width)


@dispatched("mmm4rec_kernels::ssd_block_tail_backward")
def tail_backward(
    grad: torch.Tensor,
    xBdt: torch.Tensor,
    shift: torch.Tensor | None,
    C: torch.Tensor,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    ends: torch.Tensor | None,
    lengths: torch.Tensor,
    longest: int,
    skip_dt: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of xBdt, C, factor (empty where absent) and of all parameters, one behind the other."""
    from mmm4rec_kernels.block import tail_fused

    return tail_fused.backward(
        grad, xBdt, shift, C, factor, weight, bias, A_log, D, dt_bias, ends, lengths, longest, skip_dt
    )


@tail_backward.register_fake
def _backward_shapes(
    grad: torch.Tensor,
    xBdt: torch.Tensor,
    shift: torch.Tensor | None,
    C: torch.Tensor,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    A_log: torch.Tensor,
    *arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    d_factor = xBdt.new_empty(0) if factor is None else factor.new_empty(factor.shape)
    size = weight.numel() + bias.shape[0] + 3 * A_log.shape[0] + xBdt.shape[-1]
    return (
        xBdt.new_empty(xBdt.shape),
        C.new_empty(C.shape),
        d_factor,
        xBdt.new_empty(size, dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.options = inputs[11:]
    ctx.save_for_backward(*inputs[:11])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors
    d_xBdt, d_C, d_factor, flat = tail_backward(grad, *saved, *ctx.options)
    shift, _, factor, weight, bias, A_log, D, dt_bias = saved[1:9]
    order = (weight, bias, D, A_log, dt_bias)
    *parts, rest = torch.split(flat, [*(p.numel() for p in order), saved[0].shape[-1]])
    d_weight, d_bias, d_D, d_A_log, d_dt_bias = (
        part.view(p.shape).to(p.dtype) for part, p in zip(parts, order, strict=True)
    )
    d_shift = None if shift is None else rest.to(shift.dtype)
    d_factor = None if factor is None else d_factor
    return d_xBdt, d_shift, d_C, d_factor, d_weight, d_bias, d_A_log, d_D, d_dt_bias, None, None, None, None


tail_forward.register_autograd(_backward, setup_context=_save)
