"""ATHWE: a wavelet exchange between three streams and a mixture of experts routed by time, then a transformer a stream.

Letters: B users, L places, D width of a stream, V catalogue rows, K routed experts.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmm4rec_cli.data.dataset import ModelFeatures
from mmm4rec_cli.data.sequences import Windows
from mmm4rec_cli.models.baselines.foundation import at_last_place, draw_start, mean_over, real_places
from mmm4rec_cli.models.baselines.medoids import k_medoids, whitened
from mmm4rec_cli.models.baselines.streams import Categories, Encoders, Streams, ThreeStreams, contrast, random_places
from mmm4rec_cli.models.baselines.wavelet import transform
from mmm4rec_cli.settings.schema import ModelSettings

_EXPERT_DEVIATION = 0.1
_LEVELS = 4


class TimeTable(nn.Embedding):
    """A vector a place by the gap before it, on a scale that saturates: 200 (1 - exp(-gap / 1.5e7 seconds)).

    The first place has row 1, padding row 0.
    """

    def __init__(self, width: int) -> None:
        super().__init__(210, width)

    def of(self, times_BL: Tensor, real_BL: Tensor) -> Tensor:
        """[B, L, D] of Unix seconds [B, L]."""
        gap_BL = torch.diff(times_BL, dim=1, prepend=times_BL[:, :1]).clamp(min=0)
        index_BL = torch.round(200 * -torch.expm1(-gap_BL.double() / 1.5e7)).long()
        index_BL[:, 0] = 1
        vectors: Tensor = self(torch.where(real_BL, index_BL, 0))
        return vectors


class WaveletExchange(nn.Module):
    """Each stream gets a gated sum of all streams' wavelet coefficients, level by level.

    The published transform runs over padding too; otherwise padded places are zero.
    """

    def __init__(self, config: ModelSettings) -> None:
        super().__init__()
        self.over_padding = config.baseline.filter_padding
        matrices = transform(config.max_len, _LEVELS)
        self.sizes = [len(matrix) for matrix in matrices]
        self.analysis: Tensor
        self.register_buffer("analysis", torch.cat(matrices).float(), persistent=False)
        # For each source stream and level the maps to all three targets.
        width, count = config.hidden_size, 3 * len(self.sizes)
        self.maps = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(count))
        self.weight = nn.Parameter(torch.tensor([0.0, 1.0, 1.0]))

    def forward(self, streams: Streams, real_BL: Tensor) -> Streams:
        """Three streams [B, L, D] in and out."""
        shown = streams if self.over_padding else Streams(*(x * real_BL[..., None] for x in streams))
        maps = iter(self.maps)
        mixed: list[Tensor] = []
        for stream in shown:
            gated = []
            for level_BnD in torch.split(self.analysis @ stream, self.sizes, dim=1):
                gate_Bn3D = torch.sigmoid(next(maps)(level_BnD)).view(*level_BnD.shape[:2], 3, -1)
                gated.append(gate_Bn3D * level_BnD[:, :, None])
            mixed.append(torch.cat(gated, 1))
        back = torch.einsum("nl,bnmd->mbld", self.analysis, mixed[0] + mixed[1] + mixed[2])
        return Streams(*(x + w * (b - s) for x, s, w, b in zip(streams, shown, self.weight, back, strict=True)))


class TimeMixture(nn.Module):
    """Channel scales: one shared expert and the best of the routed ones, chosen by the time before a place."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__()
        width, experts = config.hidden_size, config.baseline.experts
        if config.baseline.experts_used > experts:
            raise ValueError(f"model.baseline.experts_used must be at most model.baseline.experts={experts}")
        self.used = config.baseline.experts_used
        self.shared = nn.Parameter(torch.randn(3 * width) * _EXPERT_DEVIATION)
        self.experts = nn.Parameter(torch.randn(experts, 3 * width) * _EXPERT_DEVIATION)
        self.widen = nn.Linear(width, 3 * width)
        self.route = nn.Linear(3 * width, experts)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, streams: Streams, time_BLD: Tensor) -> Streams:
        """Three streams [B, L, D] in and out."""
        weight_BLK = self.route(self.dropout(F.relu(self.widen(time_BLD)))).softmax(-1)
        best = weight_BLK.topk(self.used, -1)
        kept_BLK = torch.zeros_like(weight_BLK).scatter(-1, best.indices, best.values)
        kept_BLK = kept_BLK / kept_BLK.sum(-1, keepdim=True).clamp(min=1e-6)
        return Streams(*(streams.joined() * (self.shared + kept_BLK @ self.experts)).chunk(3, -1))

    def likeness(self, streams: Streams, real_BL: Tensor) -> Tensor:
        """The mean cosine between the outputs of two different routed experts over all real places."""
        # An output is x scaled by channel, so products of outputs need the channels' energies only.
        energy_E = (streams.joined() * real_BL[..., None]).square().sum((0, 1))
        scaled_KE = F.normalize(self.experts * energy_E.clamp(min=1e-24).sqrt(), dim=-1)
        count = len(scaled_KE)
        return (scaled_KE.sum(0).square().sum() - count) / (count * (count - 1))


