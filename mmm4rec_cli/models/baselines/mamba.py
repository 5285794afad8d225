"""A Mamba-1 block (arXiv 2312.00752) on our own scan, or on mamba-ssm's where it is installed.

Letters: B users, L places, D width, E = expand * D, N state, R rank of the step sizes.
"""

import math
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmm4rec_cli.models.time_stream import CausalConv
from mmm4rec_cli.settings.schema import ModelSettings
from mmm4rec_kernels import BackendUnavailable, causal_conv1d, selective_scan
from mmm4rec_kernels.backend import availability


def scan_places(x_BLE: Tensor, step_BLE: Tensor, A_EN: Tensor, B_BLN: Tensor, C_BLN: Tensor, D_E: Tensor) -> Tensor:
    """The recurrence S <- exp(step A) S + (step x) Bᵀ, y = S C + D x; [B, L, E].

    By mamba-ssm's kernel for float32 on a GPU where it is there and can be loaded, else by our own.
    """
    inputs = (x_BLE, step_BLE, A_EN, B_BLN, C_BLN, D_E)
    if x_BLE.is_cuda and x_BLE.dtype == torch.float32 and availability("mamba_ssm").available:
        with suppress(BackendUnavailable):  # a build for another torch or CUDA; after this it counts as absent
            return selective_scan(*inputs, backend="mamba_ssm")
    return selective_scan(*inputs)


class Mamba(nn.Module):
    """One Mamba-1 block; its own start values are mamba-ssm's."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__()
        width, inner, states = config.hidden_size, config.expand * config.hidden_size, config.d_state
        self.rank = -(-width // 16)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv = CausalConv(inner, config.d_conv)
        self.x_proj = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        # A step size between 0.001 and 0.1 at the start, through the inverse of softplus.
        step = torch.exp(torch.empty(inner).uniform_(math.log(0.001), math.log(0.1))).clamp(min=1e-4)
        with torch.no_grad():
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, u_BLD: Tensor) -> Tensor:
        """[B, L, D] in and out."""
        x_BLE, z_BLE = self.in_proj(u_BLD).chunk(2, dim=-1)
        x_BLE = causal_conv1d(x_BLE, self.conv.weight, self.conv.bias, activation="silu")
        states = self.A_log.shape[1]
        dt_BLR, B_BLN, C_BLN = self.x_proj(x_BLE).split([self.rank, states, states], dim=-1)
        step_BLE = F.softplus(self.dt_proj(dt_BLR))
        y_BLE = scan_places(x_BLE, step_BLE, -torch.exp(self.A_log), B_BLN, C_BLN, self.D)
        out: Tensor = self.out_proj(y_BLE * F.silu(z_BLE))
        return out


class MambaSublayer(nn.Module):
    """Mamba, dropout, residual, norm."""

    def __init__(self, config: ModelSettings, *, residual: bool = True) -> None:
        super().__init__()
        self.mamba = Mamba(config)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.residual = residual

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] in and out."""
        out_BLD = self.dropout(self.mamba(x_BLD))
        normed: Tensor = self.norm(out_BLD + x_BLD if self.residual else out_BLD)
        return normed


def kept_at_start(config: ModelSettings) -> tuple[type[nn.Module], ...]:
    """What `draw_start` leaves alone: Mamba blocks, unless the published start is wanted (Q28)."""
    return () if config.baseline.mamba_start == "redrawn" else (Mamba,)
