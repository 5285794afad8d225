"""What stands between the matrix products of a network: residual sums with dropout and norm, activations, biases.

On a GPU each is one kernel a direction; elsewhere the plain torch form. Letters: n groups of rows with weights of their
own, S rows a group, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from mmm4rec_kernels.backend import by_kernel, interpreting
from mmm4rec_kernels.rows import ops

__all__ = ["dropout", "hardswish_dropout", "linear", "linear_and_rows", "residual_norm", "seeds_at_once", "unit_sum"]

MAX_WIDTH = 8192
"""Widest row that the kernels take."""
TURNED_FROM = 1024
"""Columns from which on the gradient of a linear layer's input is a product with a transposed copy of the weight.

For TF32 cuBLAS then takes a kernel that is a quarter to a third faster; the copy is small.
"""


def _by_kernel(x: torch.Tensor) -> bool:
    return x.dtype != torch.float64 and by_kernel(x)


_drawn: list[torch.Tensor] = []


@contextlib.contextmanager
def seeds_at_once(device: torch.device, count: int = 32) -> Iterator[None]:
    """Inside, the kernels' dropouts take their seeds from one draw, which costs one kernel instead of one each."""
    if device.type != "cpu" or interpreting():
        # Two numbers a seed: each lies on 16 bytes, and kernels are compiled for one alignment.
        _drawn.extend(torch.randint(1 << 62, (count, 2), device=device)[:, :1].unbind())
    try:
        yield
    finally:
        _drawn.clear()


def seed(x: torch.Tensor, p: float, training: bool) -> torch.Tensor | None:
    """A draw from torch's own generator, on the device, so that dropout follows `torch.manual_seed`; None for none."""
    if not training or p == 0:
        return None
    return _drawn.pop() if _drawn else torch.randint(1 << 62, (1,), device=x.device)


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """Dropout of any tensor; on the CPU from 32 random bits an element, several times faster than torch's own."""
    if not training or p == 0 or p == 1 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    words = torch.empty(-(-x.numel() // 2), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int32)[: x.numel()].view(x.shape)
    keep = bits >= round(p * 2**32) - 2**31
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def residual_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    p: float = 0.0,
    training: bool = False,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Layer norm of dropout(x + shift) + residual + other.

    Args:
        x: [..., D], or [n, S, D] where every group has weights of its own.
        weight: [D] or [n, D].
        bias: like weight.
        residual: added to it, shaped as x, or None.
        other: likewise.
        shift: [D], added to x, or None: the bias of a linear layer, whose gradient then costs no pass of its own.
        p: probability of dropout, on x and shift alone.
        training: dropout is drawn.
        eps: added to the variance inside the root.

    Returns:
        As x. On a GPU the arithmetic is float32 for every dtype but float64.
    """
    if torch.is_autocast_enabled(x.device.type):  # as torch's own norm, which stays in float32
        x = x.float()
        residual, other = (t if t is None else t.float() for t in (residual, other))
    if not _by_kernel(x) or x.shape[-1] > MAX_WIDTH:
        total = dropout(x if shift is None else x + shift, p, training)
        for added in (residual, other):
            total = total if added is None else total + added
        if weight.dim() == 1:
            return F.layer_norm(total, weight.shape, weight, bias, eps)
        return torch.stack(
            [F.layer_norm(t, t.shape[-1:], w, b, eps) for t, w, b in zip(total, weight, bias, strict=True)]
        )
    groups = 1 if weight.dim() == 1 else len(weight)
    flat = [None if t is None else t.contiguous().view(groups, -1, t.shape[-1]) for t in (x, residual, other)]
    assert flat[0] is not None
    weights = [w.contiguous().view(groups, -1) for w in (weight, bias)]
    out, _ = ops.norm_forward(flat[0], flat[1], flat[2], *weights, seed(x, p, training), p, eps, shift)
    result: torch.Tensor = out.view(x.shape)
    return result


def hardswish_dropout(
    x: torch.Tensor, *, shift: torch.Tensor | None = None, p: float = 0.0, training: bool = False
) -> torch.Tensor:
    """Dropout of hardswish(x + shift), where hardswish(x) = x clip(x + 3, 0, 6) / 6; x [..., D], shift [D] or None."""
    if not _by_kernel(x):
        return dropout(F.hardswish(x if shift is None else x + shift), p, training)
    result: torch.Tensor = ops.hardswish_forward(x.contiguous(), seed(x, p, training), p, shift)
    return result


def unit_sum(a: torch.Tensor, b: torch.Tensor, *, scale: float = 1.0, least: float = 1e-12) -> torch.Tensor:
    """Sum of the rows of two tensors, each row divided by max(its length, least), times `scale`; [S, D] all three."""
    if _by_kernel(a) and a.dtype == b.dtype and a.shape[1] <= MAX_WIDTH:
        result: torch.Tensor = ops.unit_sum(a.contiguous(), b.contiguous(), scale, least)
        return result
    return (F.normalize(a, dim=-1, eps=least) + F.normalize(b, dim=-1, eps=least)) * scale


class _Linear(torch.autograd.Function):
    """As F.linear, but for the gradient of the bias, which torch sums several times slower than the memory allows.

    With an index also rows of x, whose gradient is added where that of the product lies: no gradient of x's size comes
    from them alone.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor | slice | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.places = index if isinstance(index, slice) else None
        ctx.save_for_backward(x, weight, None if ctx.places else index)
        return F.linear(x, weight, bias), None if index is None else _picked(x, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, d_rows: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, weight, index = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        d_x = (rows @ _turned(weight)).view(x.shape) if ctx.needs_input_grad[0] else None
        if d_x is not None and d_rows is not None:
            if ctx.places is None:
                d_x.index_add_(0, index, d_rows)
            else:
                d_x[:, ctx.places].add_(d_rows)
        d_weight = rows.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        d_bias = ops.sum_rows(rows).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return d_x, d_weight, d_bias, None


def _turned(weight: torch.Tensor) -> torch.Tensor:
    """The same values, column by column in memory if that is faster."""
    other = weight.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return weight if other or len(weight) < TURNED_FROM else weight.t().contiguous().t()


def _as_torch(x: torch.Tensor) -> bool:
    return not _by_kernel(x) or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """X weightᵀ + bias; [..., D] in, [..., C] out, weight [C, D], bias [C] or None."""
    if bias is None or _as_torch(x):
        return F.linear(x, weight, bias)
    result: torch.Tensor = _Linear.apply(x, weight, bias, None)[0]  # type: ignore[no-untyped-call]
    return result


def _picked(x: torch.Tensor, index: torch.Tensor | slice) -> torch.Tensor:
    return x[:, index].contiguous() if isinstance(index, slice) else x.index_select(0, index)


def linear_and_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor | slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear` of x [S, D], and the rows of x by an index [N] int64: their two gradients cost one pass.

    A row that the index repeats may have a gradient other than 0 from one of its places alone. A slice takes places of
    each sequence, of x [B, L, D].
    """
    if _as_torch(x):
        return F.linear(x, weight, bias), _picked(x, index)
    result: tuple[torch.Tensor, torch.Tensor] = _Linear.apply(x, weight, bias, index)  # type: ignore[no-untyped-call]
    return result
