"""Metrics of parts of the users: where a model is good and where it is not."""

from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from mmm4rec_cli.data.dataset import Dataset
from mmm4rec_cli.data.sequences import Split
from mmm4rec_cli.errors import UsageError
from mmm4rec_cli.evaluation.evaluate import RankedSplit
from mmm4rec_cli.evaluation.metrics import summary

LENGTHS = (1, 5, 10, 20, 50)
"""Lower ends of the groups of history lengths (events before the target)."""
COUNTS = (0, 1, 5, 20, 100)
"""Lower ends of the groups of popularity (interactions of the target that training may see)."""
MODALITIES = ("neither", "text only", "image only", "text and image")
SEGMENTS = ("length", "popularity", "modality", "novelty")


def kinds_of(text: str) -> list[str]:
    """The kinds of segments in a comma-separated list, each once.

    Raises:
        UsageError: one that is not known.
    """
    kinds = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if unknown := [kind for kind in kinds if kind not in SEGMENTS]:
        raise UsageError(f"--by: unknown segments {', '.join(unknown)}", hint=f"choose of {','.join(SEGMENTS)}")
    return kinds


def group_names(lower_ends: tuple[int, ...]) -> list[str]:
    """Readable ranges: (1, 5, 10) gives "1-4", "5-9", "10+"."""
    closed = [str(low) if high - low == 1 else f"{low}-{high - 1}" for low, high in pairwise(lower_ends)]
    return [*closed, f"{lower_ends[-1]}+"]


def groups_of(kind: str, dataset: Dataset, split: Split, name: str) -> tuple[list[str], Tensor]:
    """The groups of a segmentation and the group of each user's target, int64 [U], by user.

    Args:
        kind: `length` of the history, `popularity` of the target, `modality` (which vectors the target has) or
            `novelty` (whether training may see the target at all).
        dataset: on the CPU.
        split: on the CPU.
        name: `valid` or `test`.
    """
    sequences = dataset.sequences
    targets = split.targets(name)
    targets = targets[torch.argsort(sequences.users_of(targets))]
    items = sequences.items_N[targets].long()
    if kind == "length":
        return group_names(LENGTHS), _bucket(targets - sequences.first_N[targets], LENGTHS)
    counts = torch.bincount(sequences.items_N[split.known_N].long(), minlength=dataset.n_items + 1)[items]
    if kind == "popularity":
        return group_names(COUNTS), _bucket(counts, COUNTS)
    if kind == "novelty":
        return ["new", "known"], (counts > 0).long()
    if kind == "modality":
        has_text, has_image = (torch.from_numpy(has) for has in (dataset.features.has_text, dataset.features.has_image))
        return list(MODALITIES), has_text[items].long() + 2 * has_image[items].long()
    raise ValueError(f"kind: expected one of {', '.join(SEGMENTS)}, got {kind!r}")


def _bucket(values: Tensor, lower_ends: tuple[int, ...]) -> Tensor:
    return torch.bucketize(values, torch.tensor(lower_ends), right=True) - 1


def segment_metrics(
    kinds: Iterable[str], ranked: RankedSplit, dataset: Dataset, split: Split, cutoffs: Iterable[int]
) -> dict[str, dict[str, Mapping[str, float]]]:
    """Metrics and number of users of every group that holds users, by kind and group."""
    cutoffs = tuple(cutoffs)
    found: dict[str, dict[str, Mapping[str, float]]] = {}
    for kind in kinds:
        names, group_U = groups_of(kind, dataset, split, ranked.split)
        members = [(name, ranked.rank0_U[group_U == index]) for index, name in enumerate(names)]
        found[kind] = {name: {"n_users": len(r), **summary(r, cutoffs)} for name, r in members if len(r)}
    return found
