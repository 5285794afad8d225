"""The convolution as a few shifted products on the channels-last layout: nothing is transposed or padded in memory.

Letters: B sequences, L places, C channels, K taps.
"""

from __future__ import annotations

from typing import Any

import torch


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.with_bias = bias is not None
        taps, length = weight.shape[1], x.shape[1]
        y = x * weight[:, -1] if bias is None else torch.addcmul(bias, x, weight[:, -1])
        for back in range(1, min(taps, length)):
            y[:, back:].addcmul_(x[:, :-back], weight[:, taps - 1 - back])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        taps, length = weight.shape[1], x.shape[1]
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = grad * weight[:, -1]
            for back in range(1, min(taps, length)):
                d_x[:, :-back].addcmul_(grad[:, back:], weight[:, taps - 1 - back])
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight)
            for back in range(min(taps, length)):
                d_weight[:, taps - 1 - back] = (grad[:, back:] * x[:, : length - back]).sum((0, 1))
        if ctx.with_bias and ctx.needs_input_grad[2]:
            d_bias = grad.sum((0, 1))
        return d_x, d_weight, d_bias


def convolve(x_BLC: torch.Tensor, weight_CK: torch.Tensor, bias_C: torch.Tensor | None) -> torch.Tensor:
    """As `reference.convolve`."""
    y: torch.Tensor = _Convolve.apply(x_BLC, weight_CK, bias_C)  # type: ignore[no-untyped-call]
    return y
