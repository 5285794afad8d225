"""The convolution as it is defined: every output place on its own.

Letters: B sequences, L places, C channels, K taps.
"""

from __future__ import annotations

import torch


def convolve(x_BLC: torch.Tensor, weight_CK: torch.Tensor, bias_C: torch.Tensor | None) -> torch.Tensor:
    """y[t, c] = bias[c] + sum over k of weight[c, k] x[t - (K - 1) + k, c], with x = 0 before the start."""
    taps = weight_CK.shape[1]
    outputs = []
    for t in range(x_BLC.shape[1]):
        y = torch.zeros_like(x_BLC[:, t]) if bias_C is None else bias_C.expand_as(x_BLC[:, t])
        for k in range(taps):
            place = t - (taps - 1) + k
            if place >= 0:
                y = y + weight_CK[:, k] * x_BLC[:, place]
        outputs.append(y)
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(x_BLC)
