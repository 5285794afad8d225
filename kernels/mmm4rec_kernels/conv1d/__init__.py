"""Causal depthwise convolution over the places of a sequence, channels last.

Letters: B sequences, L places, C channels, K taps, T places of all packed sequences together.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from mmm4rec_kernels import arguments, sequences
from mmm4rec_kernels.backend import choose
from mmm4rec_kernels.conv1d import adapter, eager, reference
from mmm4rec_kernels.conv1d.ops import conv_forward

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x_BLC: torch.Tensor,
    weight_CK: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    lengths: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_length: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal depthwise convolution, with an optional SiLU behind it.

    y[t, c] = bias[c] + sum over k of weight[c, k] x[t - (K - 1) + k, c] with x = 0 before the start; the last tap is
    the present place. Arithmetic is float32 for float16 and bfloat16, otherwise that of the input.

    Args:
        x_BLC: [B, L, C], channels last, any strides.
        weight_CK: [C, K], 2 to 4 taps.
        bias: [C] or None.
        activation: "silu" or None.
        lengths: [B] int, sequences are right-padded: the result is 0 behind each end.
        cu_seqlens: [S + 1] int offsets of S packed sequences; then x is [1, T, C].
        max_length: with cu_seqlens, a bound on the longest sequence; None reads it from the device, which waits.
        backend: "auto", "reference", "torch", "triton" or "causal_conv1d" (the package causal-conv1d on a GPU; C must
            be a multiple of 8).

    Returns:
        [B, L, C] in the dtype of x.

    Raises:
        ValueError: a shape, dtype, device or value is not as above; the message names the argument.
        BackendUnavailable: an explicit backend cannot run here or cannot take the call.
    """
    arguments.dimensions("x_BLC", x_BLC, "[B, L, C]", 3)
    arguments.floating("x_BLC", x_BLC)
    batch, length, channels = x_BLC.shape
    if length < 1:
        raise ValueError(f"x_BLC: expected shape [B, L, C] with L >= 1, got {list(x_BLC.shape)}")
    arguments.dimensions("weight_CK", weight_CK, "[C, K]", 2)
    if weight_CK.shape[0] != channels or not 2 <= weight_CK.shape[1] <= 4:
        raise ValueError(f"weight_CK: expected shape [C, K] = [{channels}, 2 to 4], got {list(weight_CK.shape)}")
    arguments.like("weight_CK", weight_CK, "x_BLC", x_BLC)
    if bias is not None:
        arguments.shape("bias", bias, (channels,), "[C]")
        arguments.like("bias", bias, "x_BLC", x_BLC)
    arguments.member("activation", activation, (None, "silu"))
    sequences.check(lengths, cu_seqlens, batch, length, x_BLC.device)

    chosen = choose("causal_conv1d", backend, x_BLC, length=length if cu_seqlens is None else max_length)
    if chosen == "triton":
        out: torch.Tensor = conv_forward(
            x_BLC if x_BLC.stride(-1) == 1 else x_BLC.contiguous(),
            weight_CK.contiguous(),
            bias,
            lengths if cu_seqlens is None else cu_seqlens,
            cu_seqlens is not None,
            length if cu_seqlens is None else max_length or sequences.longest(cu_seqlens),
            activation == "silu",
        )
        return out
    if chosen == "causal_conv1d":
        return adapter.convolve(x_BLC, weight_CK, bias, activation, lengths, cu_seqlens)
    compute = torch.promote_types(x_BLC.dtype, torch.float32)
    x, weight = x_BLC.to(compute), weight_CK.to(compute)
    if cu_seqlens is not None:
        x = sequences.unpack(x, cu_seqlens, max_length or sequences.longest(cu_seqlens))
    convolve = reference.convolve if chosen == "reference" else eager.convolve
    y = convolve(x, weight, None if bias is None else bias.to(compute))
    if activation == "silu":
        y = F.silu(y)
    if lengths is not None:
        y = y.masked_fill(~sequences.mask(lengths, length)[..., None], 0)
    if cu_seqlens is not None:
        y = sequences.pack(y, cu_seqlens)
    return y.to(x_BLC.dtype)
