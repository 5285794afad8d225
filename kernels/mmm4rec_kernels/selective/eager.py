"""The scan of Mamba-1 place by place with few torch operations a place.

Letters: B sequences, L places, E channels, N state.
"""

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
    """As `reference.scan`."""
    state_BEN = x_BLE.new_zeros(x_BLE.shape[0], *A_EN.shape)
    read = []
    places = zip(x_BLE.unbind(1), dt_BLE.unbind(1), B_BLN.unbind(1), C_BLN.unbind(1), strict=True)
    for x_BE, dt_BE, B_BN, C_BN in places:
        decay_BEN = torch.exp(dt_BE[..., None] * A_EN)
        state_BEN = torch.addcmul((dt_BE * x_BE)[..., None] * B_BN[:, None], decay_BEN, state_BEN)
        read.append(torch.einsum("ben,bn->be", state_BEN, C_BN))
    return torch.addcmul(torch.stack(read, 1), D_E, x_BLE)
