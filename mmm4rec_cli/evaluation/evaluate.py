"""Rank the held-out targets of a split with a model, and with the yardsticks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmm4rec_cli.data.sequences import Sequences
from mmm4rec_cli.device import precision
from mmm4rec_cli.evaluation.ranks import Ties, target_ranks
from mmm4rec_cli.models.interface import SequenceModel
from mmm4rec_cli.models.recorded import RecordedUsers
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.world import World


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


def rank_split(
    model: SequenceModel,
    sequences: Sequences,
    targets: Tensor,
    split: str,
    max_len: int,
    ranking: Ranking,
    *,
    order: Tensor | None = None,
    reporter: Reporter | None = None,
    world: World | None = None,
) -> RankedSplit:
    """Rank held-out targets, one a user; the catalogue is encoded once, padding never.

    Args:
        model: put into evaluation mode here, its mode is restored.
        sequences: the interactions, on the model's device or on the CPU.
        targets: their flat positions, on the device of the sequences.
        split: what they are called, `valid` or `test`.
        max_len: places of a history.
        ranking: see `Ranking`.
        order: a permutation of the targets (published behaviour Q14 shuffles), or None.
        reporter: told users done, or None for silence.
        world: the processes that share the users; each of them gets all ranks.
    """
    world = world or World()
    if order is not None:
        targets = targets[order.to(targets.device)]
    was_training = model.training
    model.eval()
    share = targets[world.share(len(targets))]
    ranks = []
    device = next(model.parameters()).device
    reporter = reporter or SilentReporter()
    with torch.inference_mode(), reporter.stage(f"rank {split}", len(share), "users") as stage:
        with precision(ranking.precision, device):
            table_VD = model.item_table()
        # Scores are compared in float32 whatever the encoders computed in: bfloat16 would tie half the catalogue.
        table_VD = table_VD.to(torch.promote_types(table_VD.dtype, torch.float32))
        users = RecordedUsers(model, ranking.precision, device)
        blocks = torch.split(share, ranking.batch_size)
        places = [sequences.lengths(block, max_len).sum() for block in blocks]
        for block, rows in zip(blocks, torch.stack(places).tolist() if places else [], strict=True):
            windows = sequences.windows(block, max_len, with_target_time=model.reads_target_time, rows=rows)
            hidden = seen_items(sequences, block) if ranking.mask_seen else None
            user_BD = users(windows).to(table_VD.dtype)
            ranks.append(
                target_ranks(
                    user_BD,
                    table_VD,
                    windows.target_B.to(device),
                    ties=ranking.ties,
                    hidden=None if hidden is None else (hidden[0].to(device), hidden[1].to(device)),
                    padding_candidate=ranking.padding_candidate,
                )
            )
            stage.advance(len(block))
    model.train(was_training)
    own = torch.cat(ranks).cpu() if ranks else torch.empty(0, dtype=torch.float64)
    return _by_user(sequences, targets, torch.cat(world.gathered(own)).to(targets.device), split)


def seen_items(sequences: Sequences, targets_B: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (row of targets_B [N], item id [N]) of everything in each user's history before the target."""
    first_B = sequences.first_N[targets_B]
    lengths_B = targets_B - first_B
    row_N = torch.arange(len(targets_B), device=targets_B.device).repeat_interleave(lengths_B)
    begins_B = lengths_B.cumsum(0) - lengths_B
    within_N = torch.arange(len(row_N), device=targets_B.device) - begins_B[row_N]
    return row_N, sequences.items_N[first_B[row_N] + within_N].long()


def rank_by_popularity(
    sequences: Sequences,
    known_N: Tensor,
    targets: Tensor,
    split: str,
    n_items: int,
    ties: Ties = "half",
    *,
    mask_seen: bool = False,
) -> RankedSplit:
    """The yardstick: every item scored by its number of interactions that training may see."""
    table_V1 = torch.bincount(sequences.items_N[known_N].long(), minlength=n_items + 1).double()[:, None]
    ones_B1 = torch.ones(len(targets), 1).to(table_V1)
    target_U = sequences.items_N[targets].long()
    hidden = seen_items(sequences, targets) if mask_seen else None
    rank0 = target_ranks(ones_B1, table_V1, target_U, ties=ties, hidden=hidden)
    return _by_user(sequences, targets, rank0, split)


def rank_by_repeating(
    sequences: Sequences, targets: Tensor, split: str, n_items: int, ties: Ties = "half"
) -> RankedSplit:
    """The yardstick that recommends the last item again: it stands above all others, which are equal."""
    target_U = sequences.items_N[targets].long()
    hit_U = sequences.items_N[targets - 1].long() == target_U
    among = {"half": 0.5, "optimistic": 0.0, "pessimistic": 1.0}[ties] * max(n_items - 2, 0)
    rank0 = torch.where(hit_U, 0.0, 1.0 + among).double()
    return _by_user(sequences, targets, rank0, split)


def _by_user(sequences: Sequences, targets: Tensor, rank0: Tensor, split: str) -> RankedSplit:
    users = sequences.users_of(targets)
    order = torch.argsort(users)
    return RankedSplit(
        split=split,
        user_U=users[order].cpu(),
        target_U=sequences.items_N[targets].long()[order].cpu(),
        rank0_U=rank0[order].cpu(),
    )
