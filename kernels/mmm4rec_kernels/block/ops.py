"""The fused block as operators of torch, with shapes for tracing and a gradient. The kernels are imported when one runs.

Letters as in `fused`. Arguments as in `fused.forward`.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.library.custom_op("mmm4rec_kernels::ssd_block", mutates_args=())
def ssd_block_forward(
    projected: torch.Tensor,
    z: torch.Tensor | None,
    C: torch.Tensor | None,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    norm: torch.Tensor,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    groups: int,
    eps: float,
    skip_dt: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised output [B, L, E] and 1/rms [B, L]."""
    from mmm4rec_kernels.block import fused

    return fused.forward(
        projected,
        z,
        C,
        factor,
        weight,
        bias,
        A_log,
        D,
        dt_bias,
        norm,
        ends,
        packed,
        longest,
        groups,
        eps,
        skip_dt,
    )


@ssd_block_forward.register_fake
def _forward_shapes(
    projected: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length = projected.shape[:2]
    norm = arguments[8]
    return projected.new_empty(batch, length, norm.shape[0]), projected.new_empty(batch, length, dtype=torch.float32)


@torch.library.custom_op("mmm4rec_kernels::ssd_block_backward", mutates_args=())
def ssd_block_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    projected: torch.Tensor,
    z: torch.Tensor | None,
    C: torch.Tensor | None,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    norm: torch.Tensor,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    groups: int,
    skip_dt: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of projected, z, C, factor (empty where absent) and of all parameters, one behind the other."""
    from mmm4rec_kernels.block import fused

    return fused.backward(
        grad,
        out,
        scale,
        projected,
        z,
        C,
        factor,
        weight,
        bias,
        A_log,
        D,
        dt_bias,
        norm,
        ends,
        packed,
        longest,
        groups,
        skip_dt,
    )


@ssd_block_backward.register_fake
def _backward_shapes(
    grad: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    projected: torch.Tensor,
    z: torch.Tensor | None,
    C: torch.Tensor | None,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    norm: torch.Tensor,
    *arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def like(t: torch.Tensor | None) -> torch.Tensor:
        return projected.new_empty(0) if t is None else t.new_empty(t.shape)

    size = weight.numel() + weight.shape[0] + norm.shape[0] + 3 * A_log.shape[0]
    return like(projected), like(z), like(C), like(factor), projected.new_empty(size, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.set_materialize_grads(False)
    tensors, ctx.options = inputs[:11], (*inputs[11:14], inputs[15])
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 16
    saved = ctx.saved_tensors
    _, z, C, factor, weight, bias, A_log, D, dt_bias, norm = saved[2:12]
    packed, longest, groups, skip_dt = ctx.options
    d_projected, d_z, d_C, d_factor, flat = ssd_block_backward(grad, *saved, packed, longest, groups, skip_dt)
    parameters = (weight, bias, norm, A_log, D, dt_bias)
    d_weight, d_bias, d_norm, d_A_log, d_D, d_dt_bias = (
        part.view(p.shape).to(p.dtype) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters)
    )
    return (
        d_projected,
        None if z is None else d_z,
        None if C is None else d_C,
        None if factor is None else d_factor,
        d_weight,
        d_bias,
        d_A_log,
        d_D,
        d_dt_bias,
        d_norm,
        *(None,) * 6,
    )


ssd_block_forward.register_autograd(_backward, setup_context=_save)
