"""The fused block as operators of torch, with shapes for tracing and a gradient: for short sequences and for any.

The kernels are imported when one runs. Letters as in `short` and `fused`, whose `forward` explain the arguments. K is
the number of chunks of a sequence in the scan.
"""

from __future__ import annotations

from typing import Any

import torch

from mmm4rec_kernels.operators import operator
from mmm4rec_kernels.ssd.ops import chunks

SHORT, SHORT_PACKED, SHORT_FORWARD = 8, 32, 32
"""Longest sequences for which several in one tile were faster on an H200: forward and backward together, so for packed
ones, and forward alone."""
JOINED = 13
"""Shortest sequences beyond `SHORT` for which one kernel backward was faster there: with 12 places it was slower, with
20 faster. Only with float32, and where each head has a group of its own."""

TILE = 32
"""Places of a tile that holds several sequences. With 64 kernels need twice the registers: slower on an H100."""
SEGMENT = 512
"""Packed places whose tiles are planned together: the last tile of each such segment is on average half empty."""


def planned_tiles(rows: int, longest: int) -> int:
    """Tiles that suffice for packed sequences of `longest` places or fewer, whatever their lengths.

    A tile ends where the next sequence does not fit. So it holds at least tile + 1 - longest places, and with the
    first sequence of the tile behind it at least tile + 1, unless it is the last of its segment.
    """
    tiles = min((SEGMENT - 1) // (TILE + 1 - longest) + 1, (SEGMENT - 1) // (TILE + 1) * 2 + 2)
    return -(-rows // SEGMENT) * tiles


def several_in_a_tile(packed: bool, longest: int, gradients: bool, joined: bool) -> bool:
    """Whether the operator for short sequences takes a call.

    `gradients` if some are wanted, `joined` if one kernel may find them: float32, and each head a group of its own.
    """
    if packed:
        return longest <= SHORT_PACKED
    if gradients and not (joined and longest >= JOINED):
        return longest <= SHORT
    return longest <= SHORT_FORWARD


@operator("mmm4rec_kernels::ssd_block")
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised output and y [B, L, E], 1/rms [B, L], states [B, H, K, P, N] if K > 1, convolved xBC or xB and C."""
    from mmm4rec_kernels.block import fused

    out, saved = fused.forward(
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
    scale, y, kept, act, *act_C = saved
    return out, scale, y, kept, act, act_C[0] if act_C else projected.new_empty(0)


@ssd_block_forward.register_fake
def _forward_shapes(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, length = projected.shape[:2]
    width, heads = norm.shape[0], A_log.shape[0]
    states = (weight.shape[0] - width) // 2
    sequences = ends.shape[0] - 1 if packed and ends is not None else batch
    sizes = (width // heads, states // groups)
    count = chunks(longest, *sizes, projected.dtype)
    kept = (sequences, heads, count, *sizes) if count > 1 else (0,)
    return (
        projected.new_empty(batch, length, width),
        projected.new_empty(batch, length, dtype=torch.float32),
        projected.new_empty(batch, length, width),
        projected.new_empty(kept, dtype=torch.float32),
        projected.new_empty(batch, length, width + (2 if C is None else 1) * states),
        projected.new_empty((0,) if C is None else (batch, length, states)),
    )


@operator("mmm4rec_kernels::ssd_block_backward")
def ssd_block_backward(
    grad: torch.Tensor,
    scale: torch.Tensor,
    y: torch.Tensor,
    kept: torch.Tensor,
    act: torch.Tensor,
    act_C: torch.Tensor,
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
        grad.contiguous(),
        [scale, y, kept, act] if C is None else [scale, y, kept, act, act_C],
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
    scale: torch.Tensor,
    y: torch.Tensor,
    kept: torch.Tensor,
    act: torch.Tensor,
    act_C: torch.Tensor,
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.options = (*inputs[11:14], inputs[15])
    ctx.save_for_backward(*output[1:], *inputs[:11])


def _backward(ctx: Any, grad: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 16
    saved = ctx.saved_tensors
    return _gradients(ssd_block_backward(grad, *saved, *ctx.options), saved[5:15])


def _gradients(
    results: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor | None, ...]:
    """What autograd wants, from a backward operator's results and the tensors that it was given."""
    d_projected, d_z, d_C, d_factor, flat = results
    _, z, C, factor, *parameters = inputs
    weight, bias, A_log, D, dt_bias, norm = (p for p in parameters if p is not None)
    order = (weight, bias, norm, D, A_log, dt_bias)
    d_weight, d_bias, d_norm, d_D, d_A_log, d_dt_bias = (
        part.view(p.shape).to(p.dtype)
        for part, p in zip(torch.split(flat, [p.numel() for p in order]), order, strict=True)
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


@operator("mmm4rec_kernels::ssd_block_short")
def short_forward(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised output [B, L, E], 1/rms [B, L], steps [3, H, T], where packed sequences and tiles lie, taps [K, C]."""
    from mmm4rec_kernels.block import short

    return short.forward(
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


@short_forward.register_fake
def _short_shapes(projected: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    batch, length = projected.shape[:2]
    weight, A_log, norm, packed, longest = (arguments[i] for i in (3, 5, 8, 10, 11))
    rows = batch * length
    return (
        projected.new_empty(batch, length, norm.shape[0]),
        projected.new_empty(batch, length, dtype=torch.float32),
        projected.new_empty(3, A_log.shape[0], rows, dtype=torch.float32),
        projected.new_empty(rows + 2 * planned_tiles(rows, longest) if packed else 0, dtype=torch.int32),
        weight.new_empty(weight.shape[1], weight.shape[0]),
    )


@operator("mmm4rec_kernels::ssd_block_short_backward")
def short_backward(
    grad: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    steps: torch.Tensor,
    places: torch.Tensor,
    turned: torch.Tensor,
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
    from mmm4rec_kernels.block import short

    return short.backward(
        grad.contiguous(),
        out,
        scale,
        steps,
        places,
        turned,
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


@short_backward.register_fake
def _short_backward_shapes(
    grad: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    steps: torch.Tensor,
    places: torch.Tensor,
    turned: torch.Tensor,
    *tensors: Any,
) -> tuple[torch.Tensor, ...]:
    projected, z, C, factor, weight, bias, A_log, D, dt_bias, norm = tensors[:10]

    def like(t: torch.Tensor | None) -> torch.Tensor:
        return projected.new_empty(0) if t is None else t.new_empty(t.shape)

    size = sum(t.numel() for t in (weight, bias, norm, A_log, D, dt_bias))
    return like(projected), like(z), like(C), like(factor), projected.new_empty(size, dtype=torch.float32)


def _save_short(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.options = (*inputs[11:14], inputs[15])
    ctx.save_for_backward(*output, *inputs[:11])


def _backward_short(ctx: Any, grad: torch.Tensor | None, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad is None:
        return (None,) * 16
    saved = ctx.saved_tensors
    return _gradients(short_backward(grad, *saved, *ctx.options), saved[5:15])


short_forward.register_autograd(_backward_short, setup_context=_save_short)
