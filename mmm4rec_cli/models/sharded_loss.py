"""The full softmax with the item table in slices, one a process.

Each process scores everybody's user vectors against its own rows; what goes between the processes is the largest
score, the sum and the target's score of each user, [B], and in the backward pass the user vectors' gradients, [B, D].
No process ever holds the table, its scores or its gradient as a whole.

Letters: B users of all processes, b users of this one, D width, R rows of this process's slice.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmm4rec_cli.world import World

_BLOCK_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 26}
"""Scores of one block."""


def sharded_cross_entropy(
    user_bD: Tensor, row_RD: Tensor, target_B: Tensor, *, begin: int, own: slice, world: World
) -> Tensor:
    """Cross-entropy of this process's users under the softmax over all processes' rows, [b].

    Gradients are those of the sum over all processes of what each does with its own losses. All processes call it
    and go backward through it together.

    Args:
        user_bD: this process's user vectors.
        row_RD: its slice of the item table.
        target_B: item ids of all processes' users, int64, each in some process's slice.
        begin: item id of the slice's first row.
        own: where this process's users stand among all.
        world: the processes.
    """
    loss_b: Tensor = _ShardedCrossEntropy.apply(user_bD, row_RD, target_B - begin, own, world)  # type: ignore[no-untyped-call]
    return loss_b


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, user_bD: Tensor, row_RD: Tensor, place_B: Tensor, own: slice, world: World) -> Tensor:
        compute = torch.promote_types(user_bD.dtype, torch.float32)
        user_BD = _together(user_bD.to(compute), len(place_B), own, world)
        total_B = user_BD.new_full((len(place_B),), -torch.inf)
        score_B = torch.zeros_like(total_B)
        for part_PD, place_B1, inside_B1 in _blocks(row_RD, place_B):
            score_BP = user_BD @ part_PD.to(compute).T
            total_B = torch.logaddexp(total_B, score_BP.logsumexp(1))
            score_B += torch.where(inside_B1, score_BP.gather(1, place_B1), 0).squeeze(1)
        top_B = world.greatest(total_B.clone())
        sum_B = (total_B - top_B).exp()
        world.add_up(sum_B)
        world.add_up(score_B)
        total_B = top_B + sum_B.log()
        ctx.save_for_backward(user_BD, row_RD, place_B, total_B)
        ctx.own, ctx.world, ctx.dtype = own, world, user_bD.dtype
        return (total_B - score_B)[own]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_b: Tensor) -> tuple[Tensor | None, ...]:
        user_BD, row_RD, place_B, total_B = ctx.saved_tensors
        grad_B1 = _together(grad_b[:, None], len(place_B), ctx.own, ctx.world)
        weighted_BD = user_BD * grad_B1
        d_user_BD, d_row_RD = torch.zeros_like(user_BD), torch.empty_like(row_RD)
        begin = 0
        for part_PD, place_B1, inside_B1 in _blocks(row_RD, place_B):
            part_PD = part_PD.to(user_BD.dtype)
            slope_BP = (user_BD @ part_PD.T).sub_(total_B[:, None]).exp_()
            slope_BP.scatter_add_(1, place_B1, -inside_B1.to(slope_BP.dtype))
            d_user_BD.addmm_(slope_BP, part_PD)
            d_row_RD[begin : begin + len(part_PD)] = slope_BP.T @ weighted_BD
            begin += len(part_PD)
        d_user_BD *= grad_B1
        ctx.world.add_up(d_user_BD)
        return d_user_BD[ctx.own].to(ctx.dtype), d_row_RD, None, None, None


def _together(part: Tensor, size: int, own: slice, world: World) -> Tensor:
    """All processes' parts as one tensor [B, ...]: the others' places are zero, and the sum fills them."""
    whole = part.new_zeros(size, *part.shape[1:])
    whole[own] = part
    world.add_up(whole)
    return whole


def _blocks(row_RD: Tensor, place_B: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Blocks of rows, each with the targets' places in it [B, 1], held within, and whether they are really there."""
    most = _BLOCK_ELEMENTS.get(row_RD.device.type, _BLOCK_ELEMENTS["cpu"])
    step = max(1, most // max(1, len(place_B)))
    for begin in range(0, len(row_RD), step):
        part_PD = row_RD[begin : begin + step]
        place_B1 = (place_B - begin)[:, None]
        yield part_PD, place_B1.clamp(0, len(part_PD) - 1), (place_B1 >= 0) & (place_B1 < len(part_PD))
