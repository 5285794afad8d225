"""BSARec (arXiv 2312.10325): attention beside a filter that keeps or rescales high frequencies.

Letters: B users, L places, D width.
"""

import torch
from torch import Tensor, nn

from mmm4rec_cli.data.dataset import ModelFeatures
from mmm4rec_cli.models.baselines.foundation import Baseline, IdTable, at_last_place, draw_start, real_places
from mmm4rec_cli.models.baselines.transformer import PlaceFeedForward, PlaceInput, SelfAttention
from mmm4rec_cli.settings.schema import ModelSettings


class FrequencyFilter(nn.Module):
    """The lowest bins of the Fourier transform over places, plus the rest times a trained factor a channel.

    The published filter runs over padding too; otherwise padded places are zero.
    """

    def __init__(self, config: ModelSettings) -> None:
        super().__init__()
        self.low_bins, self.over_padding = config.baseline.low_bins, config.baseline.filter_padding
        self.beta = nn.Parameter(torch.randn(config.hidden_size))
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, x_BLD: Tensor, real_BL: Tensor) -> Tensor:
        """[B, L, D] in and out."""
        signal_BLD = x_BLD if self.over_padding else torch.where(real_BL[..., None], x_BLD, 0.0)
        spectrum = torch.fft.rfft(signal_BLD, dim=1, norm="ortho")
        kept = torch.arange(spectrum.shape[1], device=spectrum.device) < self.low_bins
        low_BLD = torch.fft.irfft(spectrum * kept[:, None], n=x_BLD.shape[1], dim=1, norm="ortho")
        mixed_BLD = low_BLD + self.beta**2 * (signal_BLD - low_BLD)
        out: Tensor = self.norm(self.dropout(mixed_BLD) + x_BLD)
        return out


class BSALayer(nn.Module):
    """A weighted sum of filter and attention, then feed-forward."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__()
        self.share = config.baseline.filter_share
        self.filter = FrequencyFilter(config)
        self.attention = SelfAttention(config)
        self.feed_forward = PlaceFeedForward(config)

    def forward(self, x_BLD: Tensor, real_BL: Tensor) -> Tensor:
        """[B, L, D] in and out."""
        mixed_BLD = self.share * self.filter(x_BLD, real_BL) + (1 - self.share) * self.attention(x_BLD)
        out: Tensor = self.feed_forward(mixed_BLD)
        return out


class BSARec(Baseline):
    """SASRec whose layers filter beside attending. The filter looks both ways, but never behind the history."""

    def __init__(self, config: ModelSettings, features: ModelFeatures) -> None:
        super().__init__(config)
        self.items = IdTable(len(features.text), config.hidden_size)
        self.start = PlaceInput(config)
        self.layers = nn.ModuleList(BSALayer(config) for _ in range(config.num_layers))
        draw_start(self)

    def forward(self, items_BL: Tensor, lengths_B: Tensor, timestamps_BL: Tensor) -> Tensor:
        """User vectors [B, D]; times are not read."""
        real_BL = real_places(items_BL, lengths_B)
        x_BLD = self.start(self.items(items_BL))
        for layer in self.layers:
            x_BLD = layer(x_BLD, real_BL)
        return at_last_place(x_BLD, lengths_B)

    def item_table(self, items: Tensor | None = None) -> Tensor:
        """The id table."""
        return self.items.rows(items)
