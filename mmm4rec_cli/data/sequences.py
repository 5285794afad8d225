"""Sequences on the device: interactions once as flat tensors, windows gathered by index.

No prefix is ever written out: a training example is the flat position of its target. Letters: N interactions,
U users, B windows in the batch, T places (max_len).
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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
    def counts_U(self) -> Tensor:
        """Interactions of each user, int64."""
        return self.offsets_U1.diff()

    def users_of(self, positions: Tensor) -> Tensor:
        """The user of each flat position, int64."""
        return torch.searchsorted(self.offsets_U1, positions, right=True) - 1

    def windows(self, targets_B: Tensor, max_len: int, *, with_target_time: bool) -> Windows:
        """The up to `max_len` interactions before each target, left-aligned.

        Args:
            targets_B: flat positions of the targets, int64, none of them a user's first interaction.
            max_len: T.
            with_target_time: published behaviour Q2: when history and target together have at most T elements, the
                target's own stamp stands in the first padded place. Otherwise stamps stand at real places only.
        """
        first_B = self.first_N[targets_B]
        start_B = torch.maximum(first_B, targets_B - max_len)
        lengths_B = targets_B - start_B
        place_T = torch.arange(max_len, device=targets_B.device)
        flat_BT = start_B[:, None] + place_T
        real_BT = place_T < lengths_B[:, None]
        stamped_BT = real_BT
        if with_target_time:
            whole_B = (start_B == first_B) & (lengths_B < max_len)
            stamped_BT = place_T < (lengths_B + whole_B)[:, None]
        flat_BT = flat_BT.clamp(max=len(self.items_N) - 1)
        return Windows(
            items_BT=torch.where(real_BT, self.items_N[flat_BT].long(), 0),
            lengths_B=lengths_B,
            timestamps_BT=torch.where(stamped_BT, self.times_N[flat_BT], 0),
            target_B=self.items_N[targets_B].long(),
        )

    def train_targets(self) -> Tensor:
        """Leave-one-out training: every element from a user's second to the last but two (spec 7.4)."""
        return self._targets(held_out=2)

    def all_targets(self) -> Tensor:
        """Pre-training: every element but each user's first (spec 8)."""
        return self._targets(held_out=0)

    def _targets(self, held_out: int) -> Tensor:
        positions_N = torch.arange(len(self.items_N), device=self.items_N.device)
        last_N = self.first_N + self.counts_U.repeat_interleave(self.counts_U)
        return positions_N[(positions_N > self.first_N) & (positions_N < last_N - held_out)]

    def held_out(self, split: str) -> Tensor:
        """Each user's last (`test`) or last but one (`valid`) element, where a history stands before it."""
        back = {"test": 1, "valid": 2}[split]
        enough_U = self.counts_U > back
        return self.offsets_U1[1:][enough_U] - back

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
