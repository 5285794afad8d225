# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The gated norm as one Triton kernel each way. Letter: E width.

A program takes BR rows at a time; backward it takes every S-th block of rows and keeps the gradient of the weight in
registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmm4rec_kernels.launch import align, processors
from mmm4rec_kernels.sums import sum_rows
from mmm4rec_kernels.tiles import sigmoid

ELEMENTS = 512
"""Elements of a tile."""
PROGRAMS = 8
"""Programs of the backward kernel for each multiprocessor."""


@triton.jit(do_not_specialize=["rows", "length", "y_batch", "z_batch"])
def norm_forward(
    p_y,
    p_z,
    p_weight,
    p_lengths,
    p_out,
    p_scale,
    rows,
    length,
    y_batch,
    z_batch,
    eps,
    E: tl.constexpr,
    ROW_Y: tl.constexpr,
    ROW_Z: tl.constexpr,
    ALIGN: tl.constexpr,
    BEFORE: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
):
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_e = tl.arange(0, BE)
    mask = (o_r < rows)[:, None] & (o_e < E)[None, :]
    i_b = (o_r // length).to(tl.int64)
    i_l = o_r % length
    m_in = mask
    if p_lengths is not None:
        m_in = mask & (i_l < tl.load(p_lengths + i_b, mask=o_r < rows, other=0))[:, None]
    b_y = tl.load(p_y + (i_b * y_batch * ALIGN + i_l * ROW_Y)[:, None] + o_e[None, :], mask=m_in, other=0.0)
    b_z = tl.load(p_z + (i_b * z_batch * ALIGN + i_l * ROW_Z)[:, None] + o_e[None, :], mask=m_in, other=0.0)
    b_y = b_y.to(tl.float32)
    b_z = b_z.to(tl.float32)
    b_gate = b_z * sigmoid(b_z)
    b_g = b_y
    if not BEFORE:
        b_g *= b_gate
    b_scale = 1.0 / tl.sqrt_rn(tl.sum(b_g * b_g, 1) / E + eps)
    b_weight = tl.load(p_weight + o_e, mask=o_e < E, other=0.0).to(tl.float32)
    b_out = b_g * b_scale[:, None] * b_weight[None, :]
    if BEFORE:
        b_out *= b_gate
    o_out = o_r.to(tl.int64)[:, None] * E + o_e[None, :]
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=mask)
    tl.store(p_scale + o_r, b_scale, mask=o_r < rows)


