"""What every model offers to training, evaluation and serving.

Letters: B users in the batch, L places, D width of a user vector, V catalogue rows with padding row 0.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmm4rec_cli.data.sequences import Windows
from mmm4rec_cli.models.sharded_loss import sharded_cross_entropy
from mmm4rec_cli.world import World
from mmm4rec_kernels import lookup, softmax_cross_entropy


class SequenceModel(nn.Module, ABC):
    """A model whose score of an item is the product of a user vector with that item's row of one table.

    Args:
        padding_candidate: padding row 0 competes in the full loss (published behaviour Q11).
        mask_duplicate_labels: the in-batch loss hides other rows that carry the same label.
    """

    reads_target_time: bool = False
    """Whether windows carry the target's own time stamp behind a short history (published behaviour Q2)."""

    item_rows: tuple[str, ...] = ()
    """Parameters and buffers that hold a row an item, if these are all of the model's; a model without this list
    cannot be computed on a part of the catalogue, as the sampled loss does."""

    remark: str | None = None
    """A line that whoever trains the model should know."""

    def __init__(self, *, padding_candidate: bool, mask_duplicate_labels: bool) -> None:
        super().__init__()
        self.padding_candidate = padding_candidate
        self.mask_duplicate_labels = mask_duplicate_labels

    @abstractmethod
    def forward(self, items_BL: Tensor, lengths_B: Tensor, timestamps_BL: Tensor) -> Tensor:
        """User vectors [B, D]."""

    @abstractmethod
    def item_table(self, items: Tensor | None = None) -> Tensor:
        """Rows [V, D] (or the rows of the given item ids), temperature divided out: score = user · row."""

    def item_table_parts(self, items: Tensor | None = None) -> dict[str, Tensor]:
        """The summands of `item_table` by modality, each [V, D] (or of the given ids); none where it is no sum."""
        return {}

    def scores(self, user_BD: Tensor) -> Tensor:
        """Scores [B, V] of every catalogue row; column 0 is padding and never a recommendation."""
        return user_BD @ self.item_table().T

    def loss(self, user_BD: Tensor, target_B: Tensor, in_batch: bool = False) -> Tensor:
        """Mean cross-entropy of the targets, a scalar.

        Args:
            user_BD: user vectors.
            target_B: item ids, int64, at least 1.
            in_batch: candidates are the batch's own targets instead of the catalogue.
        """
        if in_batch:
            return self._in_batch_loss(user_BD, target_B)
        return self.catalogue_loss(user_BD, self.item_table(), target_B)

    def users(self, windows: Windows) -> Tensor:
        """User vectors [B, D] of windows."""
        user_BD: Tensor = self(windows.items_BT, windows.lengths_B, windows.timestamps_BT)
        return user_BD

    def catalogue_loss(self, user_BD: Tensor, table_VD: Tensor, target_B: Tensor) -> Tensor:
        """The full loss on an item table that is at hand."""
        first_row = 0 if self.padding_candidate else 1
        return softmax_cross_entropy(user_BD, table_VD, target_B, first_row=first_row).mean()

    def training_loss(self, windows: Windows, in_batch: bool = False) -> Tensor:
        """What a training step minimises, a scalar: the mean loss of the windows' targets.

        A model with losses of its own beside the recommendation loss adds them here.
        """
        user_BD = self.users(windows)
        if windows.negative_N is not None:
            return self.sampled_loss(user_BD, self.item_table(), windows)
        if in_batch and windows.candidate_C is not None:
            return self._in_batch_loss(user_BD, windows.candidate_C, windows.own)
        return self.loss(user_BD, windows.target_B, in_batch=in_batch)

    def sharded_loss(self, windows: Windows, world: World) -> Tensor:
        """The full loss of the windows' targets with the item table in slices, one a process; a scalar.

        The table's rows of other processes are neither made nor scored here; the vectors of the histories' own items
        are made for themselves.

        Args:
            windows: this process's, among the targets of all processes (`Windows.among`).
            world: the processes, all of which call this together.
        """
        assert windows.candidate_C is not None
        user_BD = self.users(windows)
        first = 0 if self.padding_candidate else 1
        share = world.share(self.n_rows - first)
        begin = first + share.start
        row_RD = self.item_table(torch.arange(begin, first + share.stop, device=user_BD.device))
        own = slice(windows.own, windows.own + len(user_BD))
        return sharded_cross_entropy(user_BD, row_RD, windows.candidate_C, begin=begin, own=own, world=world).mean()

    @property
    def n_rows(self) -> int:
        """Rows of the catalogue, padding included, of a model with `item_rows`."""
        return len(self.get_buffer(self.item_rows[0]))

    def sampled_loss(self, user_BD: Tensor, table_VD: Tensor, windows: Windows) -> Tensor:
        """The full loss with the sum over the catalogue estimated, a scalar.

        Candidates are n items drawn uniformly from the catalogue of I and the labels of the batch, one each time they
        occur. Each is weighed with one over the number of times it is expected, n / I + its count in the batch, that
        is, the logarithm of this is taken from its score: logQ correction (Bengio and Senecal 2008; Yi et al. 2019)
        for the mixture of both proposals (mixed negative sampling, Yang et al. 2020), weights as in the balance
        heuristic (Veach and Guibas 1995). Where a candidate is the user's own target it is left out, and the target
        enters once with weight 1, so given the batch the sum's expectation is the full one exactly. Row 0 is never a
        candidate.

        Args:
            user_BD: user vectors.
            table_VD: rows of all items that the windows name.
            windows: with `negative_N` and `n_items`.
        """
        assert windows.negative_N is not None
        label_C = windows.target_B if windows.candidate_C is None else windows.candidate_C
        drawn_K = torch.cat([label_C, windows.negative_N])
        ordered_C = label_C.sort().values
        count_K = torch.searchsorted(ordered_C, drawn_K, right=True) - torch.searchsorted(ordered_C, drawn_K)
        # Counts and their logarithms would lose digits in bfloat16.
        expected_K = count_K.to(torch.promote_types(user_BD.dtype, torch.float32))
        expected_K = expected_K + len(windows.negative_N) / windows.n_items
        row_KD = lookup(table_VD, drawn_K)
        target_BD = row_KD[windows.own : windows.own + len(user_BD)]
        score_BK = user_BD @ row_KD.T - expected_K.log()
        score_BK = score_BK.masked_fill(drawn_K == windows.target_B[:, None], float("-inf"))
        own_B1 = (user_BD * target_BD).sum(1, keepdim=True)
        return F.cross_entropy(torch.cat([own_B1, score_BK], 1), torch.zeros_like(windows.target_B))

    def _in_batch_loss(self, user_BD: Tensor, candidate_C: Tensor, own: int = 0) -> Tensor:
        """Candidates are the targets of a batch; those of the users stand there from `own` on."""
        scores_BC = user_BD @ self.item_table(candidate_C).T
        place_C = torch.arange(len(candidate_C), device=candidate_C.device)
        own_B = place_C[own : own + len(user_BD)]
        if self.mask_duplicate_labels:
            same_BC = (candidate_C[own_B][:, None] == candidate_C) & (own_B[:, None] != place_C)
            scores_BC = scores_BC.masked_fill(same_BC, float("-inf"))
        return F.cross_entropy(scores_BC, own_B)
