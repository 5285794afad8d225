"""What all baselines stand on: start values, item tables, the state at the last real place.

Letters: B users, L places (max_len), D width, V catalogue rows with padding row 0, F feature width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmm4rec_cli.data.dataset import ModelFeatures
from mmm4rec_cli.models.interface import SequenceModel
from mmm4rec_cli.settings.schema import ModelSettings

START_DEVIATION = 0.02
"""Standard deviation of every linear weight and table at the start."""


class Baseline(SequenceModel):
    """A model with the settings' model section as its configuration."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__(padding_candidate=config.padding_candidate, mask_duplicate_labels=config.mask_duplicate_labels)
        self.config = config


class IdTable(nn.Embedding):
    """A trained vector an item, padding row included."""

    def rows(self, items: Tensor | None = None) -> Tensor:
        """[V, D], or [..., D] of the given ids."""
        return self.weight if items is None else self(items)


class FrozenFeatures(nn.Module):
    """One modality's feature table; never trained.

    Args:
        features_VF: row 0 is zero.
        missing_V: rows whose vector is learned, one vector for all of them (`features.missing = learned`), or None.
        overwritten: the features are replaced by noise, as the published code does after loading them (Q25).
    """

    features: Tensor
    missing_rows: Tensor | None

    def __init__(self, features_VF: Tensor, missing_V: Tensor | None, *, overwritten: bool = False) -> None:
        super().__init__()
        if overwritten:
            features_VF = torch.empty_like(features_VF).normal_(std=START_DEVIATION)
        # Noise is nowhere else: it belongs into the checkpoint.
        self.register_buffer("features", features_VF, persistent=overwritten)
        self.register_buffer("missing_rows", missing_V, persistent=False)
        if missing_V is not None:
            present = features_VF[1:][~missing_V[1:]]
            self.missing = nn.Parameter(present.mean(0) if len(present) else features_VF.new_zeros(self.width))

    @property
    def width(self) -> int:
        """F."""
        return self.features.shape[1]

    def forward(self, items: Tensor | None = None) -> Tensor:
        """[V, F], or [..., F] of the given ids."""
        features = self.features if items is None else F.embedding(items, self.features)
        if self.missing_rows is not None:
            rows = self.missing_rows if items is None else self.missing_rows[items]
            features = torch.where(rows[..., None], self.missing, features)
        return features


class TextTable(nn.Module):
    """An item's vector is a linear map of its text vector; padding row 0 is the map's bias."""

    def __init__(self, features: ModelFeatures, width: int) -> None:
        super().__init__()
        self.text = FrozenFeatures(features.text, features.text_missing)
        self.adapter = nn.Linear(self.text.width, width)

    def rows(self, items: Tensor | None = None) -> Tensor:
        """[V, D], or [..., D] of the given ids."""
        rows: Tensor = self.adapter(self.text(items))
        return rows


def item_table_of(config: ModelSettings, features: ModelFeatures, *, from_text: bool) -> IdTable | TextTable:
    """The table of a model or of its variant that reads texts ("-t")."""
    if from_text:
        return TextTable(features, config.hidden_size)
    return IdTable(len(features.text), config.hidden_size)


def draw_start(root: nn.Module, *, keep: tuple[type[nn.Module], ...] = ()) -> None:
    """Draw all linear maps and tables below `root` from N(0, 0.02²), with biases zero.

    Args:
        root: a model.
        keep: modules of these types are left as they are, with all that is in them.
    """
    if isinstance(root, keep):
        return
    if isinstance(root, (nn.Linear, nn.Embedding)):
        nn.init.normal_(root.weight, std=START_DEVIATION)
        if isinstance(root, nn.Linear) and root.bias is not None:
            nn.init.zeros_(root.bias)
    for child in root.children():
        draw_start(child, keep=keep)


def at_last_place(states_BLD: Tensor, lengths_B: Tensor) -> Tensor:
    """The state [B, D] at each user's last real place."""
    last_B1D = (lengths_B - 1)[:, None, None].expand(-1, 1, states_BLD.shape[-1])
    return states_BLD.gather(1, last_B1D).squeeze(1)


def real_places(items_BL: Tensor, lengths_B: Tensor) -> Tensor:
    """Whether a place is before the end of its history, bool [B, L]."""
    return torch.arange(items_BL.shape[1], device=items_BL.device) < lengths_B[:, None]


def mean_over(values_BL: Tensor, real_BL: Tensor) -> Tensor:
    """The mean of the values at real places, a scalar; without a wait for their number."""
    return torch.where(real_BL, values_BL, 0.0).sum() / real_BL.sum()
