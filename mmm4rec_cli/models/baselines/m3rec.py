"""M3Rec: one stack of Mamba-1 blocks shared by an id, a text and an image stream.

The user's and the items' three vectors are laid side by side. Letters: B users, L places, D width, V catalogue rows.
"""

import torch
from torch import Tensor, nn

from mmm4rec_cli.data.dataset import ModelFeatures
from mmm4rec_cli.models.baselines.foundation import at_last_place, draw_start
from mmm4rec_cli.models.baselines.mamba import MambaSublayer, kept_at_start
from mmm4rec_cli.models.baselines.streams import Streams, ThreeStreams
from mmm4rec_cli.models.baselines.transformer import PlaceFeedForward
from mmm4rec_cli.settings.schema import ModelSettings


class Stream(nn.Module):
    """What a stream has for itself: input dropout and norm, and a feed-forward a layer."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        layers = range(config.num_layers)
        self.feed_forwards = nn.ModuleList(PlaceFeedForward(config, inner_dropout=True) for _ in layers)


class M3Rec(ThreeStreams):
    """Text and image run through the shared blocks without gradient, so only ids train them (as published)."""

    def __init__(self, config: ModelSettings, features: ModelFeatures) -> None:
        super().__init__(config, features, overwritable=True)

        def adapter(width: int) -> nn.Module:
            narrow = nn.Linear(width, config.hidden_size)
            return nn.Sequential(narrow, nn.LeakyReLU(0.01), nn.Linear(config.hidden_size, config.hidden_size))

        self.text_adapter, self.image_adapter = adapter(self.text.width), adapter(self.image.width)
        self.text_weight, self.image_weight = (nn.Parameter(torch.ones(())) for _ in range(2))
        self.id_stream, self.text_stream, self.image_stream = (Stream(config) for _ in range(3))
        self.blocks = nn.ModuleList(MambaSublayer(config) for _ in range(config.num_layers))
        draw_start(self, keep=kept_at_start(config))

    def forward(self, items_BL: Tensor, lengths_B: Tensor, timestamps_BL: Tensor) -> Tensor:
        """User vectors [B, 3 D]; times are not read."""
        states = [
            at_last_place(self._run(self.id_stream, self.items(items_BL), frozen=False), lengths_B),
            *(
                weight * at_last_place(self._run(stream, adapter(features(items_BL)), frozen=True), lengths_B)
                for weight, stream, adapter, features in (
                    (self.text_weight, self.text_stream, self.text_adapter, self.text),
                    (self.image_weight, self.image_stream, self.image_adapter, self.image),
                )
            ),
        ]
        return Streams(*states).joined()

    def _run(self, stream: Stream, x_BLD: Tensor, *, frozen: bool) -> Tensor:
        x_BLD = stream.norm(stream.dropout(x_BLD))
        for block, feed_forward in zip(self.blocks, stream.feed_forwards, strict=True):
            if frozen:
                with torch.no_grad():
                    x_BLD = block(x_BLD)
            else:
                x_BLD = block(x_BLD)
            x_BLD = feed_forward(x_BLD)
        return x_BLD

    def rows(self, items: Tensor | None = None) -> Streams:
        """The id table and the weighted maps of texts and images."""
        text_VD = self.text_weight * self.text_adapter(self.text(items))
        image_VD = self.image_weight * self.image_adapter(self.image(items))
        return Streams(self.items.rows(items), text_VD, image_VD)
