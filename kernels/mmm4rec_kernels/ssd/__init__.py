"""The state-space dual scan of Mamba-2 (Dao and Gu, 2024, section 3), at any length, on any backend.

Letters: B sequences, L places, H heads, P head dim, G groups, N state, T places of all packed sequences together.
"""

from __future__ import annotations

from typing import Literal, overload

import torch

from mmm4rec_kernels import arguments, sequences
from mmm4rec_kernels.backend import choose, without_autocast
from mmm4rec_kernels.ssd import adapter, eager, reference
from mmm4rec_kernels.ssd.ops import scan_forward, unfit
from mmm4rec_kernels.ssd.steps import step_sizes

__all__ = ["ssd"]

Skip = Literal["x", "dt_x"]


@overload
def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = ...,
    dt_bias: torch.Tensor | None = ...,
    dt_softplus: bool = ...,
    dt_limit: tuple[float, float] | None = ...,
    skip: Skip = ...,
    initial_states: torch.Tensor | None = ...,
    return_final_states: Literal[False] = ...,
    lengths: torch.Tensor | None = ...,
    cu_seqlens: torch.Tensor | None = ...,
    max_length: int | None = ...,
    backend: str = ...,
) -> torch.Tensor: ...


@overload
def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = ...,
    dt_bias: torch.Tensor | None = ...,
    dt_softplus: bool = ...,
    dt_limit: tuple[float, float] | None = ...,
    skip: Skip = ...,
    initial_states: torch.Tensor | None = ...,
    return_final_states: Literal[True],
    lengths: torch.Tensor | None = ...,
    cu_seqlens: torch.Tensor | None = ...,
    max_length: int | None = ...,
    backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] | None = None,
    skip: Skip = "x",
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_length: int | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Selective scan with one scalar decay a head.

    With d_t = clamp(softplus(dt_t + dt_bias)) and group g of head h (H/G neighbouring heads share a group):
    S_t = exp(A_h d_t) S_{t-1} + d_t x_t B_t^T, S of size P x N;  y_t = S_t C_t + D_h s_t,
    where s_t is x_t (skip="x", Mamba-2) or d_t x_t (skip="dt_x", the published MMM4Rec).
    Arithmetic is float32 for float16 and bfloat16, otherwise that of the inputs. Gradients reach every floating input.

    Args:
        x: [B, L, H, P], any strides.
        dt: [B, L, H] raw step sizes.
        A: [H], negative.
        B: [B, L, G, N] with G dividing H, dtype of x.
        C: [B, L, G, N], dtype of x.
        D: [H] or [H, P], or None for no skip term.
        dt_bias: [H], added to dt.
        dt_softplus: whether softplus follows the bias.
        dt_limit: (lowest, highest) step size, applied last.
        skip: what D multiplies, see above.
        initial_states: [B, H, P, N], S before the first place; zero if None.
        return_final_states: also return S behind each sequence's last place.
        lengths: [B] int, sequences are right-padded: y is 0 behind each end, and nothing there reaches the result.
        cu_seqlens: [S + 1] int offsets of S packed sequences; the leading dimensions are then [1, T], of states [S].
        max_length: with cu_seqlens, a bound on the longest sequence; None reads it from the device, which waits.
        backend: "auto", "reference", "torch", "triton" or "mamba_ssm" (the package mamba-ssm on a GPU: step sizes
            must not be negative, products of float32 are single TF32 ones, results need not repeat bit for bit).

    Returns:
        y [B, L, H, P] in the dtype of x; with return_final_states also the states [B, H, P, N] (float32 at least).

    Raises:
        ValueError: a shape, dtype, device or value is not as above; the message names the argument.
        BackendUnavailable: an explicit backend cannot run here or cannot take the call.
    """
    _check(x, dt, A, B, C, D, dt_bias, dt_limit, skip, initial_states, lengths, cu_seqlens)
    why = unfit(x.device, x.shape[3], B.shape[3])
    known = x.shape[1] if cu_seqlens is None else max_length
    chosen = choose("ssd", backend, x, fits=not why, unfit=why, length=known)
    if chosen == "triton":
        tensors = (x, dt, A, B, C, D, dt_bias, initial_states)
        gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        y, _, last = scan_forward(
            _rows(x),
            dt,
            A,
            _rows(B),
            _rows(C),
            D,
            dt_bias,
            initial_states,
            lengths if cu_seqlens is None else cu_seqlens,
            cu_seqlens is not None,
            x.shape[1] if cu_seqlens is None else max_length or sequences.longest(cu_seqlens),
            dt_softplus,
            None if dt_limit is None else list(dt_limit),
            skip == "dt_x",
            return_final_states,
            gradients,
        )
        return (y, last) if return_final_states else y
    final: torch.Tensor | None
    if chosen == "mamba_ssm":
        y, final = adapter.scan(
            x,
            dt,
            A,
            B,
            C,
            D,
            dt_bias,
            softplus=dt_softplus,
            limit=dt_limit,
            skip=skip,
            initial=initial_states,
            want_final=return_final_states,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
        )
        return y if final is None else (y, final)
    compute = torch.promote_types(x.dtype, torch.float32)
    x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN = (t.to(compute) for t in (x, dt, A, B, C))
    D_HP = None if D is None else D.to(compute).reshape(x.shape[2], -1)
    initial = None if initial_states is None else initial_states.to(compute)
    if lengths is not None:
        # Raw step sizes too, or what stands behind an end would reach the gradient of dt_bias.
        outside = ~sequences.mask(lengths, x.shape[1])
        dt_BLH = dt_BLH.masked_fill(outside[..., None], 0)
    dt_BLH = step_sizes(dt_BLH, None if dt_bias is None else dt_bias.to(compute), dt_softplus, dt_limit)
    if cu_seqlens is not None:
        longest = max_length or sequences.longest(cu_seqlens)
        x_BLHP, dt_BLH, B_BLGN, C_BLGN = (
            sequences.unpack(t, cu_seqlens, longest) for t in (x_BLHP, dt_BLH, B_BLGN, C_BLGN)
        )
    if lengths is not None:
        dt_BLH = dt_BLH.masked_fill(outside[..., None], 0)
        x_BLHP, B_BLGN, C_BLGN = (t.masked_fill(outside[..., None, None], 0) for t in (x_BLHP, B_BLGN, C_BLGN))
    with without_autocast(x):
        if chosen == "reference":
            y, final = reference.scan(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_HP, skip, initial)
        else:
            y, final = eager.scan(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_HP, skip, initial, return_final_states)
    if cu_seqlens is not None:
        y = sequences.pack(y, cu_seqlens)
    y = y.to(x.dtype)
    if not return_final_states:
        return y
    assert final is not None
    return y, final


def _rows(t: torch.Tensor) -> torch.Tensor:
    """The tensor with its last dimension contiguous."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _check(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_limit: tuple[float, float] | None,
    skip: str,
    initial_states: torch.Tensor | None,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    arguments.dimensions("x", x, "[B, L, H, P]", 4)
    arguments.floating("x", x)
    batch, length, heads, width = x.shape
    if length < 1:
        raise ValueError(f"x: expected shape [B, L, H, P] with L >= 1, got {list(x.shape)}")
    arguments.shape("dt", dt, (batch, length, heads), "[B, L, H]")
    arguments.shape("A", A, (heads,), "[H]")
    arguments.dimensions("B", B, "[B, L, G, N]", 4)
    groups, state = B.shape[2:]
    if B.shape[:2] != x.shape[:2]:
        raise ValueError(f"B: expected shape [B, L, G, N] = [{batch}, {length}, G, N], got {list(B.shape)}")
    if groups == 0 or heads % groups:
        raise ValueError(f"B: expected shape [B, L, G, N] with G dividing H = {heads}, got G = {groups}")
    arguments.shape("C", C, (batch, length, groups, state), "[B, L, G, N]")
    for name, tensor in (("B", B), ("C", C)):
        arguments.like(name, tensor, "x", x, dtype=True)
    for name, optional in (("dt", dt), ("A", A), ("D", D), ("dt_bias", dt_bias), ("initial_states", initial_states)):
        if optional is not None:
            arguments.like(name, optional, "x", x)
    if D is not None and tuple(D.shape) not in ((heads,), (heads, width)):
        raise ValueError(f"D: expected shape [H] = [{heads}] or [H, P] = [{heads}, {width}], got {list(D.shape)}")
    if dt_bias is not None:
        arguments.shape("dt_bias", dt_bias, (heads,), "[H]")
    if dt_limit is not None and not (len(dt_limit) == 2 and dt_limit[0] <= dt_limit[1]):
        raise ValueError(f"dt_limit: expected (lowest, highest), got {dt_limit!r}")
    arguments.member("skip", skip, ("x", "dt_x"))
    sequences.check(lengths, cu_seqlens, batch, length, x.device)
    if initial_states is not None:
        count = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        arguments.shape("initial_states", initial_states, (count, heads, width, state), "[B, H, P, N]")
