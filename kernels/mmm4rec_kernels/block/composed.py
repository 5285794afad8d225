"""The block as a chain of the single operations: the form that reads like its definition, on every device.

Letters: B sequences, L places, E width (heads times head dim), H heads, P head dim, G groups, N state,
C = E + 2GN channels.
"""

from __future__ import annotations

import torch

from mmm4rec_kernels.block.parts import Parts
from mmm4rec_kernels.conv1d import causal_conv1d
from mmm4rec_kernels.norm import gated_rms_norm
from mmm4rec_kernels.ssd import Skip, ssd


def run(
    parts: Parts,
    conv_weight_CK: torch.Tensor,
    conv_bias_C: torch.Tensor,
    A_log_H: torch.Tensor,
    D_H: torch.Tensor,
    dt_bias_H: torch.Tensor,
    norm_weight_E: torch.Tensor,
    *,
    groups: int,
    time_factor_BLH: torch.Tensor | None,
    eps: float,
    skip: Skip,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """The normalised output [B, L, E]; arguments as in `ssd_block`."""
    heads, width = A_log_H.shape[0], norm_weight_E.shape[0]
    columns, start = [], 0
    for run_BLC in parts.convolved:
        end = start + run_BLC.shape[-1]
        columns.append(
            causal_conv1d(
                run_BLC,
                conv_weight_CK[start:end],
                conv_bias_C[start:end],
                activation="silu",
                lengths=lengths,
                cu_seqlens=cu_seqlens,
                backend=backend,
            )
        )
        start = end
    states = (conv_weight_CK.shape[0] - width) // 2
    if len(columns) == 1:
        x_BLE, B_BLQ, C_BLQ = torch.split(columns[0], [width, states, states], -1)
    else:
        x_BLE, B_BLQ = torch.split(columns[0], [width, states], -1)
        C_BLQ = columns[1]
    dt_BLH = parts.dt if time_factor_BLH is None else parts.dt * time_factor_BLH
    y_BLHP = ssd(
        x_BLE.reshape(*x_BLE.shape[:2], heads, -1),
        dt_BLH,
        -torch.exp(A_log_H),
        B_BLQ.reshape(*B_BLQ.shape[:2], groups, -1),
        C_BLQ.reshape(*C_BLQ.shape[:2], groups, -1),
        D=D_H,
        dt_bias=dt_bias_H,
        skip=skip,
        lengths=lengths,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    normed = gated_rms_norm(y_BLHP.flatten(2), parts.z, norm_weight_E, eps=eps, backend=backend)
    if lengths is None:
        return normed
    outside = torch.arange(normed.shape[1], device=lengths.device) >= lengths[:, None]
    return normed.masked_fill(outside[..., None], 0)
