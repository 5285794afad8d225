"""The scan in torch operations that are fast on a CPU: one quadratic product for short sequences, chunks for long ones.

Letters: B sequences, L places, H heads, P head dim, G groups, N state, Q places of a chunk, K chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from mmm4rec_kernels.ssd.steps import spread_groups

CHUNK = 64
"""Up to this length the quadratic form is one piece; it is also the chunk of longer sequences."""


def _between(a: torch.Tensor) -> torch.Tensor:
    """[..., L] to [..., L, L]: the sum of a over (s, t] at (t, s), minus infinity for s > t.

    A plain difference of float32 cumulative sums loses all digits behind a very negative a, so the sums are taken in
    float64 and their differences in two float32 parts.
    """
    total = a.double().cumsum(-1)
    high = total.to(a.dtype)
    between = high[..., :, None] - high[..., None, :]
    if a.dtype != torch.float64:
        low = (total - high.double()).to(a.dtype)
        between.add_(low[..., :, None]).sub_(low[..., None, :])
    return between.add_(torch.full((a.shape[-1],) * 2, -torch.inf, dtype=a.dtype, device=a.device).triu_(1))


class _Decay(torch.autograd.Function):
    """exp of the sums of a over (s, t], as a lower triangular matrix; backward sums its rectangles in float64."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        decay = _between(a).exp_()
        ctx.save_for_backward(decay)
        return decay

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (decay,) = ctx.saved_tensors
        between = grad * decay
        ends = between.sum(-1, dtype=torch.float64) - between.sum(-2, dtype=torch.float64)
        grad_a: torch.Tensor = ends.flip(-1).cumsum(-1).flip(-1).to(grad.dtype)
        return grad_a


def decay(a: torch.Tensor) -> torch.Tensor:
    """[..., L] logarithms of one-step decays to [..., L, L]: exp(a_{s+1} + ... + a_t) at (t, s), 0 for s > t."""
    matrix: torch.Tensor = _Decay.apply(a)  # type: ignore[no-untyped-call]
    return matrix


