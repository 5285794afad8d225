# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Triton pieces shared by the kernels: step sizes, decays, gates, places of a sequence in memory.

A tile is BL neighbouring places of one sequence. `b_` is a block value, `p_` a pointer, `i_` a program index, `o_`
offsets, `m_` a mask. Only modules that launch kernels import this one: it imports Triton.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LOG2E = tl.constexpr(1.4426950408889634)

FULL = tl.constexpr(0)
LENGTHS = tl.constexpr(1)
PACKED = tl.constexpr(2)


@triton.jit
def sequence_bounds(p_ends, i_sequence, length, ENDS: tl.constexpr):
    """First row in a packed tensor (else 0), places of this sequence, places to write."""
    if ENDS == PACKED:
        first = tl.load(p_ends + i_sequence).to(tl.int64)
        count = (tl.load(p_ends + i_sequence + 1).to(tl.int64) - first).to(tl.int32)
        return first, count, count
    elif ENDS == LENGTHS:
        return tl.zeros((), tl.int64), tl.load(p_ends + i_sequence).to(tl.int32), length
    else:
        return tl.zeros((), tl.int64), length, length


@triton.jit
def sequence_start(first, i_sequence, batch_stride, ROW: tl.constexpr, ALIGN: tl.constexpr, ENDS: tl.constexpr):
    """Offset of a sequence's first row; ALIGN divides ROW, and batch_stride is given in units of it."""
    if ENDS == PACKED:
        return first * ROW
    else:
        return tl.cast(i_sequence, tl.int64) * batch_stride * ALIGN


@triton.jit
def exp2(v):
    """2^v to two units in the last place; what underflows is 0."""
    if INTERPRETED:
        return tl.exp2(v)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [v], tl.float32, is_pure=True, pack=1)


@triton.jit
def latter(a, b):
    """The second argument."""
    return b


@triton.jit
def pinned(b):
    """The vector as it is, but computed once: not again in every register layout in which it is wanted.

    The compiler repeats any arithmetic, but never a scan.
    """
    if INTERPRETED:
        return b
    else:
        return tl.associative_scan(b, 0, latter)


@triton.jit
def softplus(v):
    """log(1 + e^v), with full relative precision where it is tiny."""
    e = tl.exp(tl.minimum(v, 20.0))
    u = 1.0 + e
    back = u - 1.0
    inner = tl.where(back == 0.0, e, tl.log(u) * (e / tl.where(back == 0.0, 1.0, back)))
    return tl.where(v > 20.0, v, inner)


@triton.jit
def reciprocal(v):
    """1 / v to one unit in the last place, a sixth of the instructions of a division."""
    if INTERPRETED:
        return 1.0 / v
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(v):
    """1 / (1 + e^-v)."""
    return reciprocal(1.0 + exp2(v * -LOG2E))


@triton.jit
def decay_matrix(b_total, BL: tl.constexpr):
    """2^(sum over (s, t]) for s <= t, else 0, from float64 running sums of base-2 logarithms.

    The difference is formed from two float32 parts, so nothing is lost behind a very negative step.
    """
    high = b_total.to(tl.float32)
    low = (b_total - high.to(tl.float64)).to(tl.float32)
    o_l = tl.arange(0, BL)
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return exp2(tl.where(o_l[:, None] >= o_l[None, :], between, float("-inf")))


@triton.jit
def dot(a, b, KIND: tl.constexpr, PRECISION: tl.constexpr, onto=None):
    """Matrix product with float32 sums, added `onto` a tile if given; operands are rounded to KIND first."""
    a = a.to(KIND)
    b = b.to(KIND)
    if INTERPRETED:
        # The interpreter multiplies the bits of bfloat16 numbers as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, onto, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def step_gradients(
    b_W, b_M, b_step, D, SKIP_DT: tl.constexpr, BL: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr
):
    """From W[t, s] = dy[t] x[s] and M[t, s], the products of reads and writes with their decay: three vectors.

    The gradient of the one-step logarithms, to be summed backwards; that of the step sizes as factors of what is
    written and skipped; that of D at each place.

    Of V = W M the first has rows of V[t, s] step[s] less its columns, s < t: summed backwards these are the sums over
    the rectangles t >= r > s. Where the products are about float32 they are summed in float64: what cancels may be far
    larger than what remains. Beside the rounding of TF32 or bfloat16 products float32 is enough. Sums over columns
    cross all threads and are dear, so there are few; a diagonal is taken along the rows.
    """
    o_l = tl.arange(0, BL)
    b_V = b_W * b_M
    m_diagonal = o_l[:, None] == o_l[None, :]
    b_before = tl.where(o_l[:, None] > o_l[None, :], b_V, 0.0)
    b_dskip = tl.sum(tl.where(m_diagonal, b_W, 0.0), 1)
    b_dstep = tl.sum(tl.where(m_diagonal, b_V, 0.0), 1)
    b_columns = tl.sum(b_before, 0)
    b_dstep += b_columns
    b_before *= b_step[None, :]
    if tl.float32 == KIND and PRECISION == "tf32x3":
        b_wide = b_before.to(tl.float64)
        b_ends = tl.sum(b_wide, 1) - tl.sum(b_wide, 0)
    else:
        b_ends = tl.sum(b_before, 1).to(tl.float64) - (b_columns * b_step).to(tl.float64)
    if SKIP_DT:
        b_dstep += D * b_dskip
        b_dskip *= b_step
    return b_ends, b_dstep, b_dskip


@triton.jit
def with_skip(b_M, b_step, D, SKIP_DT: tl.constexpr, BL: tl.constexpr):
    """Products of reads and writes with their decay, [t, s], to what x is multiplied by: step sizes and skip inside."""
    o_l = tl.arange(0, BL)
    b_skip = tl.where(o_l[:, None] == o_l[None, :], D, 0.0)
    if SKIP_DT:
        return (b_M + b_skip) * b_step[None, :]
    else:
        return b_M * b_step[None, :] + b_skip


@triton.jit
def store_sum(p, b):
    """Sum of a vector to one address.

    The vector stands as a row: Triton 3.6 fails on sm_100 where a vector that comes from a product is summed.
    """
    tl.store(p + tl.arange(0, 1), tl.sum(b[None, :], 1))
