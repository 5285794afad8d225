# Triton kernels carry no Python types, and their arguments are explained in `short`.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Which places of which sequences a tile holds, and the step sizes at all places. Letters as in `short`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mmm4rec_kernels.block import ops
from mmm4rec_kernels.block.ops import SEGMENT, TILE, planned_tiles
from mmm4rec_kernels.launch import tile
from mmm4rec_kernels.tiles import LOG2E, sigmoid, softplus

DENSE = tl.constexpr(0)
LENGTHS = tl.constexpr(1)
PACKED = tl.constexpr(2)


@triton.jit
def search(p_ends, o_row, sequences, DEPTH: tl.constexpr):
    """First and last-plus-one place of the packed sequence of each place; a place behind all is one of its own."""
    low = o_row * 0
    high = low + sequences
    for _ in range(DEPTH):
        middle = (low + high + 1) // 2
        inside = tl.load(p_ends + middle).to(tl.int32) <= o_row
        low = tl.where(inside, middle, low)
        high = tl.where(inside, high, middle - 1)
    behind = low >= sequences
    o_first = tl.where(behind, o_row, tl.load(p_ends + low).to(tl.int32))
    o_stop = tl.where(behind, o_row, tl.load(p_ends + tl.minimum(low + 1, sequences)).to(tl.int32))
    return o_first, o_stop


@triton.jit
def plan_tiles(
    p_ends,
    p_plan,
    p_arrived,
    i_segment,
    rows,
    sequences,
    tiles,
    DEPTH: tl.constexpr,
    BL: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILES: tl.constexpr,
    BT: tl.constexpr,
):
    """First and last-plus-one row of the tiles whose sequences start in one segment of rows; tiles left over are empty.

    A tile takes whole sequences for as long as they fit.
    """
    o_at = tl.arange(0, SEGMENT)
    o_tile = tl.arange(0, BT)
    o_side = tl.arange(0, 2)
    start = i_segment * SEGMENT
    # A tile ends where the first sequence starts that reaches behind it.
    b_end, _ = search(p_ends, tl.minimum(start + o_at + BL, rows), sequences, DEPTH)
    o_before = tl.minimum(start + o_side * SEGMENT, rows) - 1
    _, b_side = search(p_ends, o_before, sequences, DEPTH)
    b_side = tl.where(o_before < 0, 0, tl.maximum(b_side, o_before + 1))
    at = tl.min(b_side, 0)
    stop = tl.max(b_side, 0)
    b_from = tl.zeros([BT], tl.int32)
    b_to = tl.zeros([BT], tl.int32)
    i_tile = 0
    while at < stop:
        end = tl.minimum(tl.max(tl.where(start + o_at == at, b_end, 0), 0), stop)
        b_from = tl.where(o_tile == i_tile, at, b_from)
        b_to = tl.where(o_tile == i_tile, end, b_to)
        # Where max_length says too little, no tile holds the sequence: leave it out rather than stay here for ever.
        at = tl.where(end > at, end, stop)
        i_tile += 1
    o_tile += i_segment * TILES
    m_tile = o_tile < (i_segment + 1) * TILES
    tl.store(p_plan + o_tile, b_from, mask=m_tile)
    tl.store(p_plan + tiles + o_tile, b_to, mask=m_tile)
    tl.store(p_arrived + o_tile, tl.zeros([BT], tl.int32), mask=m_tile)


@triton.jit
def is_empty(i_tile, p_places, rows, tiles):
    """Whether a tile of the plan holds no sequence."""
    return tl.load(p_places + rows + i_tile) >= tl.load(p_places + rows + tiles + i_tile)


@triton.jit
def places_of(
    i_tile,
    o_l,
    p_ends,
    p_places,
    rows,
    tiles,
    length,
    per_tile,
    magic,
    MODE: tl.constexpr,
    LENGTH: tl.constexpr = 0,
):
    """First row of a tile, and for each place: is it written here, is it in a sequence, the place where that starts."""
    if MODE == PACKED:
        base = tl.load(p_places + rows + i_tile)
        m_out = o_l < tl.load(p_places + rows + tiles + i_tile) - base
        o_first = tl.load(p_places + base + o_l, mask=m_out, other=-1)
        m_in = o_first >= 0
        o_first = tl.where(m_in, o_first - base, o_l)
    elif o_l.shape[0] // 2 < LENGTH:
        base = i_tile * LENGTH
        m_out = o_l < LENGTH
        o_first = o_l * 0
        m_in = m_out
        if MODE == LENGTHS:
            m_in = m_out & (o_l < tl.load(p_ends + i_tile).to(tl.int32))
    else:
        if LENGTH > 0:
            length = LENGTH
            per_tile = o_l.shape[0] // LENGTH
            magic = 65536 // LENGTH + 1
        base = i_tile * (per_tile * length)
        o_seq = (o_l * magic) >> 16
        m_out = (o_seq < per_tile) & (o_l < rows - base)
        o_first = o_seq * length
        o_stop = o_first + length
        if MODE == LENGTHS:
            o_stop = o_first + tl.load(p_ends + i_tile * per_tile + o_seq, mask=m_out, other=0).to(tl.int32)
        m_in = m_out & (o_l < o_stop)
    return base, m_out, m_in, o_first


