"""One domain, or several laid side by side, with the vectors of their items: what models are trained on."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmm4rec_cli.data.sequences import Sequences
from mmm4rec_cli.data.tables import Tables, read_tables
from mmm4rec_cli.errors import DataError
from mmm4rec_cli.features.store import ItemFeatures, encoder_name, read_features
from mmm4rec_cli.settings.schema import FeatureSettings
from mmm4rec_cli.workspace import Workspace


@dataclass(frozen=True)
class ModelFeatures:
    """Feature tables as a model takes them, [V, F] float32, and which rows it has to learn (or None)."""

    text: Tensor
    image: Tensor
    text_missing: Tensor | None
    image_missing: Tensor | None
    categories: Sequence[list[str] | None] | None = None
    """Names of each item's categories, padding not among the items; None where no table has any."""

    def category_counts(self) -> Tensor | None:
        """How often each item is in each category, [V, C] float32; C names in the order of code points."""
        names = sorted({name for names in self.categories or () for name in names or ()})
        if self.categories is None or not names:
            return None
        column = {name: place for place, name in enumerate(names)}
        counts = torch.zeros(len(self.text), len(names))
        for item, mine in enumerate(self.categories, 1):
            for name in mine or ():
                counts[item, column[name]] += 1
        return counts


@dataclass(frozen=True)
class Dataset:
    """Interactions and item vectors of one data set.

    `name` is the domain, or the domains joined by "+". Item ids run from 1, users from 0, across all domains; with
    several domains raw ids carry the prefix "<domain>-".
    """

    name: str
    domains: tuple[str, ...]
    sequences: Sequences
    raw_item_ids: list[str]
    raw_user_ids: list[str]
    features: ItemFeatures
    encoder: str
    fingerprint: str
    """Identity of the interactions and the catalogue."""
    categories: list[list[str] | None] | None = None
    """Names of each item's categories, in the order of item ids; None where no table has any."""

    @property
    def n_items(self) -> int:
        """Items of the catalogue, padding not counted."""
        return len(self.raw_item_ids)

    @property
    def n_users(self) -> int:
        """Users."""
        return len(self.raw_user_ids)

    def model_features(self, missing: str) -> ModelFeatures:
        """Feature tables with the stated treatment of missing vectors.

        Args:
            missing: `zero`, `mean` (of the vectors that are there) or `learned`.
        """
        f = self.features
        masks = [~has & (np.arange(len(has)) > 0) for has in (f.has_text, f.has_image)]
        tables = [f.text, f.image]
        if missing == "mean":
            tables = [_filled(table, mask) for table, mask in zip(tables, masks, strict=True)]
        learned = [torch.from_numpy(mask) if missing == "learned" and mask.any() else None for mask in masks]
        return ModelFeatures(
            torch.from_numpy(tables[0]), torch.from_numpy(tables[1]), learned[0], learned[1], self.categories
        )


def _filled(table: NDArray[np.float32], missing: NDArray[np.bool_]) -> NDArray[np.float32]:
    present = ~missing
    present[0] = False
    if not missing.any() or not present.any():
        return table
    filled = table.copy()
    filled[missing] = table[present].mean(0, dtype=np.float64)
    return filled


def encoder_at_hand(workspace: Workspace, domains: Sequence[str], features: FeatureSettings) -> FeatureSettings:
    """The settings' own encoder where its files are there, else the only one that all domains have.

    For an encoder that nobody chose: own embeddings, say, are there under another name than the default's.
    """
    name = encoder_name(features)
    if all(workspace.features(domain, name).is_file() for domain in domains):
        return features
    there = [{path.stem for path in workspace.features(domain, name).parent.glob("*.parquet")} for domain in domains]
    common = set.intersection(*there) if there else set()
    if len(common) != 1:
        return features
    return features.model_copy(update={"encoder": common.pop(), "text_model": None, "image_model": None})


def load_dataset(workspace: Workspace, domains: Sequence[str], encoder: str) -> Dataset:
    """Read the tables and features of one or more preprocessed domains.

    Raises:
        DataError: a file is missing (the hint makes it), malformed, or does not fit the others.
    """
    tables = [read_tables(workspace, domain) for domain in domains]
    features = [
        read_features(workspace.features(table.domain, encoder), table.catalogue, len(table.raw_item_ids))
        for table in tables
    ]
    if len({f.fingerprint for f in features}) > 1:
        raise DataError(
            "the domains' features come from different encoders: "
            + ", ".join(f"{d} {f.fingerprint[:8]}" for d, f in zip(domains, features, strict=True)),
            hint="run `mmm4rec preprocess` for all of them with the same encoder",
        )
    if len(tables) == 1:
        table, joined = tables[0], features[0]
        sequences = Sequences.of(table.user_id, table.item_id, table.timestamp, len(table.raw_user_ids))
        return Dataset(
            name=table.domain,
            domains=(table.domain,),
            sequences=sequences,
            raw_item_ids=table.raw_item_ids,
            raw_user_ids=table.raw_user_ids,
            features=joined,
            encoder=encoder,
            fingerprint=table.fingerprint,
            categories=table.categories,
        )
    return _joined(tables, features, encoder)


def _joined(tables: Sequence[Tables], features: Sequence[ItemFeatures], encoder: str) -> Dataset:
    users = np.cumsum([0, *(len(t.raw_user_ids) for t in tables)])
    items = np.cumsum([0, *(len(t.raw_item_ids) for t in tables)])
    sequences = Sequences.of(
        np.concatenate([t.user_id + np.int32(shift) for t, shift in zip(tables, users, strict=False)]),
        np.concatenate([t.item_id + np.int32(shift) for t, shift in zip(tables, items, strict=False)]),
        np.concatenate([t.timestamp for t in tables]),
        int(users[-1]),
    )

    def rows(name: str) -> NDArray[np.float32]:
        parts = [getattr(f, name) for f in features]
        return np.concatenate([parts[0], *(part[1:] for part in parts[1:])])

    joined = ItemFeatures(
        text=rows("text"),
        has_text=rows("has_text").astype(np.bool_),
        image=rows("image"),
        has_image=rows("has_image").astype(np.bool_),
        metadata=features[0].metadata,
        fingerprint=features[0].fingerprint,
    )
    domains = tuple(t.domain for t in tables)
    identity = hashlib.sha256("\n".join(f"{t.domain} {t.fingerprint}" for t in tables).encode()).hexdigest()
    return Dataset(
        name="+".join(domains),
        domains=domains,
        sequences=sequences,
        raw_item_ids=[f"{t.domain}-{raw}" for t in tables for raw in t.raw_item_ids],
        raw_user_ids=[f"{t.domain}-{raw}" for t in tables for raw in t.raw_user_ids],
        features=joined,
        encoder=encoder,
        fingerprint=identity,
        categories=_joined_categories(tables),
    )


def _joined_categories(tables: Sequence[Tables]) -> list[list[str] | None] | None:
    if all(table.categories is None for table in tables):
        return None
    return [names for table in tables for names in table.categories or [None] * table.n_items]
