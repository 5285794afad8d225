"""The scan of Mamba-1: every channel has decays of its own (arXiv 2312.00752).

Letters: B sequences, L places, E channels, N state.
"""

from __future__ import annotations

import torch

from mmm4rec_kernels import arguments
from mmm4rec_kernels.backend import choose
from mmm4rec_kernels.selective import adapter, eager, reference
from mmm4rec_kernels.selective.ops import scan_forward

__all__ = ["selective_scan"]

MAX_STATE = 256
"""Largest state that the kernels take."""


def selective_scan(
    x_BLE: torch.Tensor,
    dt_BLE: torch.Tensor,
    A_EN: torch.Tensor,
    B_BLN: torch.Tensor,
    C_BLN: torch.Tensor,
    D_E: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """S[t] = exp(dt[t] A) S[t-1] + dt[t] x[t] B[t]ᵀ with S = 0 before the start; y[t] = S[t] C[t] + D x[t].

    Arithmetic is float32 for float16 and bfloat16, otherwise that of x.

    Args:
        x_BLE: [B, L, E].
        dt_BLE: [B, L, E], step sizes as they enter (softplus and bias are the caller's).
        A_EN: [E, N], negative.
        B_BLN: [B, L, N].
        C_BLN: [B, L, N].
        D_E: [E].
        backend: "auto", "reference", "torch", "triton" or "mamba_ssm" (the package mamba-ssm on a GPU).

    Returns:
        [B, L, E] in the dtype of x.

    Raises:
        ValueError: a shape, dtype, device or value is not as above; the message names the argument.
        BackendUnavailable: an explicit backend cannot run here or cannot take the call.
    """
    arguments.dimensions("x_BLE", x_BLE, "[B, L, E]", 3)
    arguments.floating("x_BLE", x_BLE)
    batch, length, channels = x_BLE.shape
    if length < 1:
        raise ValueError(f"x_BLE: expected shape [B, L, E] with L >= 1, got {list(x_BLE.shape)}")
    arguments.dimensions("A_EN", A_EN, "[E, N]", 2)
    states = A_EN.shape[1]
    arguments.shape("dt_BLE", dt_BLE, x_BLE.shape, "[B, L, E]")
    arguments.shape("A_EN", A_EN, (channels, states), "[E, N]")
    arguments.shape("B_BLN", B_BLN, (batch, length, states), "[B, L, N]")
    arguments.shape("C_BLN", C_BLN, (batch, length, states), "[B, L, N]")
    arguments.shape("D_E", D_E, (channels,), "[E]")
    rest = {"dt_BLE": dt_BLE, "A_EN": A_EN, "B_BLN": B_BLN, "C_BLN": C_BLN, "D_E": D_E}
    for name, tensor in rest.items():
        arguments.like(name, tensor, "x_BLE", x_BLE)

    fits = states <= MAX_STATE
    chosen = choose("selective_scan", backend, x_BLE, fits=fits, unfit=f"the state is wider than {MAX_STATE}")
    compute = torch.promote_types(x_BLE.dtype, torch.float32)
    inputs = [tensor.to(compute) for tensor in (x_BLE, *rest.values())]
    if chosen == "triton":
        y: torch.Tensor = scan_forward(*(tensor.contiguous() for tensor in inputs))
    else:
        y = {"reference": reference, "torch": eager, "mamba_ssm": adapter}[chosen].scan(*inputs)
    return y.to(x_BLE.dtype)
