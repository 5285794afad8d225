# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Row-wise operations as Triton kernels. Letters: n groups of rows with weights of their own, S rows a group, D width.

A program takes BR rows at a time; where sums over rows are wanted it takes every P-th block of its group and keeps them
in registers, so that no two programs write to one place and results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmm4rec_kernels.launch import align, processors
from mmm4rec_kernels.sums import summed

ELEMENTS = 1024
"""Elements of a tile."""
PROGRAMS = 8
"""Programs of 4 warps of the kernels with sums, for each multiprocessor."""


@triton.jit
def _kept(p_seed, o_row, o_draw, p, D: tl.constexpr):
    """Which elements of some rows dropout keeps, times 1 / (1 - p); a draw is good for four neighbours.

    `o_draw` [1, N] are the draws inside a row that is a multiple of four wide, otherwise the columns.
    """
    seed = tl.load(p_seed)
    if D % 4 == 0:
        o_draw = o_row.to(tl.int64)[:, None] * (D // 4) + o_draw
        b_0, b_1, b_2, b_3 = tl.rand4x(seed, o_draw.to(tl.int32))
        b_random = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))
        b_random = tl.reshape(b_random, [o_draw.shape[0], 4 * o_draw.shape[1]])
    else:
        b_random = tl.rand(seed, (o_row.to(tl.int64)[:, None] * D + o_draw).to(tl.int32))
    return tl.where(b_random >= p, 1.0 / (1.0 - p), 0.0)


