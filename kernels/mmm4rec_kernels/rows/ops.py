"""Row-wise operations as operators of torch, with shapes for tracing and gradients.

The kernels are imported when one runs.
"""

from __future__ import annotations

from typing import Any

import torch

from mmm4rec_kernels.operators import dispatched


@dispatched("mmm4rec_kernels::residual_norm")
def norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    other: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
    eps: float,
    shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and the sum before the norm, [n, S, D]; shift is [D]."""
    from mmm4rec_kernels.rows import fused

    return fused.norm_forward(x, residual, other, weight, bias, seed, p, eps, shift)


@norm_forward.register_fake
def _norm_shapes(x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@dispatched("mmm4rec_kernels::residual_norm_backward")
def norm_backward(
    grad: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
    eps: float,
    want_x: bool,
    want_sum: bool,
    want_shift: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, of what was added (empty where not wanted) and, in float32, of weight, bias and shift [n, 3, D].

    Without a shift these are [n, 2, D].
    """
    from mmm4rec_kernels.rows import fused

    return fused.norm_backward(grad, total, weight, seed, p, eps, want_x, want_sum, want_shift)


@norm_backward.register_fake
def _norm_backward_shapes(
    grad: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
    eps: float,
    want_x: bool,
    want_sum: bool,
    want_shift: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(total) if want_x else total.new_empty(0),
        torch.empty_like(total) if want_sum else total.new_empty(0),
        weight.new_empty(weight.shape[0], 3 if want_shift else 2, weight.shape[1], dtype=torch.float32),
    )


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _x, residual, other, weight, bias, seed, ctx.p, ctx.eps, shift = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.added = residual is not None, other is not None
    ctx.bias_dtype, ctx.shift_dtype = bias.dtype, None if shift is None else shift.dtype
    ctx.save_for_backward(output[1], weight, seed)


def _backward_norm(ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    total, weight, seed = ctx.saved_tensors
    added = any(ctx.added)
    # Without dropout x and what is added to it have one gradient.
    apart = seed is not None or not added
    shifted = ctx.shift_dtype is not None
    d_x, d_sum, d_vectors = norm_backward(grad, total, weight, seed, ctx.p, ctx.eps, apart, added, shifted)
    d_weight, d_bias, *d_shift = d_vectors.unbind(1)
    return (
        d_x if apart else d_sum,
        d_sum if ctx.added[0] else None,
        d_sum if ctx.added[1] else None,
        d_weight.to(weight.dtype),
        d_bias.to(ctx.bias_dtype),
        None,
        None,
        None,
        (d_shift[0].squeeze(0) if len(weight) == 1 else d_shift[0].sum(0)).to(ctx.shift_dtype) if shifted else None,
    )


norm_forward.register_autograd(_backward_norm, setup_context=_save_norm)


@dispatched("mmm4rec_kernels::sum_rows")
def sum_rows(x: torch.Tensor) -> torch.Tensor:
    """[S, C] to [C], float32."""
    from mmm4rec_kernels.rows import fused

    return fused.sum_rows(x)


@sum_rows.register_fake
def _sum_shapes(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)


@dispatched("mmm4rec_kernels::hardswish")
def hardswish_forward(
    x: torch.Tensor, seed: torch.Tensor | None, p: float, shift: torch.Tensor | None = None
) -> torch.Tensor:
    """Dropout of hardswish of x [..., D] + shift [D]."""
    from mmm4rec_kernels.rows import fused

    return fused.hardswish(x, seed, p, shift)


@hardswish_forward.register_fake
def _hardswish_shapes(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return torch.empty_like(x)


@dispatched("mmm4rec_kernels::hardswish_backward")
def hardswish_backward(
    grad: torch.Tensor, x: torch.Tensor, seed: torch.Tensor | None, p: float, shift: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and, in float32, of shift (empty without one)."""
    from mmm4rec_kernels.rows import fused

    return fused.hardswish_backward(grad, x, seed, p, shift)


@hardswish_backward.register_fake
def _hardswish_backward_shapes(
    grad: torch.Tensor, x: torch.Tensor, seed: torch.Tensor | None, p: float, shift: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(0 if shift is None else x.shape[-1], dtype=torch.float32)


def _save_hardswish(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, seed, ctx.p, shift = inputs
    ctx.save_for_backward(x, seed, shift)


def _backward_hardswish(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, seed, shift = ctx.saved_tensors
    d_x, d_shift = hardswish_backward(grad, x, seed, ctx.p, shift)
    return d_x, None, None, None if shift is None else d_shift.to(shift.dtype)


hardswish_forward.register_autograd(_backward_hardswish, setup_context=_save_hardswish)


@dispatched("mmm4rec_kernels::unit_sum")
def unit_sum(a: torch.Tensor, b: torch.Tensor, scale: float, least: float) -> torch.Tensor:
    """Sum of the rows of two tensors [S, D], each row scaled to length `scale`."""
    from mmm4rec_kernels.rows import fused

    return fused.unit_sum(a, b, scale, least)


@unit_sum.register_fake
def _unit_sum_shape(a: torch.Tensor, b: torch.Tensor, scale: float, least: float) -> torch.Tensor:
    return torch.empty_like(a)


@dispatched("mmm4rec_kernels::unit_sum_backward")
def unit_sum_backward(
    grad: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, least: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of both."""
    from mmm4rec_kernels.rows import fused

    return fused.unit_sum_gradients(grad.contiguous(), a, b, scale, least)


@unit_sum_backward.register_fake
def _unit_sum_backward_shapes(
    grad: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, least: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(a), torch.empty_like(b)


def _save_unit_sum(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    a, b, ctx.scale, ctx.least = inputs
    ctx.save_for_backward(a, b)


def _backward_unit_sum(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *unit_sum_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.least), None, None


unit_sum.register_autograd(_backward_unit_sum, setup_context=_save_unit_sum)
