"""The blocks of MMM4Rec (paper section 4; published behaviour in every detail).

Letters: B users, L = T places, D width, E = expand * D, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmm4rec_cli.models.time_stream import CausalConv, FourierFilter, TimeFactor
from mmm4rec_cli.settings.schema import ModelSettings
from mmm4rec_kernels import CrossProjections, ssd_block


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
        self.n_groups, self.eps = config.n_groups, config.norm_eps
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

    def scan(
        self, projected: Tensor | CrossProjections, conv_weight: Tensor, conv_bias: Tensor, stream_BHT: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """From the in-projections to the block's output [B, L, D], and the factor on the step sizes [B, H, T]."""
        w_BHT: Tensor | None = None if self.time is None or stream_BHT is None else self.time(stream_BHT)
        normed_BLE = ssd_block(
            projected,
            conv_weight,
            conv_bias,
            self.A_log,
            self.D,
            self.dt_bias,
            self.norm.weight,
            n_groups=self.n_groups,
            eps=self.eps,
            time_factor_BLH=None if w_BHT is None else w_BHT.transpose(1, 2),
            skip="dt_x",
        )
        out_BLD: Tensor = self.out_proj(normed_BLE)
        return out_BLD, w_BHT


class SSD(StateSpace):
    """The self block: one stream reads itself (spec 3.6)."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__(config)
        inner, states = config.expand * config.hidden_size, config.n_groups * config.d_state
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner + 2 * states + config.n_heads)
        self.conv = CausalConv(inner + 2 * states, config.d_conv)
        if config.time != "none":
            self.time_gate = nn.Linear(config.max_len, config.max_len if config.point_time_gate else 1)
            self.time_norm = nn.LayerNorm(config.max_len, eps=config.norm_eps)
            self.time_dropout = nn.Dropout(config.time_dropout)

    def forward(self, u_BLD: Tensor, stream_BHT: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The block's output [B, L, D] and the next time stream."""
        out_BLD, w_BHT = self.scan(self.in_proj(u_BLD), self.conv.weight, self.conv.bias, stream_BHT)
        if stream_BHT is None or w_BHT is None:
            return out_BLD, None
        gate = torch.sigmoid(self.time_gate(self.time_dropout(stream_BHT)))
        return out_BLD, self.time_norm(gate * stream_BHT + (1 - gate) * w_BHT)


class CrossSSD(StateSpace):
    """The cross-modal block: `u` (text) writes the state, `q` (image) reads it, both gate it (spec 3.9, step 3)."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__(config)
        inner, states = config.expand * config.hidden_size, config.n_groups * config.d_state
        self.u_in_proj = nn.Linear(config.hidden_size, inner + states + config.n_heads)
        self.z_in_proj = nn.Linear(config.hidden_size, inner)
        self.q_in_proj = nn.Linear(config.hidden_size, states)
        self.u_conv = CausalConv(inner + states, config.d_conv)
        self.q_conv = CausalConv(states, config.d_conv)

    def forward(self, q_BLD: Tensor, u_BLD: Tensor, stream_BHT: Tensor | None) -> Tensor:
        """The block's output [B, L, D]; its time stream ends here."""
        projected = CrossProjections(
            xBdt=self.u_in_proj(u_BLD), z=self.z_in_proj(q_BLD + u_BLD), C=self.q_in_proj(q_BLD)
        )
        conv_weight = torch.cat([self.u_conv.weight, self.q_conv.weight])
        conv_bias = torch.cat([self.u_conv.bias, self.q_conv.bias])
        out_BLD, _ = self.scan(projected, conv_weight, conv_bias, stream_BHT)
        return out_BLD


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