@triton.jit
def _draws(first, D: tl.constexpr, BD: tl.constexpr):
    """The draws [1, N] of the columns of a tile."""
    if D % 4 == 0:
        return (first // 4 + tl.arange(0, BD // 4))[None, :]
    else:
        return (first + tl.arange(0, BD))[None, :]


@triton.jit(do_not_specialize=["rows"])
def residual_norm_forward(
    p_x,
    p_residual,
    p_other,
    p_weight,
    p_bias,
    p_seed,
    p_shift,
    p_out,
    p_sum,
    rows,
    p,
    eps,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    i_n = tl.program_id(1)
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    mask = (o_r < rows)[:, None] & (o_d < D)[None, :]
    o_element = (i_n * rows + o_r).to(tl.int64)[:, None] * D + o_d[None, :]
    b_h = tl.load(p_x + o_element, mask=mask, other=0.0).to(tl.float32)
    if p_shift is not None:
        b_h += tl.load(p_shift + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    if p_seed is not None:
        b_h *= _kept(p_seed, i_n * rows + o_r, _draws(0, D, BD), p, D)
    if p_residual is not None:
        b_h += tl.load(p_residual + o_element, mask=mask, other=0.0).to(tl.float32)
    if p_other is not None:
        b_h += tl.load(p_other + o_element, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_sum + o_element, b_h.to(p_sum.dtype.element_ty), mask=mask)
    b_mean = tl.sum(b_h, 1) / D
    b_centred = tl.where(mask, b_h - b_mean[:, None], 0.0)
    b_scale = 1.0 / tl.sqrt_rn(tl.sum(b_centred * b_centred, 1) / D + eps)
    b_weight = tl.load(p_weight + i_n * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + i_n * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_out = b_centred * b_scale[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(p_out + o_element, b_out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def residual_norm_backward(
    p_grad,
    p_sum,
    p_weight,
    p_seed,
    p_dx,
    p_dsum,
    p_sums,
    rows,
    p,
    eps,
    SUMS: tl.constexpr,
    D: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    i_n = tl.program_id(1)
    o_d = tl.arange(0, BD)
    b_weight = tl.load(p_weight + i_n * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    b_dweight = tl.zeros([BR, BD], tl.float32)
    b_dbias = tl.zeros([BR, BD], tl.float32)
    b_dshift = tl.zeros([BR, BD], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0)):
        o_r = block * BR + tl.arange(0, BR)
        mask = (o_r < rows)[:, None] & (o_d < D)[None, :]
        o_element = (i_n * rows + o_r).to(tl.int64)[:, None] * D + o_d[None, :]
        b_h = tl.load(p_sum + o_element, mask=mask, other=0.0).to(tl.float32)
        b_grad = tl.load(p_grad + o_element, mask=mask, other=0.0).to(tl.float32)
        b_mean = tl.sum(b_h, 1) / D
        b_centred = tl.where(mask, b_h - b_mean[:, None], 0.0)
        b_scale = 1.0 / tl.sqrt_rn(tl.sum(b_centred * b_centred, 1) / D + eps)
        b_normed = b_centred * b_scale[:, None]
        b_dweight += b_grad * b_normed
        b_dbias += b_grad
        b_grad *= b_weight[None, :]
        b_along = tl.sum(b_grad * b_normed, 1) / D
        b_dh = b_scale[:, None] * (b_grad - tl.sum(b_grad, 1)[:, None] / D - b_normed * b_along[:, None])
        if p_dsum is not None:
            tl.store(p_dsum + o_element, b_dh.to(p_dsum.dtype.element_ty), mask=mask)
        if p_seed is not None:
            b_dh *= _kept(p_seed, i_n * rows + o_r, _draws(0, D, BD), p, D)
        if p_dx is not None:
            tl.store(p_dx + o_element, b_dh.to(p_dx.dtype.element_ty), mask=mask)
        if SUMS > 2:
            b_dshift += tl.where(mask, b_dh, 0.0)
    o_sums = (i_n * tl.num_programs(0) + tl.program_id(0)) * SUMS * D + o_d
    tl.store(p_sums + o_sums, tl.sum(b_dweight, 0), mask=o_d < D)
    tl.store(p_sums + o_sums + D, tl.sum(b_dbias, 0), mask=o_d < D)
    if SUMS > 2:
        tl.store(p_sums + o_sums + 2 * D, tl.sum(b_dshift, 0), mask=o_d < D)


@triton.jit(do_not_specialize=["rows"])
def column_sums(p_x, p_sums, rows, columns, stride, ALIGN: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Sums over every P-th block of rows; `columns` and `stride` are in units of ALIGN."""
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < columns * ALIGN
    b_sum = tl.zeros([BR, BC], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0)):
        o_r = block * BR + tl.arange(0, BR)
        mask = (o_r < rows)[:, None] & m_c[None, :]
        o_x = o_r.to(tl.int64)[:, None] * (stride * ALIGN) + o_c[None, :]
        b_sum += tl.load(p_x + o_x, mask=mask, other=0.0).to(tl.float32)
    p_sums += tl.program_id(0).to(tl.int64) * (columns * ALIGN)
    tl.store(p_sums + o_c, tl.sum(b_sum, 0), mask=m_c)


@triton.jit(do_not_specialize=["rows"])
def activation_forward(p_x, p_seed, p_shift, p_out, rows, p, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = (o_r < rows)[:, None] & (o_d < D)[None, :]
    o_x = o_r.to(tl.int64)[:, None] * D + o_d[None, :]
    b_x = tl.load(p_x + o_x, mask=mask, other=0.0).to(tl.float32)
    if p_shift is not None:
        b_x += tl.load(p_shift + o_d, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    b_out = b_x * tl.minimum(tl.maximum(b_x + 3.0, 0.0), 6.0) * (1.0 / 6.0)
    if p_seed is not None:
        b_out *= _kept(p_seed, o_r, _draws(tl.program_id(1) * BD, D, BD), p, D)
    tl.store(p_out + o_x, b_out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def activation_backward(
    p_grad, p_x, p_seed, p_shift, p_dx, p_sums, rows, p, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr
):
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    b_shift = tl.zeros([BD], tl.float32)
    b_dshift = tl.zeros([BR, BD], tl.float32)
    if p_shift is not None:
        b_shift = tl.load(p_shift + o_d, mask=o_d < D, other=0.0).to(tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0)):
        o_r = block * BR + tl.arange(0, BR)
        mask = (o_r < rows)[:, None] & (o_d < D)[None, :]
        o_x = o_r.to(tl.int64)[:, None] * D + o_d[None, :]
        b_x = tl.load(p_x + o_x, mask=mask, other=0.0).to(tl.float32) + b_shift[None, :]
        b_dx = tl.load(p_grad + o_x, mask=mask, other=0.0).to(tl.float32)
        if p_seed is not None:
            b_dx *= _kept(p_seed, o_r, _draws(tl.program_id(1) * BD, D, BD), p, D)
        b_slope = tl.where(b_x <= -3.0, 0.0, tl.where(b_x < 3.0, b_x * (1.0 / 3.0) + 0.5, 1.0))
        b_dx *= b_slope
        tl.store(p_dx + o_x, b_dx.to(p_dx.dtype.element_ty), mask=mask)
        if p_sums is not None:
            b_dshift += tl.where(mask, b_dx, 0.0)
    if p_sums is not None:
        tl.store(p_sums + tl.program_id(0).to(tl.int64) * D + o_d, tl.sum(b_dshift, 0), mask=o_d < D)


@triton.jit(do_not_specialize=["rows"])
def unit_sum_forward(p_a, p_b, p_out, rows, scale, least, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    mask = (o_r < rows)[:, None] & (o_d < D)[None, :]
    o_element = o_r.to(tl.int64)[:, None] * D + o_d[None, :]
    b_a = tl.load(p_a + o_element, mask=mask, other=0.0).to(tl.float32)
    b_b = tl.load(p_b + o_element, mask=mask, other=0.0).to(tl.float32)
    b_a *= (scale / tl.maximum(tl.sqrt_rn(tl.sum(b_a * b_a, 1)), least))[:, None]
    b_b *= (scale / tl.maximum(tl.sqrt_rn(tl.sum(b_b * b_b, 1)), least))[:, None]
    tl.store(p_out + o_element, (b_a + b_b).to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def unit_gradient(b_x, b_grad, scale, least):
    """Gradient of scale x / max(|x|, least)."""
    b_length = tl.sqrt_rn(tl.sum(b_x * b_x, 1))
    b_scale = scale / tl.maximum(b_length, least)
    b_along = tl.where(b_length >= least, tl.sum(b_x * b_grad, 1) * b_scale, 0.0)
    b_along /= tl.maximum(b_length * b_length, least * least)
    return b_grad * b_scale[:, None] - b_x * b_along[:, None]


@triton.jit(do_not_specialize=["rows"])
def unit_sum_backward(
    p_grad, p_a, p_b, p_da, p_db, rows, scale, least, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr
):
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    mask = (o_r < rows)[:, None] & (o_d < D)[None, :]
    o_element = o_r.to(tl.int64)[:, None] * D + o_d[None, :]
    b_grad = tl.load(p_grad + o_element, mask=mask, other=0.0).to(tl.float32)
    b_a = tl.load(p_a + o_element, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_da + o_element, unit_gradient(b_a, b_grad, scale, least).to(p_da.dtype.element_ty), mask=mask)
    b_b = tl.load(p_b + o_element, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_db + o_element, unit_gradient(b_b, b_grad, scale, least).to(p_db.dtype.element_ty), mask=mask)


@triton.jit
def nadam_step(
    p_value,
    p_gradient,
    p_first,
    p_second,
    size,
    lr_gradient,
    lr_first,
    beta1,
    beta2,
    correction,
    eps,
    decay,
    BLOCK: tl.constexpr,
):
    o_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o_x < size
    b_value = tl.load(p_value + o_x, mask=mask, other=0.0)
    b_gradient = tl.load(p_gradient + o_x, mask=mask, other=0.0) + decay * b_value
    b_first = tl.load(p_first + o_x, mask=mask, other=0.0)
    b_second = tl.load(p_second + o_x, mask=mask, other=0.0)
    b_first += (1.0 - beta1) * (b_gradient - b_first)
    b_second = beta2 * b_second + (1.0 - beta2) * b_gradient * b_gradient
    b_root = tl.sqrt_rn(b_second / correction) + eps
    b_value -= (lr_gradient * b_gradient + lr_first * b_first) / b_root
    tl.store(p_value + o_x, b_value, mask=mask)
    tl.store(p_first + o_x, b_first, mask=mask)
    tl.store(p_second + o_x, b_second, mask=mask)


def _tile(width: int) -> dict[str, int]:
    columns = triton.next_power_of_2(width)
    return {"BR": max(1, ELEMENTS // columns), "BD": columns, "num_warps": 4 if columns <= 2048 else 8}


def _activation_tile(width: int) -> dict[str, int]:
    columns = min(256, triton.next_power_of_2(width))
    return {"BR": ELEMENTS // columns, "BD": columns, "num_warps": 4}


def norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    other: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
    eps: float,
    shift: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and the sum before the norm, [n, S, D]; all inputs contiguous."""
    groups, rows, width = x.shape
    out, total = torch.empty_like(x), torch.empty_like(x)
    tile = _tile(width)
    if x.numel():
        grid = (triton.cdiv(rows, tile["BR"]), groups)
        residual_norm_forward[grid](
            x, residual, other, weight, bias, seed, shift, out, total, rows, p, eps, D=width, **tile
        )
    return out, total


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
    """Gradients of x and of what was added to it (empty where not wanted), and in float32 those of the vectors.

    [n, 2, D] of weight and bias, or [n, 3, D] with the shift's.
    """
    groups, rows, width = total.shape
    d_x = torch.empty_like(total) if want_x else total.new_empty(0)
    d_sum = torch.empty_like(total) if want_sum else total.new_empty(0)
    tile = _tile(width)
    programs = processors(total) * PROGRAMS * 4 // tile["num_warps"] // groups
    programs = max(1, min(triton.cdiv(rows, tile["BR"]), programs))
    vectors = 3 if want_shift else 2
    sums = torch.empty(groups, programs, vectors, width, dtype=torch.float32, device=total.device)
    residual_norm_backward[(programs, groups)](
        grad.contiguous(),
        total,
        weight,
        seed,
        d_x if want_x else None,
        d_sum if want_sum else None,
        sums,
        rows,
        p,
        eps,
        SUMS=vectors,
        D=width,
        **tile,
    )
    return d_x, d_sum, summed(sums)


def sum_rows(x: torch.Tensor) -> torch.Tensor:
    """[S, C] with contiguous columns to the sum over rows, [C] float32."""
    rows, columns = x.shape
    block = 32 if columns <= 64 else 128
    wide = triton.cdiv(columns, block)
    height = 2048 // block
    programs = max(1, min(triton.cdiv(rows, height), -(-processors(x) * 8 // wide)))
    sums = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    unit = align(columns, x.stride(0))
    column_sums[(programs, wide)](
        x, sums, rows, columns // unit, x.stride(0) // unit, ALIGN=unit, BR=height, BC=block, num_warps=4
    )
    return summed(sums[None]).squeeze(0)


def hardswish(x: torch.Tensor, seed: torch.Tensor | None, p: float, shift: torch.Tensor | None) -> torch.Tensor:
    """Dropout of hardswish of a contiguous tensor plus shift [D]."""
    out, width = torch.empty_like(x), x.shape[-1]
    if x.numel():
        rows, tile = x.numel() // width, _activation_tile(width)
        grid = (triton.cdiv(rows, tile["BR"]), triton.cdiv(width, tile["BD"]))
        activation_forward[grid](x, seed, shift, out, rows, p, D=width, **tile)
    return out


def hardswish_backward(
    grad: torch.Tensor, x: torch.Tensor, seed: torch.Tensor | None, p: float, shift: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x, and of shift in float32 (empty without one)."""
    d_x, width = torch.empty_like(x), x.shape[-1]
    if not x.numel():
        return d_x, x.new_zeros(0 if shift is None else width, dtype=torch.float32)
    rows, tile = x.numel() // width, _activation_tile(width)
    wide = triton.cdiv(width, tile["BD"])
    programs = triton.cdiv(rows, tile["BR"])
    if shift is not None:
        programs = min(programs, -(-processors(x) * PROGRAMS // wide))
    sums = None if shift is None else torch.empty(programs, width, dtype=torch.float32, device=x.device)
    activation_backward[(programs, wide)](grad.contiguous(), x, seed, shift, d_x, sums, rows, p, D=width, **tile)
    return d_x, x.new_empty(0, dtype=torch.float32) if sums is None else summed(sums[None]).squeeze(0)


def unit_sum(a: torch.Tensor, b: torch.Tensor, scale: float, least: float) -> torch.Tensor:
    """The sum of scale x / max(|x|, least) for the rows x of two contiguous tensors [S, D]."""
    out, tile = torch.empty_like(a), _tile(a.shape[1])
    if out.numel():
        unit_sum_forward[(triton.cdiv(len(a), tile["BR"]),)](a, b, out, len(a), scale, least, D=a.shape[1], **tile)
    return out


def unit_sum_gradients(
    grad: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, least: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of both."""
    d_a, d_b, tile = torch.empty_like(a), torch.empty_like(b), _tile(a.shape[1])
    if d_a.numel():
        unit_sum_backward[(triton.cdiv(len(a), tile["BR"]),)](
            grad, a, b, d_a, d_b, len(a), scale, least, D=a.shape[1], **tile
        )
    return d_a, d_b


def nadam(
    value: torch.Tensor, gradient: torch.Tensor, first: torch.Tensor, second: torch.Tensor, *factors: float
) -> None:
    """One step in place on flat float32 tensors; factors as in `nadam_step`."""
    nadam_step[(triton.cdiv(value.numel(), 1024),)](value, gradient, first, second, value.numel(), *factors, BLOCK=1024)
