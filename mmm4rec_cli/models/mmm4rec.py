"""MMM4Rec (arXiv 2506.02916): text and image streams, a shared SSD, a cross-modal SSD, filtered time streams.

Letters: B users, L = T places (max_len), S rows (places of the batch, see `places`), D width, V catalogue rows with
padding row 0, F feature width, H heads.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmm4rec_cli.data.sequences import Windows
from mmm4rec_cli.models import published
from mmm4rec_cli.models.blocks import CrossModalLayer, Linear, Norm
from mmm4rec_cli.models.interface import SequenceModel
from mmm4rec_cli.models.places import Places
from mmm4rec_cli.models.time_stream import GapBuckets, ObservedGaps, PublishedGaps, log_gaps
from mmm4rec_cli.settings.schema import ModelSettings
from mmm4rec_kernels import Order, lookup, order_of, unit_sum

ROWS_A_PART = 1280
"""On the CPU: places computed at a time."""
PADDING_A_PART = 192
"""On the CPU: places of padding in a part, from which on one more part costs less."""

_Vectors = tuple[Tensor, Tensor] | tuple[None, None]
"""The catalogue's image and text vectors [V, D], where they are at hand."""


class ModalityInput(nn.Module):
    """One modality's items: frozen features, a linear adapter, the item bias, the input norm.

    Args:
        config: the model section of the settings.
        features_VF: float, row 0 zero (padding), a missing vector zero or filled as the settings say.
        missing_V: bool, rows whose vector is missing and is to be learned (`features.missing = learned`), or None.
    """

    def __init__(self, config: ModelSettings, features_VF: Tensor, missing_V: Tensor | None) -> None:
        super().__init__()
        rows, width = features_VF.shape
        self.features: Tensor
        self.missing_rows: Tensor | None
        if config.feature_scale == "unit":
            features_VF = F.normalize(features_VF, dim=-1)
        self.register_buffer("features", features_VF, persistent=False)
        self.register_buffer("missing_rows", missing_V, persistent=False)
        if missing_V is not None:
            present = features_VF[1:][~missing_V[1:]]
            start = present.mean(0) if len(present) else torch.zeros(width, dtype=features_VF.dtype)
            self.missing = nn.Parameter(start)
        # Kept with the weights, so that other items and other domains meet the scale that was trained with.
        self.shift: Tensor | None
        self.scale: Tensor | None
        shift = scale = None
        if config.feature_scale == "standard":
            shift, scale = _column_scale(features_VF)
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        self.adapter = Linear(width, config.hidden_size)
        self.item_bias = nn.Parameter(torch.zeros(rows, config.hidden_size)) if config.item_bias else None
        self.norm = Norm(config.hidden_size, eps=config.norm_eps)
        self.dropout = config.embedding_dropout

    def vectors(self, items: Tensor | None = None) -> Tensor:
        """Item vectors [..., D] of the ids, or [V, D] of the whole catalogue: adapter plus item bias."""
        features = self.features if items is None else F.embedding(items, self.features)
        if self.missing_rows is not None:
            rows = self.missing_rows if items is None else self.missing_rows[items]
            features = torch.where(rows[..., None], self.missing, features)
        if self.shift is not None and self.scale is not None:
            features = (features - self.shift) * self.scale
        vectors: Tensor = self.adapter(features)
        if self.item_bias is not None:
            vectors = vectors + (self.item_bias if items is None else F.embedding(items, self.item_bias))
        return vectors

    def rows(self, items_S: Tensor, vectors_VD: Tensor | None = None, order: Order | None = None) -> Tensor:
        """Item vectors [S, D]; `vectors_VD` are the catalogue's vectors where they are at hand, `order` sorts."""
        return self.vectors(items_S) if vectors_VD is None else lookup(vectors_VD, items_S, order=order)

    def forward(self, vectors_SD: Tensor) -> Tensor:
        """The stream's start [S, D]."""
        out: Tensor = self.norm(vectors_SD, p=self.dropout, training=self.training)
        return out


