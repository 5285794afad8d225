"""Where the places of a batch lie in memory: as a grid with padding, or the real ones alone, one behind the other.

Everything in a model that looks at one place at a time works on rows, [S, ...]. Letters: B users, T places (max_len),
S rows, n streams that share a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmm4rec_kernels import packing_of

ROWS_A_STEP = 2
"""Rows are rounded up to a multiple of B / 2, so that few shapes occur and a recorded graph serves many batches."""


def rounded_rows(places: int, batch: int, max_len: int) -> int:
    """Rows to compute for so many real places: a multiple of B / 2, at most B T."""
    step = max(1, batch // ROWS_A_STEP)
    return min(-(-places // step) * step, batch * max_len)


@dataclass(frozen=True)
class Places:
    """The places of one batch as rows."""

    users: int
    length: int
    last_B: Tensor
    """The row of each user's last real place, int64."""
    slot_S: Tensor | None = None
    """For each row its place in the flattened grid [B T], int64; None: the rows are the grid itself."""
    offsets: Tensor | None = None
    """First row of each sequence and, last, S; int32. Behind the users' sequences stand those that fill up S."""
    lengths_B: Tensor | None = None
    """Real places of each user, int64."""

    @classmethod
    def padded(cls, lengths_B: Tensor, length: int) -> "Places":
        """The first `length` places of every user, padding included: S = B `length`."""
        users = lengths_B.shape[0]  # len() would be a constant in an exported program
        first_B = torch.arange(users, device=lengths_B.device) * length
        return cls(users, length, first_B + lengths_B - 1, lengths_B=lengths_B)

    @classmethod
    def packed(cls, lengths_B: Tensor, length: int, rows: int) -> "Places":
        """The real places alone.

        What is left of `rows` is filled with copies of the first user's first place, cut into sequences of at most T.
        Nothing reads them, so no gradient comes from them. Shapes follow from the arguments' shapes and numbers, never
        from the lengths, so that the work can be recorded as a CUDA graph.

        Args:
            lengths_B: real places, int64, 1 to `length`.
            length: T.
            rows: S, at least the sum of the lengths and at most B T.
        """
        last_B, slot_S, offsets = packing_of(lengths_B, length, rows)
        return cls(len(lengths_B), length, last_B, slot_S, offsets, lengths_B)

    def rows(self, grid: Tensor) -> Tensor:
        """[..., B, T, C] to [..., S, C]."""
        if self.slot_S is None:
            return grid[..., : self.length, :].flatten(-3, -2)
        return grid.flatten(-3, -2).index_select(-2, self.slot_S)

    def ids(self, items_BT: Tensor) -> Tensor:
        """Item ids [B, T] to [S]."""
        if self.slot_S is None:
            return items_BT[:, : self.length].flatten()
        return items_BT.flatten()[self.slot_S]

    def sequences(self, streams_nSC: Tensor) -> Tensor:
        """[n, S, C] as the kernels take sequences: [n B, T, C], or [1, n S, C] with `offsets_of(n)`."""
        if self.offsets is None:
            return streams_nSC.reshape(-1, self.length, streams_nSC.shape[-1])
        return streams_nSC.reshape(1, -1, streams_nSC.shape[-1])

    def tails(self, rows_SC: Tensor, count: int) -> Tensor:
        """The last `count` places of each user, [B, count, C]; before a user's first place stands any row."""
        return rows_SC.index_select(0, self.tail_rows(count)).view(self.users, count, -1)

    def tail_rows(self, count: int) -> Tensor:
        """The rows of `tails`, [B count]."""
        steps = torch.arange(1 - count, 1, device=self.last_B.device)
        return (self.last_B[:, None] + steps).clamp(min=0).flatten()

    def offsets_of(self, streams: int) -> Tensor | None:
        """The offsets of the sequences of n streams, one stream behind the other; None for a grid."""
        if self.offsets is None or self.slot_S is None or streams == 1:
            return self.offsets
        shifts = range(0, streams * len(self.slot_S), len(self.slot_S))
        return torch.cat([self.offsets[:1], *(self.offsets[1:] + shift for shift in shifts)])
