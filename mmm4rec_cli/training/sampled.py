"""Training on the items that occur: the sampled loss, and item tables that are moved row by row.

The full loss computes all rows of the catalogue and moves all of them in every step. Here a micro-batch is computed on
a small catalogue of its own, which holds the items of its histories, its labels and the drawn negatives; the gradients
of its rows are kept beside their item ids, and a step moves these rows alone.

Letters: B targets, V catalogue rows, M rows of the small catalogue, K rows of a step's micro-batches, R distinct ones.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmm4rec_cli.data.sequences import Windows
from mmm4rec_cli.device import precision
from mmm4rec_cli.models.interface import SequenceModel
from mmm4rec_cli.settings.schema import Optimisation
from mmm4rec_cli.training.optimizer import BETA1, BETA2, EPS
from mmm4rec_cli.training.step import Gradients, MicroBatch
from mmm4rec_kernels import sum_by_row


def small_catalogue(windows: Windows, most: int | None = None) -> tuple[Tensor, Windows]:
    """The distinct items of windows, ascending behind row 0, and the windows in terms of these rows.

    Args:
        windows: with negatives.
        most: number of rows, so that shapes do not follow from what occurs; rows behind the last item are 0. None: as
            many as there are.
    """
    parts = {"items_BT": windows.items_BT, "target_B": windows.target_B, "negative_N": windows.negative_N}
    parts |= {"candidate_C": windows.candidate_C}
    named = {name: part for name, part in parts.items() if part is not None}
    zero = windows.target_B.new_zeros(1)
    ordered, places = torch.cat([zero, *(part.flatten() for part in named.values())]).sort()
    row_of_ordered = (ordered.diff() != 0).cumsum(0)
    row_of_ordered = torch.cat([zero, row_of_ordered])
    ids_M = ordered.new_zeros(int(row_of_ordered[-1]) + 1 if most is None else most)
    ids_M.scatter_(0, row_of_ordered, ordered)
    rows = torch.empty_like(places).scatter_(0, places, row_of_ordered)[1:]
    sizes = [part.numel() for part in named.values()]
    moved: dict[str, Any] = {n: r.view_as(p) for (n, p), r in zip(named.items(), torch.split(rows, sizes), strict=True)}
    return ids_M, replace(windows, **moved)


class _TrainingLoss(nn.Module):
    """`training_loss` as a module's forward, which is what torch can call with other tensors in place of its own."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, windows: Windows) -> Tensor:
        return self.model.training_loss(windows)


class _RowGradients(Gradients):
    """Gradients of a micro-batch's sampled loss: dense parameters' as ever, item tables' as rows beside their ids."""

    def __init__(self, model: SequenceModel, *arguments: Any, negatives: int, n_items: int, **options: Any) -> None:
        super().__init__(model, *arguments, in_batch=False, **options)
        own = dict(model.named_parameters())
        self.tables = {name: own[name] for name in model.item_rows if name in own}
        apart = set(map(id, self.tables.values()))
        self.parameters = [p for p in self.parameters if id(p) not in apart]
        self.totals = [p.grad for p in self.parameters if p.grad is not None]
        held = own | dict(model.named_buffers())
        self.held = {name: held[name] for name in model.item_rows}
        self.loss = _TrainingLoss(model)
        self.n_items = n_items
        self.negatives = negatives
        self.rows: dict[tuple[int, int, int], tuple[Tensor, dict[str, Tensor]]] = {}
        """Ids [M] and gradients by table [M, D] of the last micro-batch of a shape."""

    def _compute(self, batch: MicroBatch, weight: Tensor) -> Tensor:
        windows = replace(self._windows(batch), negative_N=batch.negative_N, n_items=self.n_items)
        most = 1 + sum(self.shape_of(batch)) + self.negatives if self.graphs else None
        ids_M, windows = small_catalogue(windows, most)
        small = {name: held.detach()[ids_M] for name, held in self.held.items()}
        leaves = {name: small[name].requires_grad_() for name in self.tables}
        with precision(self.number_format, self.device):
            swapped = {f"model.{name}": tensor for name, tensor in small.items()}
            loss = torch.func.functional_call(self.loss, swapped, (windows,))
        wanted = [*self.parameters, *leaves.values()]
        gradients = torch.autograd.grad(loss * weight.to(loss.dtype), wanted, allow_unused=True)
        self._add(gradients[: len(self.parameters)])
        by_table = dict(zip(leaves, gradients[len(self.parameters) :], strict=True))
        self.rows[self.shape_of(batch)] = ids_M, by_table
        value: Tensor = loss.detach().double()
        return value


