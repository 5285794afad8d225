"""The scan of Mamba-1 by `selective_scan_fn` of the package mamba-ssm, which wants places last."""

from __future__ import annotations

import torch

from mmm4rec_kernels.backend import load

MODULE = "mamba_ssm.ops.selective_scan_interface"


def scan(
    x_BLE: torch.Tensor,
    dt_BLE: torch.Tensor,
    A_EN: torch.Tensor,
    B_BLN: torch.Tensor,
    C_BLN: torch.Tensor,
    D_E: torch.Tensor,
) -> torch.Tensor:
    """[B, L, E]; arguments as of `selective_scan`, in float32.

    Raises:
        BackendUnavailable: the package cannot be imported.
    """
    their_scan = load("mamba_ssm", MODULE).selective_scan_fn
    x_BEL, dt_BEL, B_BNL, C_BNL = (t.transpose(1, 2).contiguous() for t in (x_BLE, dt_BLE, B_BLN, C_BLN))
    y_BEL: torch.Tensor = their_scan(x_BEL, dt_BEL, A_EN, B_BNL, C_BNL, D_E)
    return y_BEL.transpose(1, 2)
