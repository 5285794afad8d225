"""GRU4Rec (arXiv 1511.06939) with full softmax: a gated recurrent network over item vectors."""

import warnings

from torch import Tensor, nn

from mmm4rec_cli.data.dataset import ModelFeatures
from mmm4rec_cli.models.baselines.foundation import Baseline, IdTable, at_last_place, draw_start
from mmm4rec_cli.settings.schema import ModelSettings


class GRU4Rec(Baseline):
    """Item vectors, dropout, GRU without biases, a linear map back to the width of the table."""

    def __init__(self, config: ModelSettings, features: ModelFeatures) -> None:
        super().__init__(config)
        width, state = config.hidden_size, config.inner_size
        self.items = IdTable(len(features.text), width)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.gru = nn.GRU(width, state, config.num_layers, bias=False, batch_first=True)
        self.out = nn.Linear(state, width)
        draw_start(self)

    def forward(self, items_BL: Tensor, lengths_B: Tensor, timestamps_BL: Tensor) -> Tensor:
        """User vectors [B, D]; times are not read."""
        with warnings.catch_warnings():
            # The trainer keeps all weights in one tensor of its own; copying these few for cuDNN costs nothing.
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
            states_BLS, _ = self.gru(self.dropout(self.items(items_BL)))
        user_BD: Tensor = self.out(at_last_place(states_BLS, lengths_B))
        return user_BD

    def item_table(self, items: Tensor | None = None) -> Tensor:
        """The id table."""
        return self.items.rows(items)
