"""Sequences on the device: interactions once as flat tensors, windows gathered by index.

No prefix is ever written out: a training example is the flat position of its target. Letters: N interactions,
U users, B windows in the batch, T places (max_len).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmm4rec_cli.errors import DataError
from mmm4rec_cli.reporter import Reporter
from mmm4rec_kernels import windows_before

SHARE = 0.25
"""Of a GPU's memory: what interactions may take before they stay in the host's."""


@dataclass(frozen=True)
class Windows:
    """Histories before their targets, right-padded with zeros."""

    items_BT: Tensor
    """Item ids, int64."""
    lengths_B: Tensor
    """Real places, int64, 1 to T."""
    timestamps_BT: Tensor
    """Unix seconds, int64."""
    target_B: Tensor
    """Item ids, int64."""
    rows: int | None = None
    """A bound on the sum of the lengths that a model may compute with instead of B T; None: it is not known."""
    candidate_C: Tensor | None = None
    """Item ids that the in-batch loss chooses from, int64; None: the windows' own targets."""
    own: int = 0
    """Where the own targets stand among the candidates."""
    negative_N: Tensor | None = None
    """Item ids drawn uniformly from the catalogue for the sampled loss, int64."""
    n_items: int = 0
    """Items that they were drawn from."""

    def to(self, device: torch.device) -> "Windows":
        """The same on another device."""
        moved: dict[str, Any] = {name: t.to(device, non_blocking=True) for name, t in self.tensors().items()}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        """Those of its fields that are tensors, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def parts(self, rows: int, padding: int) -> list[tuple[Tensor, "Windows"]]:
        """The same in parts of neighbours by length, each with its windows' places in the whole (waits for lengths).

        Args:
            rows: most places of a part that is padded to its longest window, but for a part of one window.
            padding: most of them that may be padding.
        """
        order_B = self.lengths_B.argsort(stable=True)
        cuts, real = [0], 0
        for place, length in enumerate(self.lengths_B[order_B].tolist()):
            whole = (place + 1 - cuts[-1]) * length
            if place > cuts[-1] and (whole > rows or whole - real - length > padding):
                cuts.append(place)
                real = 0
            real += length
        indices = [order_B[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(order_B)], strict=True)]
        return [
            (i, Windows(self.items_BT[i], self.lengths_B[i], self.timestamps_BT[i], self.target_B[i])) for i in indices
        ]

    def among(self, candidate_C: Tensor, own: int) -> "Windows":
        """The same as a part of a larger batch, whose targets are the candidates."""
        return replace(self, candidate_C=candidate_C, own=own)


@dataclass(frozen=True)
class Split:
    """Flat positions of the targets of each part; no target is a user's first interaction."""

    kind: str
    known_N: Tensor
    """Interactions that training may see, bool [N]; yardsticks count these alone."""
    train: Tensor
    valid: Tensor
    test: Tensor

    def targets(self, name: str) -> Tensor:
        """The targets of `valid` or `test`.

        Raises:
            DataError: there is none.
        """
        targets = {"valid": self.valid, "test": self.test}[name]
        if not len(targets):
            raise DataError(
                f"the {self.kind} split holds no {name} target", hint="it takes users with three interactions; add data"
            )
        return targets

    def to(self, device: torch.device) -> "Split":
        """The same on another device."""
        return Split(self.kind, *(x.to(device) for x in (self.known_N, self.train, self.valid, self.test)))


