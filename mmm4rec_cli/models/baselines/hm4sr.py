"""HM4SR: two mixtures of experts, one that aligns modalities and one that reads times, before a transformer a stream.

Letters: B users, L places, D width of a stream, V catalogue rows, C categories, K experts.
"""

import torch
from torch import Tensor, nn

from mmm4rec_cli.data.dataset import ModelFeatures
from mmm4rec_cli.data.sequences import Windows
from mmm4rec_cli.models.baselines.foundation import at_last_place, draw_start, real_places
from mmm4rec_cli.models.baselines.streams import Categories, Encoders, Streams, ThreeStreams, contrast, random_places
from mmm4rec_cli.settings.schema import ModelSettings

_EXPERT_DEVIATION = 0.1


class AlignmentMixture(nn.Module):
    """Experts read all three streams; each stream adds what its own gate picks of its third of their outputs."""

    def __init__(self, config: ModelSettings) -> None:
        super().__init__()
        width, experts = config.hidden_size, config.baseline.experts
        self.experts = nn.ModuleList(nn.Linear(3 * width, 3 * width) for _ in range(experts))
        self.gates = nn.ModuleList(nn.Linear(width, experts) for _ in range(3))
        self.weight = nn.Parameter(torch.tensor([0.0, 1.0, 1.0]))

    def forward(self, streams: Streams) -> Streams:
        """Three streams [B, L, D] in and out."""
        joined_BLE = streams.joined()
        gate_BL3K = torch.stack([gate(x).softmax(-1) for gate, x in zip(self.gates, streams, strict=True)], -2)
        mixed_BL3D = torch.zeros_like(torch.stack(streams, -2))
        for k, expert in enumerate(self.experts):
            mixed_BL3D = mixed_BL3D + gate_BL3K[..., k, None] * expert(joined_BLE).unflatten(-1, (3, -1))
        added = (self.weight[:, None] * mixed_BL3D).unbind(-2)
        return Streams(*(x + more for x, more in zip(streams, added, strict=True)))


class TimeEmbedding(nn.Module):
    """A vector [2 D] a place: a table of logarithmic gaps beside a cosine of the absolute time.

    Gaps are taken between real places only; the published code takes the logarithm of negative differences at the
    padding and fails (Q26). Absolute stamps are float32, 128 seconds apart, as published.
    """

    steps_per_octave = 100
    octaves = 30
    """2^30 seconds are 34 years; the published table ends at the longest gap of the data set."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gaps = nn.Embedding(self.steps_per_octave * self.octaves + 1, width)
        self.absolute = nn.Linear(1, width)
        self.wave: Tensor
        self.register_buffer("wave", 10000.0 ** -(torch.arange(width) / width), persistent=False)

    def forward(self, times_BL: Tensor, real_BL: Tensor) -> Tensor:
        """[B, L, 2 D] of Unix seconds [B, L]; what stands at padding is not read."""
        times_BL = torch.where(real_BL, times_BL, times_BL[:, :1])
        gap_BL = torch.diff(times_BL, dim=1, prepend=times_BL[:, :1]).clamp(min=0)
        index_BL = (self.steps_per_octave * torch.log2(gap_BL.double() + 1)).long()
        index_BL = torch.where(real_BL, index_BL.clamp(max=self.steps_per_octave * self.octaves), 0)
        # Not as a matrix product: TF32 would leave days of the stamp.
        phase_BLD = times_BL[..., None].to(self.wave.dtype) * self.absolute.weight[:, 0] + self.absolute.bias
        return torch.cat([self.gaps(index_BL), torch.cos(phase_BLD * self.wave)], -1)


class HM4SR(ThreeStreams):
    """Beside the recommendation loss: contrasts of ids and of masked times, and the categories of each place."""

    reads_categories = True
    time_temperature = 1.0

    def __init__(self, config: ModelSettings, features: ModelFeatures) -> None:
        super().__init__(config, features, overwritable=True)
        width, experts = config.hidden_size, config.baseline.experts
        self.text_adapter = nn.Linear(self.text.width, width)
        self.image_adapter = nn.Linear(self.image.width, width)
        self.places = nn.Embedding(config.max_len, width)
        self.alignment = AlignmentMixture(config)
        self.time = TimeEmbedding(width)
        self.route = nn.Linear(2 * width, experts)
        self.time_experts = nn.Parameter(torch.randn(experts, 3 * width) * _EXPERT_DEVIATION)
        self.masked = nn.Linear(2 * width, width)
        self.encoders = Encoders(config)
        self.categories = Categories(features, width, published=config.baseline.empty_categories)
        draw_start(self)

    def rows(self, items: Tensor | None = None) -> Streams:
        """The id table and the maps of texts and images."""
        return Streams(
            self.items.rows(items), self.text_adapter(self.text(items)), self.image_adapter(self.image(items))
        )

    def _mixed(self, vectors: Streams, times_BL: Tensor, real_BL: Tensor) -> tuple[Streams, Tensor]:
        """The streams before their encoders, and the times' vectors [B, L, 2 D]."""
        streams = self.alignment(Streams(*(x + self.places.weight for x in vectors)))
        time_BLE = self.time(times_BL, real_BL)
        scale_BLE = self.route(time_BLE).softmax(-1) @ self.time_experts
        return Streams(*(streams.joined() * scale_BLE).chunk(3, -1)), time_BLE

    def _users(self, streams: Streams, lengths_B: Tensor) -> Streams:
        encoders = self.encoders.id, self.encoders.text, self.encoders.image
        return Streams(*(at_last_place(e(x), lengths_B) for e, x in zip(encoders, streams, strict=True)))

    def forward(self, items_BL: Tensor, lengths_B: Tensor, timestamps_BL: Tensor) -> Tensor:
        """User vectors [B, 3 D]."""
        streams, _ = self._mixed(self.rows(items_BL), timestamps_BL, real_places(items_BL, lengths_B))
        return self._users(streams, lengths_B).joined()

    def training_loss(self, windows: Windows, in_batch: bool = False) -> Tensor:
        """Recommendation, id contrast, categories and time contrast, each with weight 1."""
        items_BL, lengths_B, target_B = windows.items_BT, windows.lengths_B, windows.target_B
        settings, mask = self.config.baseline, self.mask_duplicate_labels
        real_BL = real_places(items_BL, lengths_B)
        vectors = self.rows(items_BL)
        streams, time_BLE = self._mixed(vectors, windows.timestamps_BT, real_BL)
        users = self._users(streams, lengths_B)
        loss = self.loss(users.joined(), target_B, in_batch=in_batch)
        loss = loss + contrast(users.id, self.items(target_B), target_B, settings.id_temperature, mask_duplicates=mask)
        loss = loss + self.categories.loss(vectors, items_BL, real_BL)

        hidden_BL1 = random_places(real_BL, (settings.mask_share * lengths_B).long())[..., None]
        stand_in_BLD = self.masked(time_BLE)
        for name in ("text", "image"):
            seen_BD = getattr(users, name)
            masked_BLD = torch.where(hidden_BL1, stand_in_BLD, getattr(streams, name))
            masked_BD = at_last_place(getattr(self.encoders, name)(masked_BLD), lengths_B)
            loss = loss + contrast(masked_BD, seen_BD, target_B, self.time_temperature, mask_duplicates=mask) / 2
        return loss
