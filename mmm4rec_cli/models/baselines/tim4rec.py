"""TiM4Rec (arXiv 2409.16182): time-aware SSD layers over item vectors; TiM4Rec_T reads texts instead of ids.

Letters: B users, L = T places, D width, H heads.
"""

from torch import Tensor, nn

from mmm4rec_cli.data.dataset import ModelFeatures
from mmm4rec_cli.models.baselines.foundation import Baseline, draw_start, item_table_of
from mmm4rec_cli.models.blocks import SSD, FeedForward
from mmm4rec_cli.models.places import Places
from mmm4rec_cli.models.time_stream import ObservedGaps, PublishedGaps
from mmm4rec_cli.settings.schema import ModelSettings


class TimeLayer(nn.Module):
    """MMM4Rec's text layer: SSD block with time stream, dropout, residual, norm, feed-forward (spec 3.8)."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__()
        self.ssd = SSD(config)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_SD: Tensor, stream_1BHT: Tensor | None, places: Places) -> tuple[Tensor, Tensor | None]:
        """Rows [S, D] and the next time stream."""
        out_1SD, stream_1BHT = self.ssd(x_SD[None], stream_1BHT, places)
        return self.feed_forward(self.norm(self.dropout(out_1SD[0]) + x_SD)), stream_1BHT


class TiM4Rec(Baseline):
    """Item vectors, dropout, norm; time-aware layers. `model.time` says which gaps between events they see.

    Args:
        config: the settings' model section.
        features: item vectors; texts are read with `from_text` only.
        from_text: the item table is a linear map of the texts' vectors.
    """

    def __init__(self, config: ModelSettings, features: ModelFeatures, *, from_text: bool = False) -> None:
        super().__init__(config)
        if config.time in ("buckets", "decay"):
            raise ValueError(f"model.time = {config.time} is MMM4Rec's; tim4rec takes observed, published or none")
        self.reads_target_time = config.time == "published"
        self.items = item_table_of(config, features, from_text=from_text)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.gaps: PublishedGaps | ObservedGaps | None = None
        if config.time == "published":
            self.gaps = PublishedGaps(config.max_len, config.time_dropout, config.norm_eps)
        elif config.time == "observed":
            self.gaps = ObservedGaps(config.max_len, config.time_dropout)
        self.layers = nn.ModuleList(TimeLayer(config) for _ in range(config.num_layers))
        draw_start(self)

    def forward(self, items_BL: Tensor, lengths_B: Tensor, timestamps_BL: Tensor) -> Tensor:
        """User vectors [B, D]."""
        places = Places.padded(lengths_B, items_BL.shape[1])
        x_SD = self.norm(self.dropout(self.items.rows(places.ids(items_BL))))
        stream_1BHT = None
        if self.gaps is not None:
            stream_1BT = self.gaps(self.gaps.gaps(timestamps_BL, lengths_B)[None], lengths_B)
            stream_1BHT = stream_1BT[:, :, None, :].expand(-1, -1, self.config.n_heads, -1)
        for layer in self.layers:
            x_SD, stream_1BHT = layer(x_SD, stream_1BHT, places)
        user_BD: Tensor = x_SD.index_select(0, places.last_B)
        return user_BD

    def item_table(self, items: Tensor | None = None) -> Tensor:
        """The id table, or the map of the texts."""
        return self.items.rows(items)
