"""What every model offers to training, evaluation and serving.

Letters: B users in the batch, L places, D width of a user vector, V catalogue rows with padding row 0.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmm4rec_cli.data.sequences import Windows
from mmm4rec_kernels import softmax_cross_entropy


class SequenceModel(nn.Module, ABC):
    """A model whose score of an item is the product of a user vector with that item's row of one table.

    Args:
        padding_candidate: padding row 0 competes in the full loss (published behaviour Q11).
        mask_duplicate_labels: the in-batch loss hides other rows that carry the same label.
    """

    reads_target_time: bool = False
    """Whether windows carry the target's own time stamp behind a short history (published behaviour Q2)."""

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
        if in_batch and windows.candidate_C is not None:
            return self._in_batch_loss(user_BD, windows.candidate_C, windows.own)
        return self.loss(user_BD, windows.target_B, in_batch=in_batch)

    def _in_batch_loss(self, user_BD: Tensor, candidate_C: Tensor, own: int = 0) -> Tensor:
        """Candidates are the targets of a batch; those of the users stand there from `own` on."""
        scores_BC = user_BD @ self.item_table(candidate_C).T
        place_C = torch.arange(len(candidate_C), device=candidate_C.device)
        own_B = place_C[own : own + len(user_BD)]
        if self.mask_duplicate_labels:
            same_BC = (candidate_C[own_B][:, None] == candidate_C) & (own_B[:, None] != place_C)
            scores_BC = scores_BC.masked_fill(same_BC, float("-inf"))
        return F.cross_entropy(scores_BC, own_B)
