"""The blocks of MMM4Rec (paper section 4; published behaviour in every detail).

Letters: B users, T places, S rows (places of the batch, see `places`), n streams of items, M streams of time, D width,
E = expand * D, H heads. Two streams are image (first) and text (last).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmm4rec_cli.models.places import Places
from mmm4rec_cli.models.time_stream import CausalConv, FourierFilter, TimeFactor
from mmm4rec_cli.settings.schema import ModelSettings
from mmm4rec_kernels import CrossProjections, hardswish_dropout, linear, residual_norm, ssd_block

PARTS = ("weight", "bias")


class Linear(nn.Linear):
    """A linear layer through the kernels' `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] in, [..., C] out."""
        return linear(x, self.weight, self.bias)


class Norm(nn.LayerNorm):
    """The layer norm of a residual sum; options as of the kernels' `residual_norm`."""

    def forward(self, x: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        """As x."""
        return residual_norm(x, self.weight, self.bias, eps=self.eps, **options)


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
        self.out_proj = Linear(inner, config.hidden_size)
        self.time: TimeFactor | None = None
        if config.has_time_streams:
            self.time = TimeFactor(heads, config.max_len, config.d_conv, config.time_dropout)
        self.gap_power = nn.Parameter(torch.zeros(heads)) if config.time == "decay" else None

    def paced(self, projected_nSC: Tensor, gap_S: Tensor | None) -> Tensor:
        """The in-projection, whose last H columns are the raw step sizes, with the gaps' part of these.

        Behind softplus, whose values are small, a head's step size is then about exp(power u) times as long, which is a
        power of the gap: the state decays by elapsed time. At the start all powers are 0.
        """
        if self.gap_power is None or gap_S is None:
            return projected_nSC
        heads = len(self.gap_power)
        step_nSH = projected_nSC[..., -heads:] + (gap_S[:, None] * self.gap_power).to(projected_nSC.dtype)
        return torch.cat([projected_nSC[..., :-heads], step_nSH], -1)

    def scan(
        self,
        projected: Tensor | CrossProjections,
        conv_weight: Tensor,
        conv_bias: Tensor,
        w_MBHT: Tensor | None,
        places: Places,
    ) -> Tensor:
        """From the in-projections of n streams to the block's output [n, S, D].

        Args:
            projected: [n, S, ...], or three of one stream [1, S, ...].
            conv_weight: of the columns x, B, C.
            conv_bias: likewise.
            w_MBHT: factor on the step sizes; one stream of it serves all.
            places: where the rows lie.
        """
        streams = (projected.xBdt if isinstance(projected, CrossProjections) else projected).shape[0]
        factor = None
        if w_MBHT is not None:
            factor_MSH = places.rows(w_MBHT.transpose(-1, -2))
            factor = places.sequences(factor_MSH.expand(streams, -1, -1))
        if isinstance(projected, CrossProjections):
            projected = CrossProjections(*(places.sequences(part) for part in projected))
        else:
            projected = places.sequences(projected)
        offsets = places.offsets_of(streams)
        normed = ssd_block(
            projected,
            conv_weight,
            conv_bias,
            self.A_log,
            self.D,
            self.dt_bias,
            self.norm.weight,
            n_groups=self.n_groups,
            eps=self.eps,
            time_factor_BLH=factor,
            skip="dt_x",
            cu_seqlens=offsets,
            max_length=None if offsets is None else places.length,
        )
        out: Tensor = self.out_proj(normed)
        return out.view(streams, -1, out.shape[-1])


class SSD(StateSpace):
    """The self block: one stream reads itself (spec 3.6)."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__(config)
        inner, states = config.expand * config.hidden_size, config.n_groups * config.d_state
        self.in_proj = Linear(config.hidden_size, 2 * inner + 2 * states + config.n_heads)
        self.conv = CausalConv(inner + 2 * states, config.d_conv)
        if config.has_time_streams:
            self.time_gate = nn.Linear(config.max_len, config.max_len if config.point_time_gate else 1)
            self.time_norm = nn.LayerNorm(config.max_len, eps=config.norm_eps)
            self.time_dropout = nn.Dropout(config.time_dropout)

    def forward(
        self, u_nSD: Tensor, streams_MBHT: Tensor | None, places: Places, gap_S: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The block's output [n, S, D] and the next time streams."""
        w_MBHT = None if self.time is None or streams_MBHT is None else self.time(streams_MBHT)
        projected = self.paced(self.in_proj(u_nSD), gap_S)
        out_nSD = self.scan(projected, self.conv.weight, self.conv.bias, w_MBHT, places)
        if streams_MBHT is None or w_MBHT is None:
            return out_nSD, None
        gate = torch.sigmoid(self.time_gate(self.time_dropout(streams_MBHT)))
        return out_nSD, self.time_norm(torch.lerp(w_MBHT, streams_MBHT, gate))


class CrossSSD(StateSpace):
    """The cross-modal block: `u` (text) writes the state, `q` (image) reads it, both gate it (spec 3.9, step 3)."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__(config)
        inner, states = config.expand * config.hidden_size, config.n_groups * config.d_state
        self.u_in_proj = Linear(config.hidden_size, inner + states + config.n_heads)
        self.z_in_proj = Linear(config.hidden_size, inner)
        self.q_in_proj = Linear(config.hidden_size, states)
        self.u_conv = CausalConv(inner + states, config.d_conv)
        self.q_conv = CausalConv(states, config.d_conv)

    def forward(
        self, q_SD: Tensor, u_SD: Tensor, stream_BHT: Tensor | None, places: Places, gap_S: Tensor | None = None
    ) -> Tensor:
        """The block's output [S, D]; its time stream ends here."""
        projected = CrossProjections(
            xBdt=self.paced(self.u_in_proj(u_SD), gap_S)[None],
            z=self.z_in_proj(q_SD + u_SD)[None],
            C=self.q_in_proj(q_SD)[None],
        )
        conv_weight = torch.cat([self.u_conv.weight, self.q_conv.weight])
        conv_bias = torch.cat([self.u_conv.bias, self.q_conv.bias])
        w_1BHT = None if self.time is None or stream_BHT is None else self.time(stream_BHT[None])
        return self.scan(projected, conv_weight, conv_bias, w_1BHT, places)[0]


class FeedForward(nn.Module):
    """Hardswish feed-forward with its residual and norm (spec 3.7; the norm's eps is fixed at 1e-12)."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.inner_size)
        self.fc2 = Linear(config.inner_size, config.hidden_size)
        self.norm = Norm(config.hidden_size, eps=1e-12)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """[S, D] in and out."""
        inner = hardswish_dropout(self.fc1(x), p=self.dropout, training=self.training)
        out = self.fc2(inner)
        normed: Tensor = self.norm(out, residual=x, p=self.dropout, training=self.training)
        return normed


class CrossModalLayer(nn.Module):
    """One encoder layer (text) and one decoder layer (image, then image reading text) with a shared SSD block."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__()

        def norm() -> Norm:
            return Norm(config.hidden_size, eps=config.norm_eps)

        def feed_forward() -> nn.Module:
            return FeedForward(config) if config.feed_forward else nn.Identity()

        self.ssd = SSD(config)
        self.text_norm, self.text_ffn = norm(), feed_forward()
        self.image_norm = norm()
        self.cross_ssd = CrossSSD(config)
        self.cross_norm, self.image_ffn = norm(), feed_forward()
        self.filter = FourierFilter(config.max_len) if config.has_time_streams else None
        self.dropout = config.dropout

    def forward(
        self, items_nSD: Tensor, streams_MBHT: Tensor | None, places: Places, gap_S: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """New image [S, D], new text [S, D], new time streams (unfiltered); `gap_S` paces the scans."""
        out_nSD, streams_MBHT = self.ssd(items_nSD, streams_MBHT, places, gap_S)
        # Both modalities' residual and norm at once, each with its own weights.
        weight, bias = (torch.stack([getattr(m, k) for m in (self.image_norm, self.text_norm)]) for k in PARTS)
        drop: dict[str, Any] = {"p": self.dropout, "training": self.training}
        eps = self.image_norm.eps
        query_SD, text_SD = residual_norm(out_nSD, weight, bias, residual=items_nSD, eps=eps, **drop)
        text_SD = self.text_ffn(text_SD)
        joint_BHT = None if self.filter is None or streams_MBHT is None else self.filter(streams_MBHT)
        out_SD = self.cross_ssd(query_SD, text_SD, joint_BHT, places, gap_S)
        image_SD = self.image_ffn(self.cross_norm(out_SD, residual=query_SD, other=text_SD, **drop))
        return image_SD, text_SD, streams_MBHT
