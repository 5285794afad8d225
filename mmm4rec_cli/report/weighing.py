"""How text, image and time weigh in a trained model: parts of scores, and metrics with a part switched off.

Letters: B users in the block, D width, V catalogue rows with padding row 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mmm4rec_cli.data.dataset import Dataset
from mmm4rec_cli.data.sequences import Split
from mmm4rec_cli.evaluation.evaluate import Ranking, rank_split
from mmm4rec_cli.evaluation.metrics import summary
from mmm4rec_cli.models.interface import SequenceModel
from mmm4rec_cli.models.mmm4rec import MMM4Rec
from mmm4rec_cli.reporter import Reporter
from mmm4rec_cli.settings.schema import Settings

SAMPLE = 2000
"""Test users that are ranked, at most."""


@dataclass(frozen=True)
class Weighing:
    """What the parts of a model bring, on a sample of test users."""

    n_users: int
    whole_sample: bool
    """Every user of the test split is in it."""
    text_part: float
    """Mean part of the top item's score that comes from its text vector."""
    image_part: float
    text_leads: float
    """Share of users whose top item has the larger part from text."""
    fusion: tuple[float, float] | None
    """Trained weights of the text and the image score (means over items), or None: both count 1."""
    without: dict[str, dict[str, float]]
    """Metrics by what was switched off; `nothing` first."""


class _OneTable(SequenceModel):
    """A trained model that ranks by another item table."""

    def __init__(self, model: MMM4Rec, table_VD: Tensor) -> None:
        super().__init__(padding_candidate=model.padding_candidate, mask_duplicate_labels=True)
        self.model, self.table_VD = model, table_VD
        self.reads_target_time = model.reads_target_time
        self.eval()  # ranking restores this mode, and the model's with it

    def forward(self, items_BL: Tensor, lengths_B: Tensor, timestamps_BL: Tensor) -> Tensor:
        user_BD: Tensor = self.model(items_BL, lengths_B, timestamps_BL)
        return user_BD

    def item_table(self, items: Tensor | None = None) -> Tensor:
        return self.table_VD if items is None else self.table_VD[items]


def score_parts(model: MMM4Rec) -> tuple[Tensor, Tensor]:
    """The text and the image part of the item table, [V, D] each; their sum is `item_table()`."""
    text, image = model.normalised_items()
    text_weight, image_weight = model.fusion_factors()
    return text_weight * text / model.config.temperature, image_weight * image / model.config.temperature


@contextmanager
def _without_time(model: MMM4Rec) -> Iterator[None]:
    gaps, model.gaps = model.gaps, None
    try:
        yield
    finally:
        model.gaps = gaps


def weigh(
    model: SequenceModel, dataset: Dataset, split: Split, settings: Settings, device: torch.device, reporter: Reporter
) -> Weighing | None:
    """Measure on at most `SAMPLE` test users, drawn evenly over their ids; None for a model without modalities.

    Nothing is trained again: switching a part off shows what the trained model leans on, not what a model trained
    without it would reach.
    """
    if not isinstance(model, MMM4Rec):
        return None
    model.eval()
    tests = split.targets("test")
    chosen = tests[torch.linspace(0, len(tests) - 1, min(SAMPLE, len(tests))).round().long()].to(device)
    sequences = dataset.sequences.to(device)
    max_len, cutoffs = settings.model.max_len, settings.evaluate.k
    ranking = Ranking(ties=settings.evaluate.ties, padding_candidate=settings.model.padding_candidate)
    with torch.inference_mode(), reporter.stage("weigh text, image and time", len(chosen), "users") as stage:
        text_VD, image_VD = score_parts(model)

        def measure(table_VD: Tensor) -> dict[str, float]:
            ranked = rank_split(_OneTable(model, table_VD), sequences, chosen, "test", max_len, ranking)
            return summary(ranked.rank0_U, cutoffs)

        without = {
            "nothing": measure(text_VD + image_VD),
            "text scores": measure(image_VD),
            "image scores": measure(text_VD),
        }
        if model.gaps is not None:
            with _without_time(model):
                without["time streams"] = measure(text_VD + image_VD)
        parts = []
        for block in torch.split(chosen, 512):
            windows = sequences.windows(block, max_len, with_target_time=model.reads_target_time)
            user_BD = model(windows.items_BT, windows.lengths_B, windows.timestamps_BT)
            top_B = 1 + (user_BD @ (text_VD + image_VD)[1:].T).argmax(1)
            parts.append(torch.stack([(user_BD * part[top_B]).sum(1) for part in (text_VD, image_VD)]))
        stage.advance(len(chosen))
    text_B, image_B = torch.cat(parts, 1)
    fusion = None
    if model.fusion_weight is not None:
        text_weight, image_weight = (torch.as_tensor(w).detach().float().mean() for w in model.fusion_factors())
        fusion = float(text_weight), float(image_weight)
    return Weighing(
        n_users=len(chosen),
        whole_sample=len(chosen) == len(tests),
        text_part=float(text_B.mean()),
        image_part=float(image_B.mean()),
        text_leads=float((text_B > image_B).double().mean()),
        fusion=fusion,
        without=without,
    )
