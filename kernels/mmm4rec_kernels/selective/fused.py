# Triton kernels carry no Python types, and their arguments are explained at the top of the file.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""The scan of Mamba-1 as one Triton kernel each way, the state of a few channels in registers.

Letters: B sequences, L places, E channels, N state. A program takes BE channels of one sequence and walks along its
places. Backward it walks forward once more, leaving the states of all places in memory, and then back. What sums over
channels (the gradients of B and C) or sequences (of A and D) is summed in order behind the kernel, so results repeat
bit for bit. Everything is float32 and contiguous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ELEMENTS = 512
"""Elements of a state block: BE channels times N."""


@triton.jit(do_not_specialize=["length"])
def selective_forward(
    p_x, p_dt, p_a, p_b, p_c, p_d, p_y, length, E: tl.constexpr, N: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr
):
    i_s = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    o_n = tl.arange(0, BN)
    m_e, m_n = o_e < E, o_n < N
    mask = m_e[:, None] & m_n[None, :]
    b_a = tl.load(p_a + o_e[:, None] * N + o_n[None, :], mask=mask, other=0.0)
    b_d = tl.load(p_d + o_e, mask=m_e, other=0.0)
    p_x += i_s * length * E
    p_dt += i_s * length * E
    p_y += i_s * length * E
    p_b += i_s * length * N
    p_c += i_s * length * N
    b_state = tl.zeros([BE, BN], tl.float32)
    for t in range(0, length):
        b_x = tl.load(p_x + t * E + o_e, mask=m_e, other=0.0)
        b_dt = tl.load(p_dt + t * E + o_e, mask=m_e, other=0.0)
        b_b = tl.load(p_b + t * N + o_n, mask=m_n, other=0.0)
        b_c = tl.load(p_c + t * N + o_n, mask=m_n, other=0.0)
        b_state = tl.exp(b_dt[:, None] * b_a) * b_state + (b_dt * b_x)[:, None] * b_b[None, :]
        b_y = tl.sum(b_state * b_c[None, :], 1) + b_d * b_x
        tl.store(p_y + t * E + o_e, b_y, mask=m_e)


