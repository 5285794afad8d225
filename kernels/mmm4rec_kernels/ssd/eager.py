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


class _Decay(torch.autograd.Function):
    """exp of the sums of a over (s, t], as a lower triangular matrix.

    A plain difference of float32 cumulative sums loses all digits behind a very negative a, so the sums are taken in
    float64 and their differences in two float32 parts; backward sums the same rectangles in float64.
    """

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor) -> torch.Tensor:
        total = a.double().cumsum(-1)
        high = total.to(a.dtype)
        between = high[..., :, None] - high[..., None, :]
        if a.dtype != torch.float64:
            low = (total - high.double()).to(a.dtype)
            between += low[..., :, None] - low[..., None, :]
        length = a.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool, device=a.device).triu_(1)
        decay = between.masked_fill_(future, -torch.inf).exp_()
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
