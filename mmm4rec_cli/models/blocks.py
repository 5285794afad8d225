"""The blocks of MMM4Rec (paper section 4; published behaviour in every detail).

Letters: B users, L = T places, D width, E = expand * D, H heads, P head dim, G groups, N state.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmm4rec_cli.models.time_stream import CausalConv, FourierFilter, TimeFactor
from mmm4rec_cli.settings.schema import ModelSettings
from mmm4rec_kernels import gated_rms_norm, ssd


class RMSGate(nn.Module):
    """Weight [E] of the gated root-mean-square norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class StateSpace(nn.Module):
    """What the two SSD blocks share: the scan's own parameters, the gated norm, the way out."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__()
        heads, inner = config.n_heads, config.expand * config.hidden_size
        self.n_heads, self.inner = heads, inner
        self.head_dim, self.n_groups, self.d_state = config.head_dim, config.n_groups, config.d_state
        self.eps = config.norm_eps
        # A step size between 0.001 and 0.1 at the start, through the inverse of softplus.
        step = torch.exp(torch.empty(heads).uniform_(math.log(0.001), math.log(0.1))).clamp(min=1e-4)
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSGate(inner)
        self.out_proj = nn.Linear(inner, config.hidden_size)
        self.time: TimeFactor | None = None
        if config.time != "none":
            self.time = TimeFactor(heads, config.max_len, config.d_conv, config.time_dropout)

    def factor(self, stream_BHT: Tensor | None) -> Tensor | None:
        """The factor on the step sizes, [B, H, T], or None without a time stream."""
        return None if self.time is None or stream_BHT is None else self.time(stream_BHT)

    def scan(self, x_BLE: Tensor, dt_BLH: Tensor, b_BLK: Tensor, c_BLK: Tensor, z_BLE: Tensor) -> Tensor:
        """Scan, gate, normalise and project: [B, L, D]. K = G * N, group-major."""
        heads, groups = (self.n_heads, self.head_dim), (self.n_groups, self.d_state)
        y_BLHP = ssd(
            torch.unflatten(x_BLE, -1, heads),
            dt_BLH,
            -torch.exp(self.A_log),
            torch.unflatten(b_BLK, -1, groups),
            torch.unflatten(c_BLK, -1, groups),
            D=self.D,
            dt_bias=self.dt_bias,
            skip="dt_x",
        )
        out_BLD: Tensor = self.out_proj(gated_rms_norm(y_BLHP.flatten(2), z_BLE, self.norm.weight, eps=self.eps))
        return out_BLD


class SSD(StateSpace):
    """The self block: one stream reads itself (spec 3.6)."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__(config)
        groups = config.n_groups * config.d_state
        self.splits = [self.inner, groups, groups]
        self.in_proj = nn.Linear(config.hidden_size, 2 * self.inner + 2 * groups + self.n_heads)
        self.conv = CausalConv(self.inner + 2 * groups, config.d_conv)
        if config.time != "none":
            self.time_gate = nn.Linear(config.max_len, config.max_len if config.point_time_gate else 1)
            self.time_norm = nn.LayerNorm(config.max_len, eps=config.norm_eps)
            self.time_dropout = nn.Dropout(config.time_dropout)

    def forward(self, u_BLD: Tensor, stream_BHT: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The block's output [B, L, D] and the next time stream."""
        z_BLE, xbc, dt_BLH = self.in_proj(u_BLD).split([self.inner, sum(self.splits), self.n_heads], dim=-1)
        x_BLE, b_BLK, c_BLK = self.conv(xbc).split(self.splits, dim=-1)
        w_BHT = self.factor(stream_BHT)
        if w_BHT is not None:
            dt_BLH = dt_BLH * w_BHT.transpose(1, 2)
        out_BLD = self.scan(x_BLE, dt_BLH, b_BLK, c_BLK, z_BLE)
        if stream_BHT is None or w_BHT is None:
            return out_BLD, None
        gate = torch.sigmoid(self.time_gate(self.time_dropout(stream_BHT)))
        return out_BLD, self.time_norm(gate * stream_BHT + (1 - gate) * w_BHT)


class CrossSSD(StateSpace):
    """The cross-modal block: `u` (text) writes the state, `q` (image) reads it, both gate it (spec 3.9, step 3)."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__(config)
        groups = config.n_groups * config.d_state
        self.splits = [self.inner, groups]
        self.u_in_proj = nn.Linear(config.hidden_size, self.inner + groups + self.n_heads)
        self.z_in_proj = nn.Linear(config.hidden_size, self.inner)
        self.q_in_proj = nn.Linear(config.hidden_size, groups)
        self.u_conv = CausalConv(self.inner + groups, config.d_conv)
        self.q_conv = CausalConv(groups, config.d_conv)

    def forward(self, q_BLD: Tensor, u_BLD: Tensor, stream_BHT: Tensor | None) -> Tensor:
        """The block's output [B, L, D]; its time stream ends here."""
        xb, dt_BLH = self.u_in_proj(u_BLD).split([sum(self.splits), self.n_heads], dim=-1)
        z_BLE = self.z_in_proj(q_BLD + u_BLD)
        x_BLE, b_BLK = self.u_conv(xb).split(self.splits, dim=-1)
        c_BLK = self.q_conv(self.q_in_proj(q_BLD))
        w_BHT = self.factor(stream_BHT)
        if w_BHT is not None:
            dt_BLH = dt_BLH * w_BHT.transpose(1, 2)
        return self.scan(x_BLE, dt_BLH, b_BLK, c_BLK, z_BLE)


class FeedForward(nn.Module):
    """Hardswish feed-forward with its residual and norm (spec 3.7; the norm's eps is fixed at 1e-12)."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.inner_size)
        self.fc2 = nn.Linear(config.inner_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] in and out."""
        out: Tensor = self.norm(self.dropout(self.fc2(self.dropout(F.hardswish(self.fc1(x))))) + x)
        return out


class CrossModalLayer(nn.Module):
    """One encoder layer (text) and one decoder layer (image, then image reading text) with a shared SSD block."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__()

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

        def feed_forward() -> nn.Module:
            return FeedForward(config) if config.feed_forward else nn.Identity()

        self.ssd = SSD(config)
        self.text_norm, self.text_ffn = norm(), feed_forward()
        self.image_norm = norm()
        self.cross_ssd = CrossSSD(config)
        self.cross_norm, self.image_ffn = norm(), feed_forward()
        self.filter = FourierFilter(config.max_len) if config.time != "none" else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, text_BLD: Tensor, image_BLD: Tensor, text_BHT: Tensor | None, image_BHT: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """New text, new image, new time stream of each (the streams unfiltered)."""
        out, text_BHT = self.ssd(text_BLD, text_BHT)
        text_BLD = self.text_ffn(self.text_norm(self.dropout(out) + text_BLD))

        out, image_BHT = self.ssd(image_BLD, image_BHT)
        query_BLD = self.image_norm(self.dropout(out) + image_BLD)
        joint_BHT = None
        if self.filter is not None and image_BHT is not None and text_BHT is not None:
            joint_BHT = self.filter(image_BHT, text_BHT)
        out = self.cross_ssd(query_BLD, text_BLD, joint_BHT)
        image_BLD = self.image_ffn(self.cross_norm(self.dropout(out) + query_BLD + text_BLD))
        return text_BLD, image_BLD, text_BHT, image_BHT