@triton.jit(do_not_specialize=["length", "sequences"])
def selective_backward(
    p_grad,
    p_x,
    p_dt,
    p_a,
    p_b,
    p_c,
    p_d,
    p_states,
    p_dx,
    p_ddt,
    p_da,
    p_db,
    p_dc,
    p_dd,
    length,
    sequences,
    E: tl.constexpr,
    N: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
):
    i_s = tl.program_id(0).to(tl.int64)
    i_e = tl.program_id(1)
    o_e = i_e * BE + tl.arange(0, BE)
    o_n = tl.arange(0, BN)
    m_e, m_n = o_e < E, o_n < N
    mask = m_e[:, None] & m_n[None, :]
    o_en = o_e[:, None] * N + o_n[None, :]
    b_a = tl.load(p_a + o_en, mask=mask, other=0.0)
    b_d = tl.load(p_d + o_e, mask=m_e, other=0.0)
    p_x += i_s * length * E
    p_dt += i_s * length * E
    p_grad += i_s * length * E
    p_dx += i_s * length * E
    p_ddt += i_s * length * E
    p_b += i_s * length * N
    p_c += i_s * length * N
    p_states += i_s * length * E * N
    o_part = (i_e * sequences + i_s) * length * N
    p_db += o_part
    p_dc += o_part
    b_state = tl.zeros([BE, BN], tl.float32)
    for t in range(0, length):
        b_x = tl.load(p_x + t * E + o_e, mask=m_e, other=0.0)
        b_dt = tl.load(p_dt + t * E + o_e, mask=m_e, other=0.0)
        b_b = tl.load(p_b + t * N + o_n, mask=m_n, other=0.0)
        b_state = tl.exp(b_dt[:, None] * b_a) * b_state + (b_dt * b_x)[:, None] * b_b[None, :]
        tl.store(p_states + tl.cast(t, tl.int64) * E * N + o_en, b_state, mask=mask)
    tl.debug_barrier()
    b_back = tl.zeros([BE, BN], tl.float32)
    b_da = tl.zeros([BE, BN], tl.float32)
    b_dd = tl.zeros([BE], tl.float32)
    for back in range(0, length):
        t = length - 1 - back
        b_x = tl.load(p_x + t * E + o_e, mask=m_e, other=0.0)
        b_dt = tl.load(p_dt + t * E + o_e, mask=m_e, other=0.0)
        b_grad = tl.load(p_grad + t * E + o_e, mask=m_e, other=0.0)
        b_b = tl.load(p_b + t * N + o_n, mask=m_n, other=0.0)
        b_c = tl.load(p_c + t * N + o_n, mask=m_n, other=0.0)
        p_before = p_states + tl.cast(t - 1, tl.int64) * E * N
        b_before = tl.load(p_before + o_en, mask=mask & (t > 0), other=0.0)
        b_decay = tl.exp(b_dt[:, None] * b_a)
        b_state = b_decay * b_before + (b_dt * b_x)[:, None] * b_b[None, :]
        b_back += b_grad[:, None] * b_c[None, :]
        tl.store(p_dc + t * N + o_n, tl.sum(b_grad[:, None] * b_state, 0), mask=m_n)
        tl.store(p_db + t * N + o_n, tl.sum(b_back * (b_dt * b_x)[:, None], 0), mask=m_n)
        b_input = tl.sum(b_back * b_b[None, :], 1)
        b_log = b_back * b_before * b_decay
        b_da += b_log * b_dt[:, None]
        b_dd += b_grad * b_x
        tl.store(p_dx + t * E + o_e, b_dt * b_input + b_d * b_grad, mask=m_e)
        tl.store(p_ddt + t * E + o_e, b_x * b_input + tl.sum(b_log * b_a, 1), mask=m_e)
        b_back *= b_decay
    tl.store(p_da + i_s * E * N + o_en, b_da, mask=mask)
    tl.store(p_dd + i_s * E + o_e, b_dd, mask=m_e)


def _blocks(channels: int, states: int) -> tuple[int, int]:
    wide = triton.next_power_of_2(states)
    return min(triton.next_power_of_2(channels), max(1, ELEMENTS // wide)), wide


def forward(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> torch.Tensor:
    """The result [B, L, E]."""
    y = torch.empty_like(x)
    (sequences, length, channels), states = x.shape, a.shape[1]
    rows, wide = _blocks(channels, states)
    if sequences:
        grid = sequences, triton.cdiv(channels, rows)
        selective_forward[grid](x, dt, a, b, c, d, y, length, E=channels, N=states, BE=rows, BN=wide, num_warps=2)
    return y


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, dt, A, B, C and D."""
    (sequences, length, channels), states = x.shape, a.shape[1]
    rows, wide = _blocks(channels, states)
    parts = triton.cdiv(channels, rows)
    d_x, d_dt = torch.empty_like(x), torch.empty_like(dt)
    all_states = x.new_empty(sequences, length, channels, states)
    d_a, d_d = x.new_empty(sequences, channels, states), x.new_empty(sequences, channels)
    d_b, d_c = (x.new_empty(parts, sequences, length, states) for _ in range(2))
    if sequences:
        selective_backward[(sequences, parts)](
            grad,
            x,
            dt,
            a,
            b,
            c,
            d,
            all_states,
            d_x,
            d_dt,
            d_a,
            d_b,
            d_c,
            d_d,
            length,
            sequences,
            E=channels,
            N=states,
            BE=rows,
            BN=wide,
            num_warps=2,
        )
    return d_x, d_dt, d_a.sum(0), d_b.sum(0), d_c.sum(0), d_d.sum(0)
