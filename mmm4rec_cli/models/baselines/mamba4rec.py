"""Mamba4Rec (arXiv 2403.03900): Mamba-1 layers over item vectors; Mamba4Rec_T reads texts instead of ids."""

from torch import Tensor, nn

from mmm4rec_cli.data.dataset import ModelFeatures
from mmm4rec_cli.models.baselines.foundation import Baseline, at_last_place, draw_start, item_table_of
from mmm4rec_cli.models.baselines.mamba import MambaSublayer, kept_at_start
from mmm4rec_cli.models.baselines.transformer import PlaceFeedForward
from mmm4rec_cli.settings.schema import ModelSettings


class Mamba4Rec(Baseline):
    """Item vectors, dropout, norm, layers of Mamba and feed-forward; a single layer has no residual around Mamba.

    Args:
        config: the settings' model section.
        features: item vectors; texts are read with `from_text` only.
        from_text: the item table is a linear map of the texts' vectors.
    """

    def __init__(self, config: ModelSettings, features: ModelFeatures, *, from_text: bool = False) -> None:
        super().__init__(config)
        self.items = item_table_of(config, features, from_text=from_text)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        residual = config.num_layers > 1
        self.layers = nn.Sequential(
            *(
                nn.Sequential(MambaSublayer(config, residual=residual), PlaceFeedForward(config, inner_dropout=True))
                for _ in range(config.num_layers)
            )
        )
        draw_start(self, keep=kept_at_start(config))

    def forward(self, items_BL: Tensor, lengths_B: Tensor, timestamps_BL: Tensor) -> Tensor:
        """User vectors [B, D]; times are not read."""
        return at_last_place(self.layers(self.norm(self.dropout(self.items.rows(items_BL)))), lengths_B)

    def item_table(self, items: Tensor | None = None) -> Tensor:
        """The id table, or the map of the texts."""
        return self.items.rows(items)