class SampledGradients:
    """As `Gradients`, with the sampled loss; what it finds for the item tables waits for `take`.

    Args:
        model: see `Gradients`; with `item_rows`.
        arguments: as for `Gradients`.
        negatives: items drawn for a micro-batch.
        n_items: items to draw from.
        options: as for `Gradients`.
    """

    def __init__(self, model: SequenceModel, *arguments: Any, negatives: int, n_items: int, **options: Any) -> None:
        self.inner = _RowGradients(model, *arguments, negatives=negatives, n_items=n_items, **options)
        self.waiting: list[tuple[Tensor, dict[str, Tensor]]] = []

    def __call__(self, batch: MicroBatch) -> Tensor:
        """The mean loss of the micro-batch's own targets, float64."""
        inner = self.inner
        loss = inner(batch)
        if not inner.tables:
            return loss
        ids_M, by_table = inner.rows[inner.shape_of(batch)]
        self.waiting.append((ids_M.clone(), {name: rows.clone() for name, rows in by_table.items()}))
        return loss

    def take(self, group: list[MicroBatch]) -> tuple[Tensor, dict[str, Tensor]]:
        """The items of a group, ascending, and the sum of their gradients [R, D] by table, over all processes."""
        inner = self.inner
        world = inner.world
        own_K = torch.cat([ids for ids, _ in self.waiting] or [torch.zeros(0, dtype=torch.int64, device=inner.device)])
        ids_R = torch.unique(own_K if world.size == 1 else torch.cat([self._items_of(batch) for batch in group]))
        row_K = torch.searchsorted(ids_R, own_K)
        summed = {}
        for name, table in inner.tables.items():
            parts_KD = torch.cat([rows[name] for _, rows in self.waiting] or [table.new_zeros(0, table.shape[1])])
            summed[name] = sum_by_row(parts_KD, row_K, len(ids_R))
            world.add_up(summed[name])
        self.waiting = []
        return ids_R, summed

    def _items_of(self, batch: MicroBatch) -> Tensor:
        """Everything that occurs in a micro-batch, on whichever process."""
        assert batch.candidates_C is not None
        assert batch.negative_N is not None
        sequences = self.inner.sequences
        windows = sequences.windows(batch.candidates_C, self.inner.max_len, with_target_time=False)
        seen = torch.cat([windows.items_BT.flatten(), windows.target_B]).to(self.inner.device)
        return torch.cat([seen.new_zeros(1), seen, batch.negative_N])


class ItemTables:
    """NAdam or Adam over the rows of item tables: a step moves the rows that it is given and looks at no other.

    Each row lives as if it were alone: its moments, the count of its steps and weight decay move with its own steps
    only. (The optimiser of the full loss also moves rows by the momentum of earlier steps and by weight decay.)

    Args:
        tables: by name, [V, D] each.
        optimisation: which of both, weight decay, momentum decay.
    """

    def __init__(self, tables: Mapping[str, nn.Parameter], optimisation: Optimisation) -> None:
        self.tables, self.optimisation = dict(tables), optimisation
        self.state: dict[str, Tensor] = {}
        for name, table in self.tables.items():
            self.state[f"{name}.exp_avg"] = torch.zeros_like(table.detach())
            self.state[f"{name}.exp_avg_sq"] = torch.zeros_like(table.detach())
        rows, device = (len(next(iter(tables.values()))) if tables else 0), next(iter(tables.values())).device
        self.state["count"] = torch.zeros(rows, dtype=torch.int32, device=device)
        """Steps of each row."""
        self.state["mu_product"] = torch.ones(rows, dtype=torch.float32, device=device)

    @torch.no_grad()
    def step(self, ids_R: Tensor, gradients: Mapping[str, Tensor], lr: float) -> None:
        """Move the rows.

        Args:
            ids_R: which, each once.
            gradients: [R, D] by table.
            lr: learning rate.
        """
        plan = self.optimisation
        count_R = self.state["count"][ids_R] + 1
        self.state["count"][ids_R] = count_R
        count_R1 = count_R[:, None].double()
        if plan.optimizer == "nadam":
            now, following = (BETA1 * (1 - 0.5 * 0.96 ** (k * plan.momentum_decay)) for k in (count_R1, count_R1 + 1))
            product_R1 = self.state["mu_product"][ids_R][:, None] * now
            self.state["mu_product"][ids_R] = product_R1.squeeze(1).float()
            of_gradient, of_mean = (1 - now) / (1 - product_R1), following / (1 - product_R1 * following)
        else:
            of_gradient, of_mean = torch.zeros_like(count_R1), 1 / (1 - BETA1**count_R1)
        scale = 1 - BETA2**count_R1
        for name, table in self.tables.items():
            values = table.detach()
            mean, square = self.state[f"{name}.exp_avg"], self.state[f"{name}.exp_avg_sq"]
            row_RD = values[ids_R]
            gradient_RD = gradients[name].to(row_RD.dtype).add(row_RD, alpha=plan.weight_decay)
            mean_RD = torch.lerp(mean[ids_R], gradient_RD, 1 - BETA1)
            square_RD = torch.addcmul(square[ids_R] * BETA2, gradient_RD, gradient_RD, value=1 - BETA2)
            root_RD = (square_RD / scale.to(row_RD.dtype)).sqrt_().add_(EPS)
            move_RD = gradient_RD.mul_(of_gradient.to(row_RD.dtype)).addcmul_(mean_RD, of_mean.to(row_RD.dtype))
            values[ids_R] = row_RD.addcdiv_(move_RD, root_RD, value=-lr)
            mean[ids_R], square[ids_R] = mean_RD, square_RD