@triton.jit
def factor_places(i_tile, base, o_l, o_first, per_tile, magic, factor_batch, factor_row, MODE: tl.constexpr):
    """Where the time factor of each place lies."""
    if MODE == PACKED:
        return (tl.cast(base, tl.int64) + o_l) * factor_row
    else:
        return (i_tile * per_tile + ((o_l * magic) >> 16)).to(tl.int64) * factor_batch + (o_l - o_first) * factor_row


@triton.jit(do_not_specialize=["rows", "sequences", "tiles", "factor_batch"])
def block_steps(
    p_dt,
    p_factor,
    p_A_log,
    p_dt_bias,
    p_ends,
    p_places,
    p_steps,
    p_arrived,
    rows,
    sequences,
    tiles,
    length,
    per_tile,
    magic,
    factor_batch,
    factor_row,
    factor_head,
    ROW: tl.constexpr,
    H: tl.constexpr,
    MODE: tl.constexpr,
    DEPTH: tl.constexpr,
    BL: tl.constexpr,
    BH: tl.constexpr,
    TILE: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILES: tl.constexpr,
    BT: tl.constexpr,
):
    """Step sizes, and running sums of base-2 logarithms of decays in two parts: [3, H, T].

    The sums run over neighbouring places, at least from the start of each sequence on. Packed, a program takes the
    sequences that start in a window of `per_tile` rows, and some programs more plan the tiles.
    """
    i_tile = tl.program_id(0)
    if MODE == PACKED:
        i_segment = i_tile - tl.cdiv(rows, per_tile)
        if i_segment >= 0:
            p_plan = p_places + rows
            plan_tiles(p_ends, p_plan, p_arrived, i_segment, rows, sequences, tiles, DEPTH, TILE, SEGMENT, TILES, BT)
            return
    o_l = tl.arange(0, BL)
    o_h = tl.arange(0, BH)
    m_h = o_h < H
    if MODE == PACKED:
        base = i_tile * per_tile
        o_first, o_stop = search(p_ends, base + o_l, sequences, DEPTH)
        m_out = (o_first >= base) & (o_first < base + per_tile) & (o_l < rows - base)
        m_in = m_out & (base + o_l < o_stop)
        tl.store(p_places + base + o_l, tl.where(m_in, o_first, -1), mask=m_out)
    else:
        tl.store(p_arrived + i_tile, 0)
        base, m_out, m_in, o_first = places_of(
            i_tile, o_l, p_ends, p_places, rows, tiles, length, per_tile, magic, MODE
        )
    m_tile = m_in[:, None] & m_h[None, :]
    first = tl.cast(base, tl.int64)
    b_dt = tl.load(p_dt + (first + o_l)[:, None] * ROW + o_h[None, :], mask=m_tile, other=0.0).to(tl.float32)
    if p_factor is not None:
        o_factor = factor_places(i_tile, base, o_l, o_first, per_tile, magic, factor_batch, factor_row, MODE)
        p_at = p_factor + o_factor[:, None] + o_h[None, :] * factor_head
        b_dt *= tl.load(p_at, mask=m_tile, other=0.0).to(tl.float32)
    b_dt += tl.load(p_dt_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    b_step = tl.where(m_tile, softplus(b_dt), 0.0)
    b_A = -tl.exp(tl.load(p_A_log + o_h, mask=m_h, other=0.0).to(tl.float32))
    b_total = tl.cumsum(b_step.to(tl.float64) * (b_A.to(tl.float64) * LOG2E)[None, :], 0)
    b_high = b_total.to(tl.float32)
    b_low = (b_total - b_high.to(tl.float64)).to(tl.float32)
    p_to = p_steps + o_h.to(tl.int64)[None, :] * rows + (first + o_l)[:, None]
    m_tile = m_out[:, None] & m_h[None, :]
    plane = tl.cast(rows, tl.int64) * H
    tl.store(p_to, b_step, mask=m_tile)
    tl.store(p_to + plane, b_high, mask=m_tile)
    tl.store(p_to + 2 * plane, b_low, mask=m_tile)


@triton.jit(do_not_specialize=["rows", "tiles", "factor_batch"])
def block_steps_backward(
    p_dt,
    p_factor,
    p_A_log,
    p_dt_bias,
    p_ends,
    p_places,
    p_steps,
    p_dsteps,
    p_ddt,
    p_dfactor,
    p_sums,
    rows,
    tiles,
    length,
    per_tile,
    magic,
    factor_batch,
    factor_row,
    factor_head,
    ROW: tl.constexpr,
    ROW_D: tl.constexpr,
    ROW_SUMS: tl.constexpr,
    H: tl.constexpr,
    MODE: tl.constexpr,
    BL: tl.constexpr,
    BH: tl.constexpr,
):
    """Gradients of dt and the factor, and the sums over a tile of those of A_log [H] and dt_bias [H]."""
    i_tile = tl.program_id(0)
    o_l = tl.arange(0, BL)
    o_h = tl.arange(0, BH)
    m_h = o_h < H
    base, m_out, m_in, o_first = places_of(i_tile, o_l, p_ends, p_places, rows, tiles, length, per_tile, magic, MODE)
    o_row = tl.cast(base, tl.int64) + o_l
    mask = m_out[:, None] & m_h[None, :]
    inside = m_in[:, None] & m_h[None, :]
    o_at = o_h.to(tl.int64)[None, :] * rows + o_row[:, None]
    b_step = tl.load(p_steps + o_at, mask=inside, other=0.0)
    b_raw = tl.load(p_dt + o_row[:, None] * ROW + o_h[None, :], mask=inside, other=0.0).to(tl.float32)
    b_dt = b_raw
    if p_factor is not None:
        o_factor = factor_places(i_tile, base, o_l, o_first, per_tile, magic, factor_batch, factor_row, MODE)
        b_factor = tl.load(p_factor + o_factor[:, None] + o_h[None, :] * factor_head, mask=inside, other=0.0)
        b_factor = b_factor.to(tl.float32)
        b_dt *= b_factor
    b_dt += tl.load(p_dt_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    A = -tl.exp(tl.load(p_A_log + o_h, mask=m_h, other=0.0).to(tl.float32))[None, :]
    b_da = tl.load(p_dsteps + tl.cast(rows, tl.int64) * H + o_at, mask=inside, other=0.0)
    b_ddt = tl.load(p_dsteps + o_at, mask=inside, other=0.0) + b_da * A
    b_ddt = tl.where(inside, b_ddt * sigmoid(b_dt), 0.0)
    p_sums += i_tile.to(tl.int64) * ROW_SUMS + o_h
    tl.store(p_sums, tl.sum(b_da * b_step * A, 0), mask=m_h)
    tl.store(p_sums + H, tl.sum(b_ddt, 0), mask=m_h)
    if p_factor is not None:
        p_to = p_dfactor + o_row[:, None] * H + o_h[None, :]
        tl.store(p_to, (b_ddt * b_raw).to(p_dfactor.dtype.element_ty), mask=mask)
        b_ddt *= b_factor
    tl.store(p_ddt + o_row[:, None] * ROW_D + o_h[None, :], b_ddt.to(p_ddt.dtype.element_ty), mask=mask)


def tiling(projected: torch.Tensor, ends: torch.Tensor | None, packed: bool, longest: int) -> dict[str, int]:
    """The launch parameters that say where sequences lie, and the places of a tile."""
    batch, length = projected.shape[:2]
    where = {"rows": batch * length, "length": longest, "magic": 65536 // longest + 1, "BL": TILE}
    if packed:
        tiles = planned_tiles(batch * length, longest)
        return where | {"tiles": tiles, "per_tile": 0, "MODE": 2}
    per_tile = TILE // longest
    return where | {"tiles": triton.cdiv(batch, per_tile), "per_tile": per_tile, "MODE": 0 if ends is None else 1}


def known(where: dict[str, int]) -> int:
    """Places of a sequence if kernels are compiled for them, which spares masks and idle rows; else 0."""
    return where["length"] if where["per_tile"] and where["length"] > ops.SHORT else 0


def strides_of(factor: torch.Tensor | None) -> dict[str, int]:
    batch, row, head = (0, 0, 0) if factor is None else factor.stride()
    return {"factor_batch": batch, "factor_row": row, "factor_head": head}


def prepare(
    projected: torch.Tensor,
    factor: torch.Tensor | None,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steps [3, H, T], where packed sequences and tiles lie, and a zero for each tile.

    Of packed sequences that is, one behind the other, for each place the first of its sequence, and the first and
    last-plus-one place of each tile.
    """
    where = tiling(projected, ends, packed, longest)
    heads, batch, rows, tiles = A_log.shape[0], projected.shape[0], where["rows"], where["tiles"]
    steps = torch.empty(3, heads, rows, dtype=torch.float32, device=projected.device)
    places, arrived = (
        torch.empty(count, dtype=torch.int32, device=projected.device)
        for count in (rows + 2 * tiles if packed else 0, tiles)
    )
    programs, windows = tiles, where
    plan = {"sequences": batch, "DEPTH": 0, "SEGMENT": 1, "TILES": 1}
    if packed and ends is not None:
        sequences, size = ends.numel() - 1, 2 * tile(longest)
        segments = triton.cdiv(rows, SEGMENT)
        programs = triton.cdiv(rows, size - longest + 1) + segments
        windows = where | {"per_tile": size - longest + 1, "BL": size}
        plan = {
            "sequences": sequences,
            "DEPTH": max(12, sequences.bit_length()),
            "SEGMENT": SEGMENT,
            "TILES": tiles // segments,
        }
    block_steps[(programs,)](
        projected[..., -heads:],
        factor,
        A_log,
        dt_bias,
        ends,
        places,
        steps,
        arrived,
        **windows,
        **plan,
        **strides_of(factor),
        ROW=projected.stride(1),
        H=heads,
        TILE=TILE,
        BT=triton.next_power_of_2(plan["TILES"]),
        BH=triton.next_power_of_2(heads),
        num_warps=2,
    )
    return steps, places, arrived
