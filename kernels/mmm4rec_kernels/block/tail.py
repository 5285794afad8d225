"""The block where only the last places of each sequence are read: the state is written everywhere, y is not.

Letters: B sequences, L places, J last places, K taps, M = J + K - 1 places that the convolution reaches, E width,
H heads, P head dim, G groups, N state, Q = GN; S rows of packed sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mmm4rec_kernels import arguments
from mmm4rec_kernels.backend import BackendUnavailable, interpreting, runs
from mmm4rec_kernels.block.parts import CrossProjections
from mmm4rec_kernels.block.tail_ops import tail_forward
from mmm4rec_kernels.conv1d import causal_conv1d
from mmm4rec_kernels.norm import gated_rms_norm
from mmm4rec_kernels.ssd import Skip
from mmm4rec_kernels.ssd.steps import spread_groups

LONGEST, MOST = 64, 8
"""Places of a sequence, and read places, up to which the kernel was built: it holds a sequence at once."""


def tail_unfit(tensor: torch.Tensor, longest: int, read: int, heads: int, groups: int) -> str:
    """Why the kernel cannot take a call on tensors like this one; empty if it can."""
    if not (tensor.is_cuda or interpreting()):
        return f"it needs CUDA tensors, got {tensor.device}"
    if tensor.dtype == torch.float64:
        return "it has no float64"
    if not runs("triton"):
        return "Triton does not run here"
    if groups != heads:
        return f"it takes a group a head, got {groups} of {heads}"
    if longest > LONGEST or read > MOST:
        return f"it takes sequences of at most {LONGEST} places, {MOST} of them read, got {longest} and {read}"
    return ""


def ssd_block_tail(
    projected: CrossProjections,
    lengths_B: torch.Tensor,
    conv_weight_CK: torch.Tensor,
    conv_bias_C: torch.Tensor,
    A_log_H: torch.Tensor,
    D_H: torch.Tensor,
    dt_bias_H: torch.Tensor,
    norm_weight_E: torch.Tensor,
    *,
    n_groups: int,
    eps: float,
    time_factor_BLH: torch.Tensor | None = None,
    skip: Skip = "dt_x",
    cu_seqlens: torch.Tensor | None = None,
    max_length: int | None = None,
    bias_of_xBdt: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """What `ssd_block` gives at the last J places of each sequence.

    Work and memory are those of the places that are read: scores are [J, L] a head instead of [L, L].

    Args:
        projected: xBdt [B, L, E + GN + H], or [1, S, E + GN + H] of packed sequences; z [B, J, E] and
            C [B, J + K - 1, GN] at the last places of each sequence, those before its start whatever they are.
        lengths_B: places of each sequence, int64, 1 to L; what lies behind is not read.
        conv_weight_CK: as of `ssd_block`.
        conv_bias_C: likewise.
        A_log_H: likewise.
        D_H: likewise.
        dt_bias_H: likewise.
        norm_weight_E: likewise.
        n_groups: likewise.
        eps: likewise.
        time_factor_BLH: likewise.
        skip: likewise.
        cu_seqlens: offsets of B or more packed sequences; those behind the first B are read by nobody. The time factor
            remains [B, L, H].
        max_length: with cu_seqlens, a bound on the longest sequence.
        bias_of_xBdt: [E + GN + H], added to xBdt, so that its gradient costs no pass over that of xBdt.
        backend: "auto", a Triton kernel where it can take the call; "torch" or "triton".

    Returns:
        [B, J, E]; at a place before the start of its sequence a number that means nothing.

    Raises:
        ValueError: z and C do not stand for such places, packed sequences come without a bound, or no such backend.
        BackendUnavailable: backend "triton" cannot run here or cannot take the call.
    """
    xBdt, z_BJE, C_BMQ = projected
    heads, width = A_log_H.shape[0], norm_weight_E.shape[0]
    written, read = xBdt.shape[-1] - heads, z_BJE.shape[1]
    batch, length = len(lengths_B), xBdt.shape[1]
    if cu_seqlens is not None:
        if max_length is None:
            raise ValueError("max_length: packed sequences come with a bound")
        length = max_length
    reach = read + conv_weight_CK.shape[1] - 1
    arguments.shape("projected.z", z_BJE, (batch, read, width), "[B, J, E]")
    arguments.shape("projected.C", C_BMQ, (batch, reach, written - width), "[B, J + K - 1, GN]")
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend: expected auto, torch or triton, got {backend!r}")
    unfit = tail_unfit(xBdt, length, read, heads, n_groups)
    if backend == "triton" and unfit:
        raise BackendUnavailable(f"ssd_block_tail: backend 'triton' cannot run: {unfit}")
    if backend != "torch" and not unfit:
        rows = xBdt if xBdt.stride(-1) == 1 and (len(xBdt) == 1 or xBdt.is_contiguous()) else xBdt.contiguous()
        y_BJE = tail_forward(
            rows,
            bias_of_xBdt,
            C_BMQ.contiguous(),
            time_factor_BLH,
            conv_weight_CK.contiguous(),
            conv_bias_C,
            A_log_H,
            D_H,
            dt_bias_H,
            cu_seqlens,
            lengths_B,
            length,
            skip == "dt_x",
        )
        return gated_rms_norm(y_BJE, z_BJE, norm_weight_E, eps=eps)
    if bias_of_xBdt is not None:
        xBdt = xBdt + bias_of_xBdt
    reached_BM = lengths_B[:, None] - reach + torch.arange(reach, device=lengths_B.device) >= 0
    C_BMQ = C_BMQ * reached_BM[..., None]
    if cu_seqlens is not None:
        row_BL = cu_seqlens[:batch, None] + torch.arange(length, device=lengths_B.device)
        row_BL = row_BL.clamp(max=xBdt.shape[1] - 1).long()
        xBdt = xBdt[0, row_BL]
    acts_BLC = causal_conv1d(xBdt[..., :written], conv_weight_CK[:written], conv_bias_C[:written], activation="silu")
    acts_BMQ = causal_conv1d(C_BMQ, conv_weight_CK[written:], conv_bias_C[written:], activation="silu")
    dt_BLH = xBdt[..., written:] if time_factor_BLH is None else xBdt[..., written:] * time_factor_BLH
    step_BLH = F.softplus(dt_BLH + dt_bias_H)
    # Sums of float32 logarithms would lose all digits behind a very negative one.
    total_BLH = (step_BLH * -torch.exp(A_log_H)).double().cumsum(1)
    place_BJ = lengths_B[:, None] - read + torch.arange(read, device=lengths_B.device)
    here_BJ = place_BJ.clamp(min=0)
    ahead_BJL = torch.arange(length, device=lengths_B.device) > here_BJ[..., None]
    at_BJH = total_BLH.gather(1, here_BJ[..., None].expand(-1, -1, heads))
    between_BJLH = (at_BJH[:, :, None] - total_BLH[:, None]).masked_fill(ahead_BJL[..., None], -torch.inf)
    decay_BHJL = between_BJLH.exp().to(xBdt.dtype).permute(0, 3, 1, 2)
    x_BLHP = acts_BLC[..., :width].reshape(batch, length, heads, -1) * step_BLH[..., None]
    B_BHLN = spread_groups(acts_BLC[..., width:].reshape(batch, length, n_groups, -1), heads).transpose(1, 2)
    C_BHJN = spread_groups(acts_BMQ[:, reach - read :].reshape(batch, read, n_groups, -1), heads).transpose(1, 2)
    y_BHJP = (C_BHJN @ B_BHLN.transpose(-1, -2) * decay_BHJL) @ x_BLHP.transpose(1, 2)
    index_BJE = here_BJ[..., None].expand(-1, -1, width)
    skipped = x_BLHP.flatten(2) if skip == "dt_x" else acts_BLC[..., :width]
    skipped_BJHP = skipped.gather(1, index_BJE).view(batch, read, heads, -1)
    y_BJHP = y_BHJP.transpose(1, 2) + D_H[:, None] * skipped_BJHP
    return gated_rms_norm(y_BJHP.flatten(2).to(z_BJE.dtype), z_BJE, norm_weight_E, eps=eps)
