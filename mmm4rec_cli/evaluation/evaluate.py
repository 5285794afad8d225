"""Rank the held-out targets of a split with a model, and with the yardsticks."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmm4rec_cli.data.sequences import Sequences
from mmm4rec_cli.device import precision
from mmm4rec_cli.errors import DataError
from mmm4rec_cli.evaluation.ranks import Ties, target_ranks
from mmm4rec_cli.models.interface import SequenceModel
from mmm4rec_cli.reporter import Reporter, SilentReporter


@dataclass(frozen=True)
class RankedSplit:
    """One rank a user of the split, on the CPU."""

    split: str
    user_U: Tensor
    """User ids, int64."""
    target_U: Tensor
    """Item ids, int64."""
    rank0_U: Tensor
    """float64, 0 is best."""


@dataclass(frozen=True)
class Ranking:
    """How to rank: the tie rule, whether seen items and the padding row compete, users a block, number format."""

    ties: Ties = "half"
    mask_seen: bool = False
    padding_candidate: bool = False
    batch_size: int = 1024
    precision: str = "fp32"


def split_targets(sequences: Sequences, split: str) -> Tensor:
    """Flat positions of a split's targets.

    Raises:
        DataError: no user is long enough.
    """
    targets = sequences.held_out(split)
    if not len(targets):
        need = {"test": 2, "valid": 3}[split]
        raise DataError(f"no user has the {need} interactions that the {split} split needs", hint="add data")
    return targets


def rank_split(
    model: SequenceModel,
    sequences: Sequences,
    split: str,
    max_len: int,
    ranking: Ranking,
    *,
    order: Tensor | None = None,
    reporter: Reporter | None = None,
) -> RankedSplit:
    """Rank every user's target of the split; the catalogue is encoded once.

    Args:
        model: on the device of `sequences`; put into evaluation mode here, its mode is restored.
        sequences: the interactions.
        split: `valid` or `test`.
        max_len: places of a history.
        ranking: see `Ranking`.
        order: a permutation of the targets (published behaviour Q14 shuffles), or None.
        reporter: told users done, or None for silence.
    """
    targets = split_targets(sequences, split)
    if order is not None:
        targets = targets[order.to(targets.device)]
    was_training = model.training
    model.eval()
    ranks = []
    reporter = reporter or SilentReporter()
    number_format = precision(ranking.precision, targets.device)
    with torch.inference_mode(), reporter.stage(f"rank {split}", len(targets), "users") as stage:
        with number_format:
            table_VD = model.item_table()
        # Scores are compared in float32 whatever the encoders computed in: bfloat16 would tie half the catalogue.
        table_VD = table_VD.to(torch.promote_types(table_VD.dtype, torch.float32))
        for block in torch.split(targets, ranking.batch_size):
            windows = sequences.windows(block, max_len, with_target_time=model.reads_target_time)
            with number_format:
                user_BD = model(windows.items_BT, windows.lengths_B, windows.timestamps_BT)
            user_BD = user_BD.to(table_VD.dtype)
            for part, mask_BV in _seen(sequences, block, len(table_VD), ranking.mask_seen):
                ranks.append(
                    target_ranks(
                        user_BD[part],
                        table_VD,
                        windows.target_B[part],
                        ties=ranking.ties,
                        mask=mask_BV,
                        padding_candidate=ranking.padding_candidate,
                    )
                )
            stage.advance(len(block))
    model.train(was_training)
    rank0 = torch.cat(ranks)
    users = sequences.users_of(targets)
    by_user = torch.argsort(users)
    return RankedSplit(
        split=split,
        user_U=users[by_user].cpu(),
        target_U=sequences.items_N[targets].long()[by_user].cpu(),
        rank0_U=rank0[by_user].cpu(),
    )


def _seen(
    sequences: Sequences, targets_B: Tensor, rows: int, mask_seen: bool, limit: int = 1 << 26
) -> Iterator[tuple[slice, Tensor | None]]:
    """Parts of the block with the mask [B, V] of the items in each user's history (None: nothing is masked)."""
    if not mask_seen:
        yield slice(None), None
        return
    step = max(1, limit // rows)
    for begin in range(0, len(targets_B), step):
        part = targets_B[begin : begin + step]
        lengths = part - sequences.first_N[part]
        row = torch.arange(len(part), device=part.device).repeat_interleave(lengths)
        ends = lengths.cumsum(0)
        within = torch.arange(len(row), device=part.device) - (ends - lengths).repeat_interleave(lengths)
        items = sequences.items_N[sequences.first_N[part].repeat_interleave(lengths) + within].long()
        mask_BV = torch.zeros(len(part), rows, dtype=torch.bool, device=part.device)
        mask_BV[row, items] = True
        yield slice(begin, begin + step), mask_BV


def rank_by_popularity(sequences: Sequences, split: str, n_items: int, ties: Ties = "half") -> RankedSplit:
    """The yardstick: every item scored by its number of training interactions (held-out ones not counted)."""
    targets = split_targets(sequences, split)
    last_N = sequences.first_N + sequences.counts_U.repeat_interleave(sequences.counts_U)
    positions_N = torch.arange(len(sequences.items_N), device=targets.device)
    training = sequences.items_N[positions_N < last_N - 2].long()
    table_V1 = torch.bincount(training, minlength=n_items + 1).double()[:, None]
    users = sequences.users_of(targets)
    target_U = sequences.items_N[targets].long()
    rank0 = target_ranks(torch.ones(len(targets), 1).to(table_V1), table_V1, target_U, ties=ties)
    return RankedSplit(split, users.cpu(), target_U.cpu(), rank0.cpu())
