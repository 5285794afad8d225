"""The convolution by `causal_conv1d_fn` of the package causal-conv1d, made to mean what `causal_conv1d` means.

What differs there: channels come before places (a view of ours does), channels, strides and the first column must be
multiples of 8, taps and bias are float32 here, and nothing is known of right padding.
Letters: B sequences, L places, C channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch

from mmm4rec_kernels import sequences
from mmm4rec_kernels.backend import BackendUnavailable, load

UNIT = 8
"""What the number of channels, the strides of places and sequences and the first column must be a multiple of."""


class _ContiguousGradient(torch.autograd.Function):
    """The same tensor; its gradient arrives with strides that the package takes."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.contiguous()


def convolve(
    x_BLC: torch.Tensor,
    weight_CK: torch.Tensor,
    bias_C: torch.Tensor | None,
    activation: str | None,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """[B, L, C] in the dtype of x; arguments as in `causal_conv1d`.

    Raises:
        BackendUnavailable: the package cannot be imported, or cannot take the call.
    """
    channels = x_BLC.shape[2]
    if channels % UNIT:
        raise BackendUnavailable(
            f"causal_conv1d: backend 'causal_conv1d' cannot take this call: {channels} channels, no multiple of {UNIT}"
        )
    function = load("causal_conv1d", "causal_conv1d").causal_conv1d_fn
    outside = None
    if lengths is not None:
        outside = ~sequences.mask(lengths, x_BLC.shape[1])[..., None]
        x_BLC = x_BLC.masked_fill(outside, 0)
    if x_BLC.stride(2) != 1 or any(n % UNIT for n in (x_BLC.stride(0), x_BLC.stride(1), x_BLC.storage_offset())):
        x_BLC = x_BLC.contiguous()
    y_BCL = function(
        x_BLC.transpose(1, 2),
        weight_CK.float(),
        None if bias_C is None else bias_C.float(),
        seq_idx=None if cu_seqlens is None else sequences.numbers(cu_seqlens, x_BLC.shape[1]),
        activation=activation,
    )
    y: torch.Tensor = _ContiguousGradient.apply(y_BCL.transpose(1, 2))  # type: ignore[no-untyped-call]
    return y if outside is None else y.masked_fill(outside, 0)
