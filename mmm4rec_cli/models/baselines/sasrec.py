"""SASRec (arXiv 1808.09781) with full softmax: a causal transformer; SASRec_T reads texts instead of ids."""

from torch import Tensor

from mmm4rec_cli.data.dataset import ModelFeatures
from mmm4rec_cli.models.baselines.foundation import Baseline, at_last_place, draw_start, item_table_of
from mmm4rec_cli.models.baselines.transformer import PlaceInput, Transformer
from mmm4rec_cli.settings.schema import ModelSettings


class SASRec(Baseline):
    """Item and place vectors, norm, dropout, transformer.

    Args:
        config: the settings' model section.
        features: item vectors; texts are read with `from_text` only.
        from_text: the item table is a linear map of the texts' vectors.
    """

    def __init__(self, config: ModelSettings, features: ModelFeatures, *, from_text: bool = False) -> None:
        super().__init__(config)
        self.items = item_table_of(config, features, from_text=from_text)
        self.start = PlaceInput(config)
        self.transformer = Transformer(config)
        draw_start(self)

    def forward(self, items_BL: Tensor, lengths_B: Tensor, timestamps_BL: Tensor) -> Tensor:
        """User vectors [B, D]; times are not read."""
        return at_last_place(self.transformer(self.start(self.items.rows(items_BL))), lengths_B)

    def item_table(self, items: Tensor | None = None) -> Tensor:
        """The id table, or the map of the texts."""
        return self.items.rows(items)
