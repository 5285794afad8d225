"""What models of three streams (id, text, image) share.

Letters: B users, L places, D width of a stream, V catalogue rows with padding row 0.
"""

from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmm4rec_cli.data.dataset import ModelFeatures
from mmm4rec_cli.errors import UsageError
from mmm4rec_cli.models.baselines.foundation import Baseline, FrozenFeatures, IdTable
from mmm4rec_cli.models.baselines.transformer import Transformer
from mmm4rec_cli.settings.schema import ModelSettings


class Streams(NamedTuple):
    """A tensor a stream, [..., D] each."""

    id: Tensor
    text: Tensor
    image: Tensor

    def joined(self) -> Tensor:
        """Side by side, [..., 3 D]."""
        return torch.cat(self, -1)


class ThreeStreams(Baseline):
    """An id table and two frozen feature tables; a score is the sum of a product a stream.

    Args:
        config: the settings' model section.
        features: item vectors and, where there are any, categories.
        overwritable: the published code overwrites this model's features (Q25).
    """

    reads_categories = False

    def __init__(self, config: ModelSettings, features: ModelFeatures, *, overwritable: bool = False) -> None:
        super().__init__(config)
        noise = overwritable and config.baseline.overwrite_features
        if features.categories is None and self.reads_categories:
            self.remark = "no item has categories: trained without the category loss"
        self.items = IdTable(len(features.text), config.hidden_size)
        self.text = FrozenFeatures(features.text, features.text_missing, overwritten=noise)
        self.image = FrozenFeatures(features.image, features.image_missing, overwritten=noise)

    @abstractmethod
    def rows(self, items: Tensor | None = None) -> Streams:
        """What the user vectors of the streams are multiplied with: [V, D] each, or of the given ids."""

    def item_table(self, items: Tensor | None = None) -> Tensor:
        """The rows of all streams side by side, [V, 3 D]."""
        return self.rows(items).joined()


class Encoders(nn.Module):
    """Norm, dropout and a transformer of its own for each stream."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__()

        def encoder() -> nn.Module:
            norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
            return nn.Sequential(norm, nn.Dropout(config.dropout), Transformer(config))

        self.id, self.text, self.image = encoder(), encoder(), encoder()


class Categories(nn.Module):
    """Tells from an item's three vectors how often it is in which category.

    Args:
        features: with the items' categories; if there are none, there is no such loss.
        width: D.
        published: the published matrix, which has no column, so that its loss is not a number (Q24).

    Raises:
        UsageError: `published`.
    """

    counts: Tensor | None

    def __init__(self, features: ModelFeatures, width: int, *, published: bool) -> None:
        super().__init__()
        if published:
            raise UsageError(
                "the published category targets have no column, so every loss is NaN: it does not train (Q24)",
                hint="leave protocol at corrected, or add --set model.baseline.empty_categories=false",
            )
        counts_VC = features.category_counts()
        self.register_buffer("counts", counts_VC, persistent=False)
        self.logits = None if counts_VC is None else nn.Linear(3 * width, counts_VC.shape[1])

    def loss(self, vectors: Streams, items_BL: Tensor, real_BL: Tensor) -> Tensor:
        """Binary cross-entropy against the counts, the mean over real places and categories."""
        if self.logits is None or self.counts is None:
            return vectors.id.new_zeros(())
        wanted_BLC = F.embedding(items_BL, self.counts)
        loss_BLC = F.binary_cross_entropy_with_logits(self.logits(vectors.joined()), wanted_BLC, reduction="none")
        return (loss_BLC.mean(-1) * real_BL).sum() / real_BL.sum()


def contrast(query_BD: Tensor, key_BD: Tensor, label_B: Tensor, temperature: float, *, mask_duplicates: bool) -> Tensor:
    """Mean cross-entropy of finding one's own key among the batch's by cosine.

    Other rows with the own label are hidden, or, as published, enter with logit 0 whatever their cosine.
    """
    cosine_BB = F.normalize(query_BD, dim=-1) @ F.normalize(key_BD, dim=-1).T
    own_B = torch.arange(len(label_B), device=label_B.device)
    same_BB = (label_B[:, None] == label_B) & (own_B[:, None] != own_B)
    instead = float("-inf") if mask_duplicates else 0.0
    return F.cross_entropy((cosine_BB / temperature).masked_fill(same_BB, instead), own_B)


def random_places(real_BL: Tensor, count_B: Tensor) -> Tensor:
    """So many real places of each history, drawn at random, bool [B, L]."""
    draw_BL = torch.rand(real_BL.shape, device=real_BL.device).masked_fill(~real_BL, 2.0)
    return draw_BL.argsort(1).argsort(1) < count_B[:, None]
