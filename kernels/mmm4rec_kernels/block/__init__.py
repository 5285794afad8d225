"""Everything of a state-space block between its in-projections and its out-projection, in one call.

Letters: B sequences, L places, E width (heads times head dim), H heads, P head dim, G groups, N state,
C = E + 2GN channels.
K taps, T places of all packed sequences together.
"""

from __future__ import annotations

import torch

from mmm4rec_kernels import arguments, sequences
from mmm4rec_kernels.backend import choose
from mmm4rec_kernels.block import composed
from mmm4rec_kernels.block.ops import several_in_a_tile, short_forward, ssd_block_forward
from mmm4rec_kernels.block.parts import CrossProjections, cut
from mmm4rec_kernels.block.tail import ssd_block_tail, tail_unfit
from mmm4rec_kernels.ssd import Skip
from mmm4rec_kernels.ssd.ops import unfit as scan_unfit

__all__ = ["CrossProjections", "ssd_block", "ssd_block_tail", "tail_unfit"]


def ssd_block(
    projected: torch.Tensor | CrossProjections,
    conv_weight_CK: torch.Tensor,
    conv_bias_C: torch.Tensor,
    A_log_H: torch.Tensor,
    D_H: torch.Tensor,
    dt_bias_H: torch.Tensor,
    norm_weight_E: torch.Tensor,
    *,
    n_groups: int,
    eps: float,
    time_factor_BLH: torch.Tensor | None = None,
    skip: Skip = "dt_x",
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_length: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Convolution, SiLU, split, time factor, scan, skip, gate and norm.

    The convolved columns are x (head-major), B and C (group-major), in this order. With (x, B, C) =
    silu(conv(columns)), dt' = dt times time_factor and A = -exp(A_log):
    y = ssd(x, dt', A, B, C, D, dt_bias, softplus, skip) and the result is
    norm_weight g / sqrt(mean(g^2) + eps), g = y silu(z), the mean over all E columns.
    Sizes follow from the parameters: H from A_log, E from norm_weight, P = E/H, N = (C - E)/2G. Arithmetic is float32
    for float16 and bfloat16, otherwise that of the projections. Gradients reach every floating input. The sources are
    the block of Mamba-2 (Dao and Gu, 2024, section 7) and the self and cross blocks of the published MMM4Rec.

    Args:
        projected: either one in-projection's output [B, L, 2E + 2GN + H], columns z, x, B, C, dt; or CrossProjections:
            xBdt [B, L, E + GN + H], z [B, L, E] and C [B, L, GN]. The columns of a place are contiguous.
        conv_weight_CK: [E + 2GN, K] taps of the columns x, B, C, 2 to 4 taps, the last one for the present place.
        conv_bias_C: [E + 2GN].
        A_log_H: [H].
        D_H: [H].
        dt_bias_H: [H].
        norm_weight_E: [E].
        n_groups: G, divides H.
        eps: added to the mean square inside the root.
        time_factor_BLH: [B, L, H], any strides, multiplies dt before dt_bias and softplus; None for none.
        skip: "dt_x" (published MMM4Rec) or "x" (Mamba-2), what D multiplies.
        lengths: [B] int, sequences are right-padded: the result is 0 behind each end, and nothing there reaches it.
        cu_seqlens: [S + 1] int offsets of S packed sequences; then the leading dimensions are [1, T].
        max_length: with cu_seqlens, a bound on the longest sequence; None reads it from the device, which waits.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        [B, L, E] in the dtype of the projections.

    Raises:
        ValueError: a shape, dtype, device or value is not as above; the message names the argument.
        BackendUnavailable: an explicit backend cannot run here or cannot take the call.
    """
    main = projected.xBdt if isinstance(projected, CrossProjections) else projected
    _check(
        projected, main, conv_weight_CK, conv_bias_C, A_log_H, D_H, dt_bias_H, norm_weight_E, n_groups, time_factor_BLH
    )
    arguments.member("skip", skip, ("x", "dt_x"))
    sequences.check(lengths, cu_seqlens, main.shape[0], main.shape[1], main.device)
    width, heads = norm_weight_E.shape[0], A_log_H.shape[0]
    states = (conv_weight_CK.shape[0] - width) // 2
    unfit = _unfit(projected, width // heads, states // n_groups)
    known = main.shape[1] if cu_seqlens is None else max_length
    chosen = choose("ssd_block", backend, main, fits=not unfit, unfit=unfit, length=known)
    if chosen == "triton":
        longest = main.shape[1] if cu_seqlens is None else max_length or sequences.longest(cu_seqlens)
        crossing = projected if isinstance(projected, CrossProjections) else None
        out: torch.Tensor
        tensors = (
            main,
            None if crossing is None else crossing.z,
            None if crossing is None else crossing.C,
            time_factor_BLH,
            conv_weight_CK.contiguous(),
            conv_bias_C,
            A_log_H,
            D_H,
            dt_bias_H,
            norm_weight_E,
        )
        gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        joined = n_groups == heads and main.dtype == torch.float32
        several = several_in_a_tile(cu_seqlens is not None, longest, gradients, joined)
        out, *_ = (short_forward if several else ssd_block_forward)(
            *tensors,
            lengths if cu_seqlens is None else cu_seqlens,
            cu_seqlens is not None,
            longest,
            n_groups,
            eps,
            skip == "dt_x",
        )
        return out
    return composed.run(
        cut(projected, width, states, heads),
        conv_weight_CK,
        conv_bias_C,
        A_log_H,
        D_H,
        dt_bias_H,
        norm_weight_E,
        groups=n_groups,
        time_factor_BLH=time_factor_BLH,
        eps=eps,
        skip=skip,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        backend=chosen,
    )


def _unfit(projected: torch.Tensor | CrossProjections, head_dim: int, state: int) -> str:
    """Why the fused kernels cannot take these sizes; empty if they can."""
    tensors = projected if isinstance(projected, CrossProjections) else (projected,)
    why = scan_unfit(tensors[0].device, head_dim, state)
    if why:
        return why
    if any(t.stride(-1) != 1 for t in tensors):
        return "the columns of a place are not contiguous"
    return ""


def _check(
    projected: torch.Tensor | CrossProjections,
    main: torch.Tensor,
    conv_weight_CK: torch.Tensor,
    conv_bias_C: torch.Tensor,
    A_log_H: torch.Tensor,
    D_H: torch.Tensor,
    dt_bias_H: torch.Tensor,
    norm_weight_E: torch.Tensor,
    n_groups: int,
    time_factor_BLH: torch.Tensor | None,
) -> None:
    arguments.dimensions("A_log_H", A_log_H, "[H]", 1)
    arguments.dimensions("norm_weight_E", norm_weight_E, "[E]", 1)
    arguments.dimensions("conv_weight_CK", conv_weight_CK, "[C, K]", 2)
    heads, width, (channels, taps) = A_log_H.shape[0], norm_weight_E.shape[0], conv_weight_CK.shape
    if heads == 0 or width % heads:
        raise ValueError(f"norm_weight_E: expected shape [E] with E a multiple of H = {heads}, got {width}")
    if n_groups < 1 or heads % n_groups:
        raise ValueError(f"n_groups: expected a divisor of H = {heads}, got {n_groups}")
    if channels <= width or (channels - width) % (2 * n_groups) or not 2 <= taps <= 4:
        raise ValueError(
            f"conv_weight_CK: expected shape [E + 2GN, K] = [{width} + {2 * n_groups} N, 2 to 4], "
            f"got {list(conv_weight_CK.shape)}"
        )
    states = (channels - width) // 2
    name = "projected.xBdt" if isinstance(projected, CrossProjections) else "projected"
    arguments.dimensions(name, main, "[B, L, ...]", 3)
    arguments.floating(name, main)
    batch, length = main.shape[:2]
    if length < 1:
        raise ValueError(f"{name}: expected at least one place, got {list(main.shape)}")
    if isinstance(projected, CrossProjections):
        arguments.shape(name, main, (batch, length, width + states + heads), "[B, L, E + GN + H]")
        arguments.shape("projected.z", projected.z, (batch, length, width), "[B, L, E]")
        arguments.shape("projected.C", projected.C, (batch, length, states), "[B, L, GN]")
        arguments.like("projected.z", projected.z, name, main, dtype=True)
        arguments.like("projected.C", projected.C, name, main, dtype=True)
    else:
        arguments.shape(name, main, (batch, length, 2 * (width + states) + heads), "[B, L, 2E + 2GN + H]")
    for label, tensor, size, letters in (
        ("conv_bias_C", conv_bias_C, channels, "[E + 2GN]"),
        ("D_H", D_H, heads, "[H]"),
        ("dt_bias_H", dt_bias_H, heads, "[H]"),
    ):
        arguments.shape(label, tensor, (size,), letters)
        arguments.like(label, tensor, name, main)
    for label, tensor in (
        ("A_log_H", A_log_H),
        ("norm_weight_E", norm_weight_E),
        ("conv_weight_CK", conv_weight_CK),
    ):
        arguments.like(label, tensor, name, main)
    if time_factor_BLH is not None:
        arguments.shape("time_factor_BLH", time_factor_BLH, (batch, length, heads), "[B, L, H]")
        arguments.like("time_factor_BLH", time_factor_BLH, name, main)
