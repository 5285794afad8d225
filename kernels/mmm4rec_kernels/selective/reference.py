"""The scan of Mamba-1 as it is defined. Letters: B sequences, L places, E channels, N state."""

from __future__ import annotations

import torch


def scan(
    x_BLE: torch.Tensor,
    dt_BLE: torch.Tensor,
    A_EN: torch.Tensor,
    B_BLN: torch.Tensor,
    C_BLN: torch.Tensor,
    D_E: torch.Tensor,
) -> torch.Tensor:
    """S[t] = exp(dt[t] A) S[t-1] + dt[t] x[t] B[t]ᵀ with S = 0 before the start; y[t] = S[t] C[t] + D x[t]."""
    state_BEN = x_BLE.new_zeros(len(x_BLE), *A_EN.shape)
    outputs = []
    for t in range(x_BLE.shape[1]):
        x_BE, dt_BE = x_BLE[:, t], dt_BLE[:, t]
        state_BEN = torch.exp(dt_BE[:, :, None] * A_EN) * state_BEN + (dt_BE * x_BE)[:, :, None] * B_BLN[:, t, None]
        outputs.append((state_BEN * C_BLN[:, t, None]).sum(-1) + D_E * x_BE)
    return torch.stack(outputs, 1)
