"""The scan as operators of torch, with shapes for tracing and a gradient. The kernels are imported when one runs.

Letters: B sequences, L places, H heads, P head dim, G groups, N state, K chunks of a sequence.
"""

from __future__ import annotations

from typing import Any

import torch

from mmm4rec_kernels.operators import operator

ONE_TILE = 64
"""Most places of a chunk. Where head dim times state is more than 64 times 64 it is half as much, and a quarter where
it is twice as much again: the states of a chunk then fill the shared memory of small GPUs, 99 KB."""
MAX_WIDTH = 128
"""Largest head dim and state that the kernels take."""
WIDEST_SHARED = 110 * 1024
"""Bytes of shared memory that a program needs where head dim times state is more than twice 64 times 64."""


def _rounded(size: int) -> int:
    """The power of two that holds `size`, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def unfit(device: torch.device, width: int, state: int) -> str:
    """Why the kernels cannot take this head dim and state on this device; empty if they can."""
    if max(width, state) > MAX_WIDTH:
        return f"head dim {width} and state {state}, at most {MAX_WIDTH}"
    if device.type == "cuda" and _rounded(width) * _rounded(state) > 2 * ONE_TILE**2:
        properties = torch.cuda.get_device_properties(device)
        memory = getattr(properties, "shared_memory_per_block_optin", WIDEST_SHARED)
        if memory < WIDEST_SHARED:
            return (
                f"head dim {width} and state {state} need {WIDEST_SHARED} bytes of shared memory, the GPU has {memory}"
            )
    return ""


def chunk_places(longest: int, width: int, state: int, dtype: torch.dtype) -> int:
    """Places of a chunk, for the longest sequence, the head dim and the state.

    Beside a state, float32 tiles of 32 places were faster on an H100, narrower ones of 64.
    """
    area = _rounded(width) * _rounded(state)
    most = ONE_TILE if area <= ONE_TILE**2 else ONE_TILE // 2 if area <= 2 * ONE_TILE**2 else ONE_TILE // 4
    if longest > most and dtype == torch.float32:
        most = min(most, ONE_TILE // 2)
    return min(_rounded(longest), most)


def chunks(longest: int, width: int, state: int, dtype: torch.dtype) -> int:
    """Chunks of the longest sequence."""
    return -(-longest // chunk_places(longest, width, state, dtype))


@operator("mmm4rec_kernels::ssd")
def scan_forward(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    softplus: bool,
    limit: list[float] | None,
    skip_dt: bool,
    want_final: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Y [B, L, H, P], states [B, H, K, P, N] with `keep`, last states [B, H, P, N]; arguments as in `fused.forward`."""
    from mmm4rec_kernels.ssd import fused

    low_high = None if limit is None else (limit[0], limit[1])
    return fused.forward(
        x, dt, A, B, C, D, bias, initial, ends, packed, longest, softplus, low_high, skip_dt, want_final, None, keep
    )


@scan_forward.register_fake
def _forward_shapes(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    softplus: bool,
    limit: list[float] | None,
    skip_dt: bool,
    want_final: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sequences = ends.shape[0] - 1 if packed and ends is not None else x.shape[0]
    states = (sequences, x.shape[2], x.shape[3], B.shape[3])
    count = chunks(longest, *states[2:], x.dtype)
    keep = keep and (count > 1 or initial is not None or want_final)
    return (
        x.new_empty(x.shape),
        x.new_empty((*states[:2], count, *states[2:]) if keep else (0,), dtype=torch.float32),
        x.new_empty(states if want_final else (0,), dtype=torch.float32),
    )


@operator("mmm4rec_kernels::ssd_backward")
def scan_backward(
    grad: torch.Tensor,
    grad_final: torch.Tensor | None,
    states: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    softplus: bool,
    limit: list[float] | None,
    skip_dt: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, dt, B, C, initial, of A, bias and D together [3, H], and of D [H, P]."""
    from mmm4rec_kernels.ssd import fused

    low_high = None if limit is None else (limit[0], limit[1])
    d_x, d_dt, d_B, d_C, d_initial, sums, d_D = fused.backward(
        grad,
        grad_final,
        states,
        x,
        dt,
        A,
        B,
        C,
        D,
        bias,
        initial,
        ends,
        packed,
        longest,
        softplus,
        low_high,
        skip_dt,
    )
    return d_x.view(x.shape), d_dt, d_B.view(B.shape), d_C.view(B.shape), d_initial, sums, d_D


@scan_backward.register_fake
def _backward_shapes(
    grad: torch.Tensor,
    grad_final: torch.Tensor | None,
    states: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    initial: torch.Tensor | None,
    *arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = D is not None and D.dim() == 2
    return (
        x.new_empty(x.shape),
        dt.new_empty(dt.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        x.new_empty((0,) if initial is None else initial.shape, dtype=torch.float32),
        x.new_empty((3, x.shape[2]), dtype=torch.float32),
        x.new_empty(x.shape[2:] if wide else (0,), dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.options = inputs[9:14]
    ctx.save_for_backward(output[1], *inputs[:9])


def _backward(
    ctx: Any, grad: torch.Tensor | None, _: torch.Tensor | None, grad_final: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    states, *tensors = ctx.saved_tensors
    x, _dt, A, _B, _C, D, bias, initial, _ends = tensors
    if grad is None and grad_final is None:
        return (None,) * 16
    if grad is None:
        grad = torch.zeros_like(x)
    if grad_final is not None and grad_final.numel() == 0:
        grad_final = None
    d_x, d_dt, d_B, d_C, d_initial, sums, wide = scan_backward(grad, grad_final, states, *tensors, *ctx.options)
    d_D = None
    if D is not None:
        d_D = (wide if D.dim() == 2 else sums[2]).to(D.dtype)
    return (
        d_x,
        d_dt,
        sums[0].to(A.dtype),
        d_B,
        d_C,
        d_D,
        None if bias is None else sums[1].to(bias.dtype),
        None if initial is None else d_initial.to(initial.dtype),
        *(None,) * 8,
    )


scan_forward.register_autograd(_backward, setup_context=_save)