class _Short(torch.autograd.Function):
    """The quadratic form of one piece, for CPUs, with its gradients written out.

    Products are taken head by head on the tensors as they lie, because one product of all heads would copy each; step
    sizes and the skip term are put into the small matrices. Results of products come back as views [B, L, H, .] of
    [H, B, L, .].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BLHP: torch.Tensor,
        dt_BLH: torch.Tensor,
        A_H: torch.Tensor,
        B_BLGN: torch.Tensor,
        C_BLGN: torch.Tensor,
        D_H: torch.Tensor | None,
        scaled_skip: bool,
    ) -> torch.Tensor:
        batch, length, groups = B_BLGN.shape[:3]
        dt_HBL = dt_BLH.permute(2, 0, 1).contiguous()
        decay_HBLL = _between(dt_HBL * A_H[:, None, None]).exp_()
        scores_GBLL = x_BLHP.new_empty(groups, batch, length, length)
        for g in range(groups):
            torch.bmm(C_BLGN[:, :, g], B_BLGN[:, :, g].transpose(1, 2), out=scores_GBLL[g])
        scaled_HBLL = decay_HBLL * dt_HBL[:, :, None]
        matrix_HBLL = _times(scaled_HBLL, scores_GBLL)
        if D_H is not None:
            skip = D_H[:, None, None] * dt_HBL if scaled_skip else D_H[:, None, None]
            matrix_HBLL.diagonal(dim1=-2, dim2=-1).add_(skip)
        y_HBLP = x_BLHP.new_empty(x_BLHP.shape[2], batch, length, x_BLHP.shape[3])
        for h, y in enumerate(y_HBLP):
            torch.bmm(matrix_HBLL[h], x_BLHP[:, :, h], out=y)
        ctx.save_for_backward(
            x_BLHP, dt_HBL, A_H, B_BLGN, C_BLGN, D_H, decay_HBLL, scaled_HBLL, scores_GBLL, matrix_HBLL
        )
        ctx.scaled_skip = scaled_skip
        return y_HBLP.permute(1, 2, 0, 3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BLHP: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, dt_HBL, A_H, B, C, D_H, decay_HBLL, scaled_HBLL, scores_GBLL, matrix_HBLL = ctx.saved_tensors
        batch, length, heads, width = x.shape
        groups, state = B.shape[2:]
        grad = grad_BLHP if grad_BLHP.stride(-1) == 1 else grad_BLHP.contiguous()
        grad_x = x.new_empty(heads, batch, length, width)
        grad_matrix = torch.empty_like(matrix_HBLL)
        for h in range(heads):
            torch.bmm(matrix_HBLL[h].transpose(1, 2), grad[:, :, h], out=grad_x[h])
            torch.bmm(grad[:, :, h], x[:, :, h].transpose(1, 2), out=grad_matrix[h])
        grad_D, through_skip = None, None
        if D_H is not None:
            diagonal = grad_matrix.diagonal(dim1=-2, dim2=-1)
            grad_D = (diagonal * dt_HBL if ctx.scaled_skip else diagonal).sum((1, 2))
            through_skip = diagonal * D_H[:, None, None] if ctx.scaled_skip else None
        grad_scores = (grad_matrix * scaled_HBLL).view(groups, -1, batch, length, length).sum(1)
        grad_B, grad_C = (x.new_empty(groups, batch, length, state) for _ in range(2))
        for g in range(groups):
            torch.bmm(grad_scores[g].transpose(1, 2), C[:, :, g], out=grad_B[g])
            torch.bmm(grad_scores[g], B[:, :, g], out=grad_C[g])
        # What is left of the matrix is its derivative by step sizes: as a factor, and as part of the decay's exponent.
        by_factor = _times(grad_matrix, scores_GBLL).mul_(decay_HBLL)
        grad_dt = by_factor.sum(-2)
        by_sum = by_factor.mul_(dt_HBL[:, :, None])
        ends = by_sum.sum(-1, dtype=torch.float64) - by_sum.sum(-2, dtype=torch.float64)
        before = ends.cumsum(-1)
        grad_a = (before[..., -1:] - before + ends).to(x.dtype)
        grad_dt += grad_a * A_H[:, None, None]
        if through_skip is not None:
            grad_dt += through_skip
        grad_A = (grad_a * dt_HBL).sum((1, 2))
        grads = (t.permute(1, 2, 0, 3) for t in (grad_x, grad_B, grad_C))
        grad_x, grad_B, grad_C = grads
        return grad_x, grad_dt.permute(1, 2, 0), grad_A, grad_B, grad_C, grad_D, None


class _Carried(torch.autograd.Function):
    """What reaches each chunk from the ones before it and, behind the last, the state; for CPUs, as _Short is.

    Chunks of a sequence lie one behind the other in the first dimension: Z = B times K.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ZQHP: torch.Tensor,
        dt_ZQH: torch.Tensor,
        A_H: torch.Tensor,
        B_ZQGN: torch.Tensor,
        C_ZQGN: torch.Tensor,
        initial_BHPN: torch.Tensor | None,
        count: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chunks, places, heads, width = x_ZQHP.shape
        groups, state = B_ZQGN.shape[2:]
        dt_HZQ = dt_ZQH.permute(2, 0, 1).contiguous()
        total = (dt_HZQ * A_H[:, None, None]).double().cumsum(-1)
        since_HZQ = total.exp().to(x_ZQHP.dtype)
        until_HZQ = (total[..., -1:] - total).exp_().to(x_ZQHP.dtype)
        weight_HZQ = until_HZQ * dt_HZQ
        states_HZPN = x_ZQHP.new_empty(heads, chunks, width, state)
        y_HZQP = x_ZQHP.new_empty(heads, chunks, places, width)
        final_BHPN = x_ZQHP.new_empty(chunks // count, heads, width, state)
        for h in range(heads):
            g = h * groups // heads
            written = torch.bmm((x_ZQHP[:, :, h] * weight_HZQ[h, ..., None]).transpose(1, 2), B_ZQGN[:, :, g])
            through = since_HZQ[h, :, -1, None, None].view(-1, count, 1, 1)
            now = final_BHPN[:, h].zero_() if initial_BHPN is None else final_BHPN[:, h].copy_(initial_BHPN[:, h])
            for k, (add, to) in enumerate(
                zip(
                    written.view(-1, count, width, state).unbind(1),
                    states_HZPN[h].view(-1, count, width, state).unbind(1),
                    strict=True,
                )
            ):
                to.copy_(now)
                now.mul_(through[:, k]).add_(add)
            torch.bmm(C_ZQGN[:, :, g], states_HZPN[h].transpose(1, 2), out=y_HZQP[h]).mul_(since_HZQ[h, ..., None])
        ctx.save_for_backward(x_ZQHP, dt_HZQ, A_H, B_ZQGN, C_ZQGN, since_HZQ, until_HZQ, states_HZPN)
        ctx.count, ctx.first = count, initial_BHPN is not None
        return y_HZQP.permute(1, 2, 0, 3), final_BHPN

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ZQHP: torch.Tensor, grad_final: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, dt_HZQ, A_H, B, C, since_HZQ, until_HZQ, states_HZPN = ctx.saved_tensors
        heads, chunks, width, state = states_HZPN.shape
        groups, count = B.shape[2], ctx.count
        weight_HZQ = until_HZQ * dt_HZQ
        grad_x = x.new_empty(heads, chunks, x.shape[1], width)
        grad_B, grad_C = (
            torch.zeros_like(t.permute(2, 0, 1, 3), memory_format=torch.contiguous_format) for t in (B, C)
        )
        grad_first = grad_final.clone(memory_format=torch.contiguous_format)
        by_weight_HZQ, ends = torch.empty_like(dt_HZQ), torch.empty_like(dt_HZQ, dtype=torch.float64)
        for h in range(heads):
            g = h * groups // heads
            by_state = grad_ZQHP[:, :, h] * since_HZQ[h, ..., None]
            read = torch.bmm(by_state, states_HZPN[h])
            grad_C[g] += read
            ends[h] = (read * C[:, :, g]).sum(-1)
            arriving = torch.bmm(by_state.transpose(1, 2), C[:, :, g]).view(-1, count, width, state)
            through = since_HZQ[h, :, -1].view(-1, count)
            later, now = torch.empty_like(arriving), grad_first[:, h]
            for k in reversed(range(count)):
                later[:, k] = now
                now.mul_(through[:, k, None, None]).add_(arriving[:, k])
            kept = (later * states_HZPN[h].view_as(later)).sum((-1, -2)) * through
            ends[h, :, -1] += kept.view(-1)
            later = later.view(chunks, width, state)
            torch.bmm(B[:, :, g], later.transpose(1, 2), out=grad_x[h])
            by_weight_HZQ[h] = (grad_x[h] * x[:, :, h]).sum(-1)
            grad_x[h] *= weight_HZQ[h, ..., None]
            grad_B[g] += torch.bmm(x[:, :, h], later).mul_(weight_HZQ[h, ..., None])
        written = by_weight_HZQ.double() * weight_HZQ
        ends -= written
        ends[..., -1] += written.sum(-1)
        grad_a = ends.flip(-1).cumsum(-1).flip(-1).to(x.dtype)
        grad_dt = by_weight_HZQ * until_HZQ + grad_a * A_H[:, None, None]
        return (
            grad_x.permute(1, 2, 0, 3),
            grad_dt.permute(1, 2, 0),
            (grad_a * dt_HZQ).sum((1, 2)),
            grad_B.permute(1, 2, 0, 3),
            grad_C.permute(1, 2, 0, 3),
            grad_first if ctx.first else None,
            None,
        )


def _times(t_HBLL: torch.Tensor, by_GBLL: torch.Tensor) -> torch.Tensor:
    """Each head's matrices by those of its group."""
    grouped = t_HBLL.view(by_GBLL.shape[0], -1, *by_GBLL.shape[1:])
    return (grouped * by_GBLL[:, None]).view_as(t_HBLL)


def scan(
    x_BLHP: torch.Tensor,
    dt_BLH: torch.Tensor,
    A_H: torch.Tensor,
    B_BLGN: torch.Tensor,
    C_BLGN: torch.Tensor,
    D_HP: torch.Tensor | None,
    skip: str,
    initial_BHPN: torch.Tensor | None,
    want_final: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `reference.scan`; the last state is left out unless it is asked for."""
    length, heads = x_BLHP.shape[1:3]
    if _by_heads(x_BLHP, B_BLGN, C_BLGN):
        folded = D_HP is not None and D_HP.shape[1] == 1
        D_H = D_HP[:, 0] if D_HP is not None and folded else None
        stateful = initial_BHPN is not None or want_final
        y, last = _scan_by_heads(x_BLHP, dt_BLH, A_H, B_BLGN, C_BLGN, D_H, skip == "dt_x", initial_BHPN, stateful)
        if D_HP is not None and not folded:
            y = y + D_HP * (dt_BLH[..., None] * x_BLHP if skip == "dt_x" else x_BLHP)
        return y, last
    B_BLHN, C_BLHN = spread_groups(B_BLGN, heads), spread_groups(C_BLGN, heads)
    step_BLHP = dt_BLH[..., None] * x_BLHP
    a_BLH = dt_BLH * A_H
    if length <= CHUNK:
        y, final = _quadratic(step_BLHP, a_BLH, B_BLHN, C_BLHN, initial_BHPN, want_final)
    else:
        y, final = _chunked(step_BLHP, a_BLH, B_BLHN, C_BLHN, initial_BHPN)
    if D_HP is not None:
        y = y + D_HP * (step_BLHP if skip == "dt_x" else x_BLHP)
    return y, final


def _by_heads(*tensors: torch.Tensor) -> bool:
    """Whether products are taken head by head: on a CPU, rows contiguous; torch.compile fuses the other form itself."""
    return all(t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors) and not torch.compiler.is_compiling()


def _scan_by_heads(
    x_BLHP: torch.Tensor,
    dt_BLH: torch.Tensor,
    A_H: torch.Tensor,
    B_BLGN: torch.Tensor,
    C_BLGN: torch.Tensor,
    D_H: torch.Tensor | None,
    scaled_skip: bool,
    initial_BHPN: torch.Tensor | None,
    stateful: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In as few and equal chunks as CHUNK allows."""
    length = x_BLHP.shape[1]
    count = -(-length // CHUNK)
    places = -(-length // count)
    missing = count * places - length

    def cut(t: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] to [B K, Q, ...]."""
        padded = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing)) if missing else t
        return padded.reshape(-1, places, *t.shape[2:])

    x, dt, B, C = (cut(t) for t in (x_BLHP, dt_BLH, B_BLGN, C_BLGN))
    y = _Short.apply(x, dt, A_H, B, C, D_H, scaled_skip)  # type: ignore[no-untyped-call]
    last = None
    if count > 1 or stateful:
        carried, last = _Carried.apply(x, dt, A_H, B, C, initial_BHPN, count)  # type: ignore[no-untyped-call]
        y = y + carried
    return y.reshape(-1, count * places, *y.shape[2:])[:, :length], last


def _quadratic(
    step_BLHP: torch.Tensor,
    a_BLH: torch.Tensor,
    B_BLHN: torch.Tensor,
    C_BLHN: torch.Tensor,
    initial_BHPN: torch.Tensor | None,
    want_final: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    a_BHL = a_BLH.transpose(1, 2)
    decay_BHLL = decay(a_BHL)
    step_BHLP, B_BHLN, C_BHLN = (t.transpose(1, 2) for t in (step_BLHP, B_BLHN, C_BLHN))
    y_BHLP = (C_BHLN @ B_BHLN.transpose(-1, -2) * decay_BHLL) @ step_BHLP
    final = None
    if initial_BHPN is not None:
        since_start_BHL1 = a_BHL.cumsum(-1).exp()[..., None]
        y_BHLP = y_BHLP + since_start_BHL1 * (C_BHLN @ initial_BHPN.transpose(-1, -2))
    if want_final:
        final = (step_BHLP * decay_BHLL[..., -1, :, None]).transpose(-1, -2) @ B_BHLN
        if initial_BHPN is not None:
            final = final + since_start_BHL1[..., -1:, :] * initial_BHPN
    return y_BHLP.transpose(1, 2), final


def _chunked(
    step_BLHP: torch.Tensor,
    a_BLH: torch.Tensor,
    B_BLHN: torch.Tensor,
    C_BLHN: torch.Tensor,
    initial_BHPN: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    length = step_BLHP.shape[1]
    missing = -length % CHUNK

    def cut(t: torch.Tensor) -> torch.Tensor:
        """[B, L, H, ...] to [B, K, H, Q, ...]."""
        padded = F.pad(t, (0, 0) * (t.dim() - 2) + (0, missing)) if missing else t
        return padded.reshape(t.shape[0], -1, CHUNK, *t.shape[2:]).transpose(2, 3)

    step, a, B, C = cut(step_BLHP), cut(a_BLH), cut(B_BLHN), cut(C_BLHN)
    decay_BKHQQ = decay(a)
    y = (C @ B.transpose(-1, -2) * decay_BKHQQ) @ step
    written = (step * decay_BKHQQ[..., -1, :, None]).transpose(-1, -2) @ B
    since_start = a.cumsum(-1).exp()
    through = since_start[..., -1, None, None]
    state = torch.zeros_like(written[:, 0]) if initial_BHPN is None else initial_BHPN
    states = []
    for k in range(written.shape[1]):
        states.append(state)
        state = through[:, k] * state + written[:, k]
    y = y + since_start[..., None] * (C @ torch.stack(states, 1).transpose(-1, -2))
    return y.transpose(2, 3).flatten(1, 2)[:, :length], state
