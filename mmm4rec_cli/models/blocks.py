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
from mmm4rec_kernels import (
    CrossProjections,
    StreamGate,
    hardswish_dropout,
    linear,
    linear_and_rows,
    residual_norm,
    ssd_block,
    ssd_block_tail,
    tail_unfit,
)

PARTS = ("weight", "bias")
TAILS_ON = ("cpu",)
"""Devices where the last layer's scans give the last places alone, whatever the sizes; elsewhere if a kernel does."""
TAILS_FROM = 10
"""On a GPU: rows a user from which on the self block's last places cost less than all of them."""


class Linear(nn.Linear):
    """A linear layer through the kernels' `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] in, [..., C] out."""
        return linear(x, self.weight, self.bias)

    def bare(self, x: Tensor) -> Tensor:
        """The same without the bias if `shift` gives it."""
        return linear(x, self.weight, None if _apart(x) else self.bias)

    def shift(self, out: Tensor) -> Tensor | None:
        """The bias, where what comes next adds it."""
        return self.bias if _apart(out) else None


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


def _apart(x: Tensor) -> bool:
    """Whether the kernel behind a linear layer adds its bias: the bias's gradient is then a sum on the way."""
    return x.is_cuda


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
        rows: Tensor | None = None,
    ) -> Tensor:
        """From the in-projections of n streams to the block's output [n, S, D], less `out_proj.shift`.

        Args:
            projected: [n, S, ...], or three of one stream [1, S, ...].
            conv_weight: of the columns x, B, C.
            conv_bias: likewise.
            w_MBHT: factor on the step sizes; one stream of it serves all.
            places: where the rows lie.
            rows: those whose output is wanted, of one stream; None: all.
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
        if rows is not None:
            normed = normed.view(-1, normed.shape[-1]).index_select(0, rows)
        out = self.out_proj.bare(normed)
        return out.view(streams, -1, out.shape[-1])

    def scan_tail(
        self,
        projected: CrossProjections,
        conv_weight: Tensor,
        conv_bias: Tensor,
        w_1BHT: Tensor | None,
        places: Places,
        bias: Tensor | None,
    ) -> Tensor:
        """As `scan` of one stream, at the last places alone, [B, J, D].

        Args:
            projected: xBdt [S, ...], z [B, J, ...], C [B, J + taps - 1, ...].
            conv_weight: of the columns x, B, C.
            conv_bias: likewise.
            w_1BHT: factor on the step sizes.
            places: where the rows lie.
            bias: of xBdt, if that comes without.
        """
        assert places.lengths_B is not None
        packed = places.offsets is not None
        return self.out_proj.bare(
            ssd_block_tail(
                projected._replace(xBdt=places.sequences(projected.xBdt[None])),
                places.lengths_B,
                conv_weight,
                conv_bias,
                self.A_log,
                self.D,
                self.dt_bias,
                self.norm.weight,
                n_groups=self.n_groups,
                eps=self.eps,
                time_factor_BLH=None if w_1BHT is None else w_1BHT[0].transpose(-1, -2)[:, : places.length],
                skip="dt_x",
                cu_seqlens=places.offsets,
                max_length=places.length if packed else None,
                bias_of_xBdt=bias,
            )
        )


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

    def forward(
        self,
        u_nSD: Tensor,
        streams_MBHT: Tensor | None,
        places: Places,
        gap_S: Tensor | None = None,
        *,
        bare: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The block's output [n, S, D], with `bare` less `out_proj.shift`, and the next time streams."""
        w_MBHT, following_MBHT = self.stage(streams_MBHT)
        projected = self.paced(self.in_proj(u_nSD), gap_S)
        out_nSD = self.scan(projected, self.conv.weight, self.conv.bias, w_MBHT, places)
        shift = None if bare else self.out_proj.shift(out_nSD)
        return out_nSD if shift is None else out_nSD + shift, following_MBHT

    def stage(self, streams_MBHT: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The factor on the step sizes and the next time streams."""
        if self.time is None or streams_MBHT is None:
            return None, None
        norm = self.time_norm
        gate = StreamGate(self.time_gate.weight, self.time_gate.bias, norm.weight, norm.bias, norm.eps)
        staged: tuple[Tensor, Tensor] = self.time(streams_MBHT, gate)
        return staged

    def tail(
        self, u_SD: Tensor, w_1BHT: Tensor | None, places: Places, count: int, gap_S: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The block's output for one stream at the last `count` places of each user, and the stream there.

        Both [B, count, D], the first less `out_proj.shift`.
        """
        inner, heads = self.norm.weight.shape[0], self.D.shape[0]
        states = (self.conv.weight.shape[0] - inner) // 2
        columns = [inner, inner + states, states, heads]
        (w_z, w_xB, w_C, w_dt), (b_z, b_xB, b_C, b_dt) = (
            torch.split(parameter, columns) for parameter in (self.in_proj.weight, self.in_proj.bias)
        )
        reach = count + self.conv.weight.shape[1] - 1
        bias, apart = torch.cat([b_xB, b_dt]), _apart(u_SD)
        weight = torch.cat([w_xB, w_dt])
        xBdt_SC, u_ND = linear_and_rows(u_SD, weight, None if apart else bias, places.tail_rows(reach))
        C_BMQ, u_BJD = linear_and_rows(u_ND.view(places.users, reach, -1), w_C, b_C, slice(reach - count, reach))
        projected = CrossProjections(
            xBdt=self.paced(xBdt_SC, gap_S),
            z=linear(u_BJD, w_z, b_z),
            C=C_BMQ,
        )
        added = bias if apart else None
        return self.scan_tail(projected, self.conv.weight, self.conv.bias, w_1BHT, places, added), u_BJD


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
        self,
        q_SD: Tensor,
        u_SD: Tensor,
        stream_BHT: Tensor | None,
        places: Places,
        gap_S: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The block's output [S, D] less `out_proj.shift`, or at some rows alone; its time stream ends here."""
        if rows is None:
            z_SE = self.z_in_proj(q_SD + u_SD)
        else:
            # The kernels want a gate for every place; where nobody reads the output, it is closed.
            z_BE = self.z_in_proj(q_SD.index_select(0, rows) + u_SD.index_select(0, rows))
            z_SE = z_BE.new_zeros(q_SD.shape[0], z_BE.shape[1]).index_copy(0, rows, z_BE)
        xBdt_SC = self.paced(self.u_in_proj(u_SD), gap_S)
        projected = CrossProjections(xBdt=xBdt_SC[None], z=z_SE[None], C=self.q_in_proj(q_SD)[None])
        return self.scan(projected, *self._convolution(), self._factor(stream_BHT), places, rows).squeeze(0)

    def tail(
        self, q_BJD: Tensor, u_SD: Tensor, stream_BHT: Tensor | None, places: Places, gap_S: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The block's output at each user's last place, less `out_proj.shift`, and both streams there, q first.

        All three [B, D].

        Args:
            q_BJD: the reading stream at as many last places as its convolution has taps.
            u_SD: the writing stream.
            stream_BHT: the joint time stream.
            places: where the rows lie.
            gap_S: what paces the scan, if anything does.
        """
        count = q_BJD.shape[1]
        bias, apart = self.u_in_proj.bias, _apart(u_SD)
        xBdt_SC, u_BD = linear_and_rows(u_SD, self.u_in_proj.weight, None if apart else bias, places.last_B)
        query = self.q_in_proj.weight, self.q_in_proj.bias
        C_BJQ, q_B1D = linear_and_rows(q_BJD, *query, slice(count - 1, count))
        q_BD = q_B1D.squeeze(1)
        projected = CrossProjections(
            xBdt=self.paced(xBdt_SC, gap_S),
            z=self.z_in_proj(q_BD + u_BD)[:, None],
            C=C_BJQ,
        )
        added = bias if apart else None
        out_BD = self.scan_tail(projected, *self._convolution(), self._factor(stream_BHT), places, added).squeeze(1)
        return out_BD, q_BD, u_BD

    def _convolution(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.u_conv.weight, self.q_conv.weight]), torch.cat([self.u_conv.bias, self.q_conv.bias])

    def _factor(self, stream_BHT: Tensor | None) -> Tensor | None:
        if self.time is None or stream_BHT is None:
            return None
        factor: Tensor = self.time(stream_BHT[None])[0]
        return factor


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
        drop: dict[str, Any] = {"p": self.dropout, "training": self.training}
        inner = self.fc1.bare(x)
        inner = hardswish_dropout(inner, shift=self.fc1.shift(inner), **drop)
        out = self.fc2.bare(inner)
        normed: Tensor = self.norm(out, residual=x, shift=self.fc2.shift(out), **drop)
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
        self,
        image_SD: Tensor,
        text_SD: Tensor,
        streams_MBHT: Tensor | None,
        places: Places,
        gap_S: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """New image [S, D], new text [S, D], new time streams (unfiltered); `gap_S` paces the scans."""
        query_SD, text_SD, streams_MBHT = self._selves(image_SD, text_SD, streams_MBHT, places, gap_S)
        out_SD = self.cross_ssd(query_SD, text_SD, self._joint(streams_MBHT), places, gap_S)
        return self._joined(out_SD, query_SD, text_SD), text_SD, streams_MBHT

    def last(
        self,
        image_SD: Tensor,
        text_SD: Tensor,
        streams_MBHT: Tensor | None,
        places: Places,
        gap_S: Tensor | None = None,
    ) -> Tensor:
        """New image [B, D] at each user's last place, all that a model reads of its last layer.

        Nothing is computed that only other places would need, but in the self block where so few places are real that
        leaving them out costs more, or where no kernel does it.
        """
        last_B = places.last_B
        cross = self.cross_ssd
        count = cross.q_conv.weight.shape[1]
        always = image_SD.device.type in TAILS_ON
        unfit = not always and tail_unfit(image_SD, places.length, count, len(cross.D), cross.n_groups)
        if unfit or (not always and len(image_SD) < TAILS_FROM * places.users):
            query_SD, text_SD, streams_MBHT = self._selves(image_SD, text_SD, streams_MBHT, places, gap_S)
            if unfit:
                out_BD = cross(query_SD, text_SD, self._joint(streams_MBHT), places, gap_S, rows=last_B)
                return self._joined(out_BD, query_SD.index_select(0, last_B), text_SD.index_select(0, last_B))
            query_BJD = places.tails(query_SD, count)
            return self._joined(*cross.tail(query_BJD, text_SD, self._joint(streams_MBHT), places, gap_S))
        drop: dict[str, Any] = {"p": self.dropout, "training": self.training}
        w_MBHT, streams_MBHT = self.ssd.stage(streams_MBHT)
        w_image, w_text = (None, None) if w_MBHT is None else (w_MBHT[:1], w_MBHT[-1:])
        projected = self.ssd.paced(self.ssd.in_proj(text_SD), gap_S)[None]
        out_SD = self.ssd.scan(projected, self.ssd.conv.weight, self.ssd.conv.bias, w_text, places).squeeze(0)
        drop["shift"] = self.ssd.out_proj.shift(out_SD)
        text_SD = self.text_ffn(self.text_norm(out_SD, residual=text_SD, **drop))
        out_BJD, image_BJD = self.ssd.tail(image_SD, w_image, places, count, gap_S)
        query_BJD = self.image_norm(out_BJD, residual=image_BJD, **drop)
        return self._joined(*cross.tail(query_BJD, text_SD, self._joint(streams_MBHT), places, gap_S))

    def _selves(
        self, image_SD: Tensor, text_SD: Tensor, streams_MBHT: Tensor | None, places: Places, gap_S: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Each stream through the self block and its norm, the text also through its feed-forward."""
        items_nSD = torch.stack([image_SD, text_SD])
        out_nSD, streams_MBHT = self.ssd(items_nSD, streams_MBHT, places, gap_S, bare=True)
        # Both modalities' residual and norm at once, each with its own weights.
        weight, bias = (torch.stack([getattr(m, k) for m in (self.image_norm, self.text_norm)]) for k in PARTS)
        drop: dict[str, Any] = {"p": self.dropout, "training": self.training, "shift": self.ssd.out_proj.shift(out_nSD)}
        eps = self.image_norm.eps
        query_SD, text_SD = residual_norm(out_nSD, weight, bias, residual=items_nSD, eps=eps, **drop)
        return query_SD, self.text_ffn(text_SD), streams_MBHT

    def _joint(self, streams_MBHT: Tensor | None) -> Tensor | None:
        if self.filter is None or streams_MBHT is None:
            return None
        joint: Tensor = self.filter(streams_MBHT)
        return joint

    def _joined(self, out: Tensor, query: Tensor, text: Tensor) -> Tensor:
        drop: dict[str, Any] = {"p": self.dropout, "training": self.training}
        shift = self.cross_ssd.out_proj.shift(out)
        image: Tensor = self.image_ffn(self.cross_norm(out, residual=query, other=text, shift=shift, **drop))
        return image
