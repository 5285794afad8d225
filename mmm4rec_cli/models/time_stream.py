"""The time streams of MMM4Rec: how gaps between events enter, scale step sizes and are filtered.

Letters: M streams (image and text, or one for both where dropout does not tell them apart), B users, T places
(max_len), H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmm4rec_kernels import (
    ComplexMap,
    StreamGate,
    StreamMaps,
    causal_conv1d,
    residual_norm,
    spectral_filter,
    stream_stage,
)


class CausalConv(nn.Module):
    """Weights of a causal depthwise convolution, `weight` [C, taps] and `bias` [C]; always followed by SiLU."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(taps)
        self.weight = nn.Parameter(torch.empty(channels, taps).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x_BLC: Tensor) -> Tensor:
        """SiLU of the convolution over L; [B, L, C] in and out."""
        return causal_conv1d(x_BLC, self.weight, self.bias, activation="silu")


class PublishedGaps(nn.Module):
    """Gaps over all places, padding included, normalised over the places (published behaviour Q2 to Q4).

    Behind the last stamp come zeros, so one difference is about minus the present Unix time; it dominates the norm.
    Dropout acts on raw seconds before it.
    """

    def __init__(self, max_len: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(max_len))
        self.bias = nn.Parameter(torch.zeros(max_len))
        self.dropout = dropout
        self.eps = eps

    def gaps(self, timestamps_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Differences [B, T] in seconds, subtracted as integers; 0 at the first place."""
        return torch.diff(timestamps_BT, dim=1, prepend=timestamps_BT[:, :1]).to(self.weight.dtype)

    def forward(self, gaps_MBT: Tensor, lengths_B: Tensor) -> Tensor:
        """One draw a stream [M, B, T]."""
        flat = gaps_MBT.flatten(0, -2)
        stream = residual_norm(flat, self.weight, self.bias, p=self.dropout, training=self.training, eps=self.eps)
        return stream.view_as(gaps_MBT)


class ObservedGaps(nn.Module):
    """Only gaps between observed events, on a fixed logarithmic scale.

    u = (ln(1 + seconds) - ln(3601)) / 4: two events in the same second give -2.0, an hour 0, a day 0.8, a year 2.3.
    The scale does not depend on the other gaps of the sequence, so no huge value erases the rest, an absolute length
    of time means the same in every history, and all gaps equal is no special case. The first place, which has no gap,
    and the places behind the last event are 0, whatever stamps stand there; the target's time is never read.
    Dropout hides a gap by setting u to 0, "unknown". Each place has its own trained scale and shift, as published.
    """

    centre = math.log1p(3600.0)
    spread = 4.0

    def __init__(self, max_len: int, dropout: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(max_len))
        self.bias = nn.Parameter(torch.zeros(max_len))
        self.dropout = nn.Dropout(dropout)

    def gaps(self, timestamps_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """U [B, T], 0 where there is no gap between two observed events."""
        return log_gaps(timestamps_BT, lengths_B).to(self.weight.dtype)

    def forward(self, gaps_MBT: Tensor, lengths_B: Tensor) -> Tensor:
        """One draw a stream [M, B, T]."""
        place_T = torch.arange(gaps_MBT.shape[-1], device=gaps_MBT.device)
        stream_MBT = torch.addcmul(self.bias, self.dropout(gaps_MBT), self.weight)
        return torch.where(place_T < lengths_B[:, None], stream_MBT, 0.0)


def log_gaps(timestamps_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """U [B, T], float64, of the gaps between observed events as in `ObservedGaps`; 0 where there is none."""
    u_BT = (torch.log1p(_seconds(timestamps_BT)) - ObservedGaps.centre) / ObservedGaps.spread
    return torch.where(_has_gap(timestamps_BT, lengths_B), u_BT, 0.0)


def _seconds(timestamps_BT: Tensor) -> Tensor:
    """Differences [B, T], float64, subtracted as integers, never negative; 0 at the first place."""
    return torch.diff(timestamps_BT, dim=1, prepend=timestamps_BT[:, :1]).clamp(min=0).to(torch.float64)


def _has_gap(timestamps_BT: Tensor, lengths_B: Tensor) -> Tensor:
    place_T = torch.arange(timestamps_BT.shape[1], device=timestamps_BT.device)
    return (place_T > 0) & (place_T < lengths_B[:, None])


class GapBuckets(nn.Module):
    """A trained vector a range of gaps [K, D], 0 at the start: two ranges for every doubling of 1 + seconds.

    Range 0 is "no gap": the first event of a history and the places behind the last.
    """

    ranges = 64

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(self.ranges, width))

    def forward(self, timestamps_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """[B, T, D]."""
        range_BT = 1 + (2 * torch.log2(1 + _seconds(timestamps_BT))).long().clamp(max=self.ranges - 2)
        return F.embedding(torch.where(_has_gap(timestamps_BT, lengths_B), range_BT, 0), self.weight)


class TimeFactor(nn.Module):
    """The factor w [M, B, H, T] that a stream puts on a block's step sizes (spec 3.5)."""

    def __init__(self, n_heads: int, max_len: int, taps: int, dropout: float) -> None:
        super().__init__()
        self.mlp_in = nn.Linear(max_len, max_len)
        self.mlp_out = nn.Linear(max_len, max_len)
        self.conv_in = CausalConv(n_heads, taps)
        self.conv_out = CausalConv(n_heads, taps)
        self.dropout = dropout

    def forward(self, stream_MBHT: Tensor, gate: StreamGate | None = None) -> tuple[Tensor, Tensor | None]:
        """The factor and, with a gate, the next stream (spec 3.6)."""
        parts = (self.mlp_in, self.mlp_out, self.conv_in, self.conv_out)
        maps = StreamMaps(*(parameter for part in parts for parameter in (part.weight, part.bias)))
        return stream_stage(stream_MBHT, maps, gate, p=self.dropout, training=self.training)


class ComplexLinear(nn.Module):
    """A complex map over Fourier bins made of two real linears, biases on both parts (published behaviour Q7)."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.real = nn.Linear(bins, bins)
        self.imag = nn.Linear(bins, bins)

    def map(self) -> ComplexMap:
        """(a + jb) -> (R a + rho - J b - iota) + j (J a + iota + R b + rho)."""
        return ComplexMap(self.real.weight, self.imag.weight, self.real.bias, self.imag.bias)


class FourierFilter(nn.Module):
    """Filters both streams by maps of their own spectra and joins them (spec 3.9, step 2)."""

    def __init__(self, max_len: int) -> None:
        super().__init__()
        bins = max_len // 2 + 1
        self.image = ComplexLinear(bins)
        self.text = ComplexLinear(bins)
        self.joint = ComplexLinear(bins)

    def forward(self, streams_MBHT: Tensor) -> Tensor:
        """The joint stream [B, H, T] of image (first) and text (last); the given ones are left as they are."""
        return spectral_filter(streams_MBHT, self.image.map(), self.text.map(), self.joint.map())