@dataclass(frozen=True)
class Sequences:
    """All interactions of a data set, users back to back, each in the order of time."""

    items_N: Tensor
    """Item ids, int32."""
    times_N: Tensor
    """Unix seconds, int64."""
    first_N: Tensor
    """Flat position of the first interaction of the same user, int64."""
    offsets_U1: Tensor
    """Flat position of each user's first interaction, then N; int64."""

    @classmethod
    def of(
        cls, user_id: NDArray[np.int32], item_id: NDArray[np.int32], timestamp: NDArray[np.int64], n_users: int
    ) -> "Sequences":
        """From columns sorted by user, then time; users without interactions are allowed."""
        counts = np.bincount(user_id, minlength=n_users)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        first = np.repeat(offsets[:-1], counts)
        return cls(*map(torch.from_numpy, (item_id.copy(), timestamp.copy(), first, offsets)))

    def to(self, device: torch.device) -> "Sequences":
        """The same on another device."""
        return Sequences(*(x.to(device) for x in (self.items_N, self.times_N, self.first_N, self.offsets_U1)))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in (self.items_N, self.times_N, self.first_N, self.offsets_U1))

    @property
    def counts_U(self) -> Tensor:
        """Interactions of each user, int64."""
        return self.offsets_U1.diff()

    def users_of(self, positions: Tensor) -> Tensor:
        """The user of each flat position, int64."""
        return torch.searchsorted(self.offsets_U1, positions, right=True) - 1

    def lengths(self, targets: Tensor, max_len: int) -> Tensor:
        """Real places of the windows before the targets, int64, 1 to `max_len`."""
        return (targets - self.first_N[targets]).clamp(max=max_len)

    def windows(self, targets_B: Tensor, max_len: int, *, with_target_time: bool, rows: int | None = None) -> Windows:
        """The up to `max_len` interactions before each target, left-aligned.

        Args:
            targets_B: flat positions of the targets, int64, none of them a user's first interaction.
            max_len: T.
            with_target_time: published behaviour Q2: when history and target together have at most T elements, the
                target's own stamp stands in the first padded place. Otherwise stamps stand at real places only.
            rows: see `Windows.rows`.
        """
        items_BT, lengths_B, timestamps_BT, target_B = windows_before(
            self.items_N, self.times_N, self.first_N, targets_B, max_len, with_next=with_target_time
        )
        return Windows(items_BT, lengths_B, timestamps_BT, target_B, rows)

    def all_targets(self) -> Tensor:
        """Pre-training: every element but each user's first (spec 8)."""
        positions_N = torch.arange(len(self.items_N), device=self.items_N.device)
        return positions_N[positions_N > self.first_N]

    def split(self, kind: str, share: float = 0.1) -> "Split":
        """Hold targets out.

        Args:
            kind: `leave_one_out`: each user's last element is the test target, the last but one the valid target, all
                before it train (spec 7.4). `temporal`: two moments cut all interactions; what happened before the first
                trains, each user's first event between them is the valid target, the first one after them the test
                target, with everything of the user before it as history. Nothing of the future is trained on.
            share: for `temporal`, share of the interactions after each cut.
        """
        positions_N = torch.arange(len(self.items_N), device=self.items_N.device)
        if kind == "leave_one_out":
            counts_U, ends_U = self.counts_U, self.offsets_U1[1:]
            known_N = positions_N < (ends_U - 2).repeat_interleave(counts_U)
            valid, test = (ends_U[counts_U > back] - back for back in (2, 1))
        elif kind == "temporal":
            ordered = self.times_N.sort().values
            cuts = [ordered[min(int(len(ordered) * (1 - n * share)), len(ordered) - 1)] for n in (2, 1)]
            known_N = self.times_N < cuts[0]
            before_N = torch.stack([self.times_N < cut for cut in cuts])
            period_N = 2 - before_N.sum(0)  # 0 train, 1 valid, 2 test
            earlier_N = torch.where(positions_N > self.first_N, period_N.roll(1), -1)
            opens_N = (earlier_N >= 0) & (earlier_N < period_N)  # the first event of its period, with a history
            valid, test = (positions_N[opens_N & (period_N == p)] for p in (1, 2))
        else:
            raise ValueError(f"kind: expected leave_one_out or temporal, got {kind!r}")
        train = positions_N[known_N & (positions_N > self.first_N)]
        return Split(kind=kind, known_N=known_N, train=train, valid=valid, test=test)

    def repeated(self, targets: Tensor) -> Tensor:
        """Whether the target's item already occurs in the user's history before it, bool."""
        users = self.users_of(torch.arange(len(self.items_N), device=self.items_N.device))
        width = int(self.items_N.max()) + 1
        keys = users * width + self.items_N
        # A stable sort puts equal (user, item) pairs in order of time: a pair repeats if its left neighbour is equal.
        order = torch.argsort(keys, stable=True)
        again = torch.zeros_like(keys, dtype=torch.bool)
        again[order[1:]] = keys[order[1:]] == keys[order[:-1]]
        return again[targets]

    def tied(self, targets: Tensor) -> Tensor:
        """Whether the target has the same time stamp as the event before it, bool."""
        return self.times_N[targets] == self.times_N[targets - 1]


def placed(sequences: Sequences, device: torch.device, reporter: Reporter) -> Sequences:
    """Sequences on the device, or where they are if they would fill it; the latter is said."""
    if device.type == "cuda" and sequences.nbytes > SHARE * torch.cuda.get_device_properties(device).total_memory:
        reporter.note(f"interactions stay in the host's memory: {sequences.nbytes / 2**30:.1f} GiB")
        return sequences
    return sequences.to(device)
