"""Real users: what they did, what came next, and what the model put on top."""

import base64
import io
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageOps

from mmm4rec_cli.data import columns
from mmm4rec_cli.data.dataset import Dataset
from mmm4rec_cli.data.sequences import Split
from mmm4rec_cli.data.tables import read_tables
from mmm4rec_cli.evaluation.evaluate import RankedSplit
from mmm4rec_cli.models.interface import SequenceModel
from mmm4rec_cli.settings.schema import Settings
from mmm4rec_cli.workspace import Workspace

USERS, HISTORY, TOP = 6, 6, 10
LARGEST = (136, 168)
"""Pixels of a picture on the page, at most: one and a half times its shown size."""


@dataclass(frozen=True)
class Item:
    """An item as the page shows it."""

    raw_item_id: str
    title: str
    picture: str | None
    """A data URI, or None where there is no readable picture."""
    is_target: bool = False
    in_history: bool = False


@dataclass(frozen=True)
class Case:
    """One user of the test split."""

    raw_user_id: str
    history: list[Item]
    """The last events before the target, oldest first."""
    history_length: int
    target: Item
    rank: int
    """Place of the target, 1 is best."""
    top: list[Item]


class Pictures:
    """Titles and small pictures of a data set's items; each picture is read once."""

    def __init__(self, workspace: Workspace, dataset: Dataset) -> None:
        self._root = workspace.root
        self._rows: list[tuple[str, str | None]] = []
        for domain in dataset.domains:
            items = read_tables(workspace, domain).items
            for title, text, path in zip(
                *(items[name].to_pylist() for name in (columns.TITLE, columns.TEXT, columns.IMAGE)), strict=True
            ):
                self._rows.append((title or (text or "")[:80], path))
        self._raw = dataset.raw_item_ids
        self._made: dict[int, Item] = {}

    def item(self, item_id: int) -> Item:
        """What to show of an item id (from 1)."""
        if item_id not in self._made:
            title, path = self._rows[item_id - 1]
            raw = self._raw[item_id - 1]
            picture = None if path is None else data_uri(self._root / path)
            self._made[item_id] = Item(raw, title or raw, picture)
        return self._made[item_id]


def data_uri(path: Path) -> str | None:
    """A picture made small, as a data URI; None where the file is missing or no picture."""
    try:
        with Image.open(path) as opened:
            small = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    small.thumbnail(LARGEST)
    written = io.BytesIO()
    small.save(written, "JPEG", quality=70, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode("ascii")


def cases(
    workspace: Workspace,
    model: SequenceModel,
    dataset: Dataset,
    split: Split,
    ranked: RankedSplit,
    settings: Settings,
    device: torch.device,
) -> list[Case]:
    """Test users taken evenly along their ranks, from the best-ranked target to the worst: no choice by taste."""
    sequences = dataset.sequences.to(device)
    by_rank = torch.argsort(ranked.rank0_U, stable=True)
    places = torch.linspace(0, len(by_rank) - 1, min(USERS, len(by_rank))).round().long()
    users = ranked.user_U[by_rank[places]]
    targets = split.targets("test")
    position_of = dict(zip(dataset.sequences.users_of(targets).tolist(), targets.tolist(), strict=True))
    chosen = torch.tensor([position_of[user] for user in users.tolist()])
    pictures = Pictures(workspace, dataset)
    model.eval()
    with torch.inference_mode():
        moved = chosen.to(device)
        windows = sequences.windows(moved, settings.model.max_len, with_target_time=model.reads_target_time)
        scores = model.scores(model(windows.items_BT, windows.lengths_B, windows.timestamps_BT))
        scores[:, 0] = float("-inf")
        top = scores.topk(min(TOP, dataset.n_items), dim=1).indices.cpu()
    found = []
    for row, position in enumerate(chosen.tolist()):
        first = int(dataset.sequences.first_N[position])
        before = dataset.sequences.items_N[first:position].tolist()
        target = int(dataset.sequences.items_N[position])
        found.append(
            Case(
                raw_user_id=dataset.raw_user_ids[int(users[row])],
                history=[pictures.item(item) for item in before[-HISTORY:]],
                history_length=len(before),
                target=replace(pictures.item(target), is_target=True),
                rank=int(ranked.rank0_U[by_rank[places[row]]]) + 1,
                top=[
                    replace(pictures.item(item), is_target=item == target, in_history=item in before)
                    for item in top[row].tolist()
                ],
            )
        )
    return found