def _column_scale(features_VF: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [F] and 1 / deviation [F] over the rows that are not all zero; a constant column keeps its scale."""
    present = features_VF[features_VF.any(-1)].double()
    if len(present) < 2:
        return torch.zeros_like(features_VF[0]), torch.ones_like(features_VF[0])
    deviation, mean = torch.std_mean(present, 0)
    return mean.to(features_VF), torch.where(deviation > 0, 1 / deviation, 1.0).to(features_VF)


class MMM4Rec(SequenceModel):
    """The published network.

    Args:
        config: the settings' frozen model section.
        text_features: [V, F_text], float; row 0 is padding and zero.
        image_features: [V, F_image], float; row 0 is padding and zero.
        text_missing: bool [V], rows whose text vector is to be learned, or None.
        image_missing: bool [V], the same for images.

    Raises:
        ValueError: the two tables differ in their number of rows.
    """

    def __init__(
        self,
        config: ModelSettings,
        text_features: Tensor,
        image_features: Tensor,
        *,
        text_missing: Tensor | None = None,
        image_missing: Tensor | None = None,
    ) -> None:
        super().__init__(padding_candidate=config.padding_candidate, mask_duplicate_labels=config.mask_duplicate_labels)
        if len(text_features) != len(image_features):
            raise ValueError(
                f"text_features and image_features must have the same number of rows, "
                f"got {len(text_features)} and {len(image_features)}"
            )
        self.config = config
        self.reads_target_time = config.time == "published"
        self.text = ModalityInput(config, text_features, text_missing)
        self.image = ModalityInput(config, image_features, image_missing)
        self.gaps: PublishedGaps | ObservedGaps | None = None
        if config.time == "published":
            self.gaps = PublishedGaps(config.max_len, config.time_dropout, config.norm_eps)
        elif config.time == "observed":
            self.gaps = ObservedGaps(config.max_len, config.time_dropout)
        self.buckets = GapBuckets(config.hidden_size) if config.time == "buckets" else None
        self.layers = nn.ModuleList(CrossModalLayer(config) for _ in range(config.num_layers))
        self.fusion_weight: nn.Parameter | None = None
        if config.fusion != "static":
            rows = (len(text_features),) if config.fusion == "instance" else ()
            self.fusion_weight = nn.Parameter(torch.zeros(*rows, 2))
        own = {name for name, _ in (*self.named_parameters(), *self.named_buffers())}
        per_item = [
            f"{side}.{part}" for side in ("text", "image") for part in ("features", "missing_rows", "item_bias")
        ]
        per_item += ["fusion_weight"] if config.fusion == "instance" else []
        self.item_rows = tuple(name for name in per_item if name in own)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, items_BL: Tensor, lengths_B: Tensor, timestamps_BL: Tensor) -> Tensor:
        """User vectors [B, D].

        Args:
            items_BL: int64 item ids, right-padded with 0; L = max_len.
            lengths_B: int64, real places, at least 1.
            timestamps_BL: int64 Unix seconds. With `time = published` the target's stamp stands behind a history
                shorter than max_len, then zeros; with `observed` only the first `length` stamps are read.

        Raises:
            ValueError: L is not max_len.
        """
        if items_BL.shape[1] != self.config.max_len:
            raise ValueError(f"items_BL must be [B, {self.config.max_len}] (max_len), got {tuple(items_BL.shape)}")
        places = Places.padded(lengths_B, self.config.max_len)
        image_SD, text_SD = self._rows(places.ids(items_BL))
        image_SD, text_SD, gap_S = self._starts(image_SD, text_SD, timestamps_BL, lengths_B, places)
        streams_MBHT = self._streams(timestamps_BL, lengths_B)
        for layer in self.layers:
            image_SD, text_SD, streams_MBHT = layer(image_SD, text_SD, streams_MBHT, places, gap_S)
        user_BD: Tensor = image_SD.index_select(0, places.last_B)
        return user_BD

    def users(self, windows: Windows) -> Tensor:
        """User vectors [B, D] of windows; what no user vector needs, padding above all, is not computed."""
        return self._users(windows)

    def training_loss(self, windows: Windows, in_batch: bool = False) -> Tensor:
        """As `SequenceModel.training_loss`; with the full loss the catalogue's vectors are made once for both ends."""
        if in_batch:
            return super().training_loss(windows, in_batch)
        vectors = self.image.vectors(), self.text.vectors()
        user_BD = self._users(windows, vectors)
        table_VD = self._fused(*vectors)
        if windows.negative_N is not None:
            return self.sampled_loss(user_BD, table_VD, windows)
        return self.catalogue_loss(user_BD, table_VD, windows.target_B)

    def _users(self, windows: Windows, vectors: _Vectors = (None, None)) -> Tensor:
        if windows.items_BT.is_cuda or windows.rows is None:
            places = self._places(windows)
            return self._last(windows, places, *self._rows(places.ids(windows.items_BT), vectors))
        # On a CPU a part at a time, whose tensors stay in the processor's cache, and of windows of about one length,
        # so that hardly any padding is computed. Items are looked up at once: each look-up has a gradient of the
        # catalogue's size.
        parts = windows.parts(ROWS_A_PART, PADDING_A_PART)
        grids = [Places.padded(part.lengths_B, int(part.lengths_B.max())) for _, part in parts]
        ids = [grid.ids(part.items_BT) for grid, (_, part) in zip(grids, parts, strict=True)]
        sizes = [len(i) for i in ids]
        image, text = (torch.split(rows_SD, sizes) for rows_SD in self._rows(torch.cat(ids), vectors))
        users = [
            self._last(part, grid, image_SD, text_SD)
            for (_, part), grid, image_SD, text_SD in zip(parts, grids, image, text, strict=True)
        ]
        return torch.cat(users).index_select(0, torch.cat([index for index, _ in parts]).argsort())

    def _places(self, windows: Windows) -> Places:
        users, length = windows.items_BT.shape
        if windows.rows is None or windows.rows >= users * length:
            return Places.padded(windows.lengths_B, length)
        return Places.packed(windows.lengths_B, length, windows.rows)

    def _rows(self, items_S: Tensor, vectors: _Vectors = (None, None)) -> tuple[Tensor, Tensor]:
        """Image and text vectors [S, D]."""
        order = None if vectors[0] is None else order_of(items_S, len(vectors[0]))
        return self.image.rows(items_S, vectors[0], order), self.text.rows(items_S, vectors[1], order)

    def _last(self, windows: Windows, places: Places, image_SD: Tensor, text_SD: Tensor) -> Tensor:
        """User vectors [B, D] from the item vectors of the places."""
        timestamps_BT, lengths_B = windows.timestamps_BT, windows.lengths_B
        image_SD, text_SD, gap_S = self._starts(image_SD, text_SD, timestamps_BT, lengths_B, places)
        streams_MBHT = self._streams(timestamps_BT, lengths_B)
        for layer in self.layers[:-1]:
            image_SD, text_SD, streams_MBHT = layer(image_SD, text_SD, streams_MBHT, places, gap_S)
        final = self.layers[-1]
        assert isinstance(final, CrossModalLayer)
        return final.last(image_SD, text_SD, streams_MBHT, places, gap_S)

    def _starts(
        self, image_SD: Tensor, text_SD: Tensor, timestamps_BT: Tensor, lengths_B: Tensor, places: Places
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What enters the first layer, image and text [S, D], and the gaps [S] that pace its scans, if they do."""
        image_SD, text_SD = self.image(image_SD), self.text(text_SD)
        if self.buckets is not None:
            gap_SD = places.rows(self.buckets(timestamps_BT, lengths_B))
            image_SD, text_SD = image_SD + gap_SD, text_SD + gap_SD
        if self.config.time != "decay":
            return image_SD, text_SD, None
        gap_S = places.rows(log_gaps(timestamps_BT, lengths_B)[..., None]).squeeze(-1)
        return image_SD, text_SD, gap_S.to(image_SD.dtype)

    def _streams(self, timestamps_BL: Tensor, lengths_B: Tensor) -> Tensor | None:
        """Time streams [M, B, H, T] of image and text; without dropout they are equal, and there is one."""
        if self.gaps is None:
            return None
        gaps_1BT = self.gaps.gaps(timestamps_BL, lengths_B)[None]
        apart = self.training and self.config.time_dropout > 0
        stream_MBT: Tensor = self.gaps(gaps_1BT.expand(2, -1, -1) if apart else gaps_1BT, lengths_B)
        return stream_MBT[:, :, None, :].expand(-1, -1, self.config.n_heads, -1)

    def normalised_items(self, items: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Text and image vectors [V, D] each, every row divided by max(its length, 1e-12)."""
        return _normalised(self.text.vectors(items)), _normalised(self.image.vectors(items))

    def fusion_factors(self, items: Tensor | None = None) -> tuple[Tensor | float, Tensor | float]:
        """Weights of the text and the image score: 1 and 1, two scalars, or two columns [V, 1]."""
        if self.fusion_weight is None:
            return 1.0, 1.0
        weight: Tensor = self.fusion_weight
        if weight.dim() == 2 and items is not None:
            weight = weight[items]
        text, image = torch.split(weight.softmax(-1), 1, dim=-1)
        return text, image

    def item_table(self, items: Tensor | None = None) -> Tensor:
        """Weighted sum of both modalities' normalised rows over the temperature, [V, D] (spec 4)."""
        return self._fused(self.image.vectors(items), self.text.vectors(items), items)

    def _fused(self, image_VD: Tensor, text_VD: Tensor, items: Tensor | None = None) -> Tensor:
        if self.fusion_weight is None:
            return unit_sum(text_VD, image_VD, scale=1 / self.config.temperature)
        text_weight, image_weight = self.fusion_factors(items)
        both = text_weight * _normalised(text_VD) + image_weight * _normalised(image_VD)
        return both / self.config.temperature

    def item_table_parts(self, items: Tensor | None = None) -> dict[str, Tensor]:
        """What text and image each put into `item_table`: their products with a user vector add up to the score."""
        text, image = self.normalised_items(items)
        text_weight, image_weight = self.fusion_factors(items)
        return {
            "text": text_weight * text / self.config.temperature,
            "image": image_weight * image / self.config.temperature,
        }

    def load_published(self, state_dict: Mapping[str, Tensor]) -> published.LoadReport:
        """Take weights under their published names; see `mmm4rec_cli.models.published` for the map.

        Returns:
            which published keys were missing, and which given keys have no place here.

        Raises:
            ValueError: a tensor's shape does not fit, all of them named.
        """
        return published.load(self, state_dict)

    def published_state(self) -> dict[str, Tensor]:
        """The weights under their published names and in their published shapes."""
        return published.export(self)


def _normalised(vectors_VD: Tensor) -> Tensor:
    return F.normalize(vectors_VD, dim=-1, eps=1e-12)