@triton.jit(do_not_specialize=["rows", "length", "y_batch", "z_batch", "dz_batch"])
def norm_backward(
    p_grad,
    p_y,
    p_z,
    p_weight,
    p_lengths,
    p_scale,
    p_dy,
    p_dz,
    p_sums,
    rows,
    length,
    y_batch,
    z_batch,
    dz_batch,
    E: tl.constexpr,
    ROW_Y: tl.constexpr,
    ROW_Z: tl.constexpr,
    ROW_DZ: tl.constexpr,
    ALIGN: tl.constexpr,
    BEFORE: tl.constexpr,
    BR: tl.constexpr,
    BE: tl.constexpr,
):
    o_e = tl.arange(0, BE)
    b_weight = tl.load(p_weight + o_e, mask=o_e < E, other=0.0).to(tl.float32)
    b_sum = tl.zeros([BE], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0)):
        o_r = block * BR + tl.arange(0, BR)
        mask = (o_r < rows)[:, None] & (o_e < E)[None, :]
        i_b = (o_r // length).to(tl.int64)
        i_l = o_r % length
        o_row = o_r.to(tl.int64)[:, None] * E + o_e[None, :]
        m_in = mask
        if p_lengths is not None:
            m_in = mask & (i_l < tl.load(p_lengths + i_b, mask=o_r < rows, other=0))[:, None]
        b_y = tl.load(p_y + (i_b * y_batch * ALIGN + i_l * ROW_Y)[:, None] + o_e[None, :], mask=m_in, other=0.0)
        b_z = tl.load(p_z + (i_b * z_batch * ALIGN + i_l * ROW_Z)[:, None] + o_e[None, :], mask=m_in, other=0.0)
        b_grad = tl.load(p_grad + o_row, mask=m_in, other=0.0).to(tl.float32)
        b_scale = tl.load(p_scale + o_r, mask=o_r < rows, other=0.0)
        b_y = b_y.to(tl.float32)
        b_z = b_z.to(tl.float32)
        b_sigmoid = sigmoid(b_z)
        b_gate = b_z * b_sigmoid
        b_slope = b_sigmoid * (1.0 + b_z * (1.0 - b_sigmoid))
        if BEFORE:
            b_normed = b_y * b_scale[:, None]
            b_dz = b_grad * b_normed * b_weight[None, :] * b_slope
            b_grad *= b_gate
        else:
            b_normed = b_y * b_gate * b_scale[:, None]
        b_sum += tl.sum(b_grad * b_normed, 0)
        b_grad *= b_weight[None, :]
        b_mean = tl.sum(b_grad * b_normed, 1) / E
        b_dy = b_scale[:, None] * (b_grad - b_normed * b_mean[:, None])
        if not BEFORE:
            b_dz = b_dy * b_y * b_slope
            b_dy *= b_gate
        tl.store(p_dy + o_row, b_dy.to(p_dy.dtype.element_ty), mask=mask)
        o_dz = (i_b * dz_batch * ALIGN + i_l * ROW_DZ)[:, None] + o_e[None, :]
        tl.store(p_dz + o_dz, b_dz.to(p_dz.dtype.element_ty), mask=mask)
    tl.store(p_sums + tl.program_id(0) * E + o_e, b_sum, mask=o_e < E)


def _tile(width: int) -> dict[str, int]:
    columns = triton.next_power_of_2(width)
    return {"BR": max(1, ELEMENTS // columns), "BE": columns, "num_warps": 4 if columns <= 2048 else 8}


def forward(
    y: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    before: bool,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and 1/rms [B, L], of y and z [B, L, E] whose last dimension is contiguous; 0 behind the lengths' ends."""
    batch, length, width = y.shape
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    scale = torch.empty(batch, length, dtype=torch.float32, device=y.device)
    unit = align(y.stride(0), y.stride(1), z.stride(0), z.stride(1))
    tile = _tile(width)
    rows = batch * length
    if rows:
        norm_forward[(triton.cdiv(rows, tile["BR"]),)](
            y,
            z,
            weight,
            lengths,
            out,
            scale,
            rows,
            length,
            y.stride(0) // unit,
            z.stride(0) // unit,
            eps,
            E=width,
            ROW_Y=y.stride(1),
            ROW_Z=z.stride(1),
            ALIGN=unit,
            BEFORE=before,
            **tile,
        )
    return out, scale


def backward(
    grad: torch.Tensor,
    y: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    before: bool,
    lengths: torch.Tensor | None = None,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of y, of z (written to `into` if given) and of the weight, the last in float32."""
    batch, length, width = y.shape
    d_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    d_z = torch.empty(z.shape, dtype=z.dtype, device=z.device) if into is None else into
    unit = align(*(t.stride(i) for t in (y, z, d_z) for i in (0, 1)))
    tile = _tile(width)
    rows = batch * length
    programs = max(1, min(triton.cdiv(rows, tile["BR"]), processors(y) * PROGRAMS))
    sums = torch.empty(programs, width, dtype=torch.float32, device=y.device)
    norm_backward[(programs,)](
        grad.contiguous(),
        y,
        z,
        weight,
        lengths,
        scale,
        d_y,
        d_z,
        sums,
        rows,
        length,
        y.stride(0) // unit,
        z.stride(0) // unit,
        d_z.stride(0) // unit,
        E=width,
        ROW_Y=y.stride(1),
        ROW_Z=z.stride(1),
        ROW_DZ=d_z.stride(1),
        ALIGN=unit,
        BEFORE=before,
        **tile,
    )
    return d_y, d_z, sum_rows(sums)