class ATHWE(ThreeStreams):
    """Beside the recommendation loss: id and time contrasts, categories, clusters of features, unlike experts."""

    reads_categories = True
    time_temperature = 1.0
    likeness_weight = 0.9

    def __init__(self, config: ModelSettings, features: ModelFeatures) -> None:
        super().__init__(config, features)
        width, settings = config.hidden_size, config.baseline
        self.places = nn.Embedding(config.max_len, width)
        self.exchange = WaveletExchange(config)
        self.times = TimeTable(width)
        self.mixture = TimeMixture(config)
        self.masked = nn.Linear(width, width)
        self.encoders = Encoders(config)
        self.fusion = nn.Parameter(torch.ones(3))
        self.clusters = nn.ModuleList(nn.Linear(width, settings.clusters) for _ in range(2))
        draw_start(self)
        # As published, these keep the framework's start.
        self.text_adapter = nn.Linear(self.text.width, width)
        self.image_adapter = nn.Linear(self.image.width, width)
        self.categories = Categories(features, width, published=settings.empty_categories)
        self.cluster_seed = torch.initial_seed()
        self.cluster_2V: Tensor | None
        self.register_buffer("cluster_2V", None, persistent=False)

    def train(self, mode: bool = True) -> "ATHWE":
        """As always; before the first training the items are clustered, which serving never needs."""
        if mode and self.cluster_2V is None:
            random = np.random.default_rng(self.cluster_seed)
            tables = (part.features.cpu().double().numpy() for part in (self.text, self.image))
            labels = [k_medoids(whitened(table), self.config.baseline.clusters, random) for table in tables]
            self.cluster_2V = torch.from_numpy(np.stack(labels)).to(self.text.features.device)
        super().train(mode)
        return self

    def _vectors(self, items: Tensor | None = None) -> Streams:
        return Streams(
            self.items.rows(items), self.text_adapter(self.text(items)), self.image_adapter(self.image(items))
        )

    def rows(self, items: Tensor | None = None) -> Streams:
        """The id table and the maps of texts and images, each times its trained share."""
        share_3 = self.fusion.softmax(0)
        return Streams(*(w * x for w, x in zip(share_3, self._vectors(items), strict=True)))

    def _users(self, streams: Streams, lengths_B: Tensor) -> Streams:
        encoders = self.encoders.id, self.encoders.text, self.encoders.image
        return Streams(*(at_last_place(e(x), lengths_B) for e, x in zip(encoders, streams, strict=True)))

    def _exchanged(self, vectors: Streams, real_BL: Tensor) -> Streams:
        return self.exchange(Streams(*(x + self.places.weight for x in vectors)), real_BL)  # type: ignore[no-any-return]

    def forward(self, items_BL: Tensor, lengths_B: Tensor, timestamps_BL: Tensor) -> Tensor:
        """User vectors [B, 3 D]."""
        real_BL = real_places(items_BL, lengths_B)
        streams = self._exchanged(self._vectors(items_BL), real_BL)
        return self._users(self.mixture(streams, self.times.of(timestamps_BL, real_BL)), lengths_B).joined()

    def training_loss(self, windows: Windows, in_batch: bool = False) -> Tensor:
        """Recommendation, id contrast, categories, clusters, time contrast (weight 1) and the experts' likeness."""
        items_BL, lengths_B, target_B = windows.items_BT, windows.lengths_B, windows.target_B
        settings, mask = self.config.baseline, self.mask_duplicate_labels
        real_BL = real_places(items_BL, lengths_B)
        vectors = self._vectors(items_BL)
        before = self._exchanged(vectors, real_BL)
        time_BLD = self.times.of(windows.timestamps_BT, real_BL)
        streams = self.mixture(before, time_BLD)
        users = self._users(streams, lengths_B)
        loss = self.loss(users.joined(), target_B, in_batch=in_batch)
        loss = loss + contrast(users.id, self.items(target_B), target_B, settings.id_temperature, mask_duplicates=mask)
        loss = loss + self.categories.loss(vectors, items_BL, real_BL)
        loss = loss + self._cluster_loss(vectors, items_BL, real_BL)
        loss = loss + self.likeness_weight * self.mixture.likeness(before, real_BL)

        count_B = torch.zeros_like(lengths_B)
        if not settings.mask_nothing:
            count_B = (settings.mask_share * lengths_B).long().clamp(min=1)
        hidden_BL1 = random_places(real_BL, count_B)[..., None]
        stand_in_BLD = self.masked(time_BLD)
        for name in ("text", "image"):
            masked_BLD = torch.where(hidden_BL1, stand_in_BLD, getattr(streams, name))
            masked_BD = at_last_place(getattr(self.encoders, name)(masked_BLD), lengths_B)
            seen_BD = getattr(users, name)
            loss = loss + contrast(masked_BD, seen_BD, target_B, self.time_temperature, mask_duplicates=mask) / 2
        return loss

    def _cluster_loss(self, vectors: Streams, items_BL: Tensor, real_BL: Tensor) -> Tensor:
        assert self.cluster_2V is not None  # made by `train`
        losses = []
        for head, label_V, vectors_BLD in zip(
            self.clusters, self.cluster_2V, (vectors.text, vectors.image), strict=True
        ):
            each = F.cross_entropy(head(vectors_BLD).flatten(0, 1), label_V[items_BL].flatten(), reduction="none")
            losses.append(mean_over(each.view_as(real_BL), real_BL))
        return (losses[0] + losses[1]) / 2
