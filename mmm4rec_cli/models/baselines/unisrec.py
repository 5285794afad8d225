"""UniSRec (KDD 2022, arXiv 2206.05941): text vectors through a mixture of whitening maps, then a transformer.

`model.item_bias` adds a trained vector an item (its transductive variant); pre-training has none to take along.
Letters: B users, L places, D width, V catalogue rows, F feature width, K experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmm4rec_cli.data.dataset import ModelFeatures
from mmm4rec_cli.data.sequences import Windows
from mmm4rec_cli.models.baselines.foundation import (
    Baseline,
    FrozenFeatures,
    IdTable,
    at_last_place,
    draw_start,
    real_places,
)
from mmm4rec_cli.models.baselines.streams import contrast
from mmm4rec_cli.models.baselines.transformer import PlaceInput, Transformer
from mmm4rec_cli.settings.schema import ModelSettings


class WhiteningMixture(nn.Module):
    """A gated sum of maps W (dropout(x) - b); while training the gates' logits are noisy."""

    dropout = 0.2
    noise_floor = 0.01

    def __init__(self, width_in: int, width_out: int, experts: int) -> None:
        super().__init__()
        self.shifts = nn.Parameter(torch.zeros(experts, width_in))
        self.maps = nn.ModuleList(nn.Linear(width_in, width_out, bias=False) for _ in range(experts))
        self.gate = nn.Parameter(torch.zeros(width_in, experts))
        self.noise = nn.Parameter(torch.zeros(width_in, experts))

    def forward(self, x: Tensor) -> Tensor:
        """[..., F] to [..., D]."""
        logits = x @ self.gate
        if self.training:
            deviation = F.softplus(x @ self.noise) + self.noise_floor
            logits = logits + torch.randn_like(logits) * deviation
        gates = logits.softmax(-1)
        parts = (
            gates[..., k, None] * expert(F.dropout(x, self.dropout, self.training) - self.shifts[k])
            for k, expert in enumerate(self.maps)
        )
        return torch.stack(list(parts)).sum(0)


class UniSRec(Baseline):
    """Cosines over a temperature; pre-training adds a contrast with a thinned history."""

    contrast_weight = 1e-3
    drop_share = 0.2

    def __init__(self, config: ModelSettings, features: ModelFeatures) -> None:
        super().__init__(config)
        self.text = FrozenFeatures(features.text, features.text_missing)
        self.adapter = WhiteningMixture(self.text.width, config.hidden_size, config.baseline.experts)
        self.items = IdTable(len(features.text), config.hidden_size) if config.item_bias else None
        self.start = PlaceInput(config)
        self.transformer = Transformer(config)
        draw_start(self)

    def _vectors(self, items: Tensor | None = None) -> Tensor:
        vectors: Tensor = self.adapter(self.text(items))
        return vectors if self.items is None else vectors + self.items.rows(items)

    def forward(self, items_BL: Tensor, lengths_B: Tensor, timestamps_BL: Tensor) -> Tensor:
        """User vectors [B, D] of length 1; times are not read."""
        states_BLD = self.transformer(self.start(self._vectors(items_BL)))
        return F.normalize(at_last_place(states_BLD, lengths_B), dim=-1)

    def item_table(self, items: Tensor | None = None) -> Tensor:
        """Item vectors of length 1 over the temperature."""
        return F.normalize(self._vectors(items), dim=-1) / self.config.temperature

    def training_loss(self, windows: Windows, in_batch: bool = False) -> Tensor:
        """As `SequenceModel.training_loss`; with the in-batch loss plus the contrast of histories."""
        loss = super().training_loss(windows, in_batch)
        if not in_batch:
            return loss
        items_BL, lengths_B = windows.items_BT, windows.lengths_B
        user_BD = self(items_BL, lengths_B, windows.timestamps_BT)
        real_BL = real_places(items_BL, lengths_B)
        last_BL = torch.arange(items_BL.shape[1], device=items_BL.device) == lengths_B[:, None] - 1
        kept_BL = real_BL & ((torch.rand(real_BL.shape, device=real_BL.device) >= self.drop_share) | last_BL)
        order_BL = (~kept_BL).long().argsort(dim=1, stable=True)
        thinned_BL = torch.where(kept_BL, items_BL, 0).gather(1, order_BL)
        thinned_BD = self(thinned_BL, kept_BL.sum(1), windows.timestamps_BT)
        mask = self.mask_duplicate_labels
        likeness = contrast(user_BD, thinned_BD, windows.target_B, self.config.temperature, mask_duplicates=mask)
        return loss + self.contrast_weight * likeness
