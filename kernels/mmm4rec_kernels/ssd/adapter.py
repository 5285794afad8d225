"""The scan by `mamba_chunk_scan_combined` of the package mamba-ssm, made to mean what `ssd` means.

What differs there: D always multiplies raw x, nothing decays backwards (step sizes must not be negative, which softplus
sees to), nothing is known of right padding, and packed sequences have no states. Letters as in `reference`.
"""

from __future__ import annotations

import torch

from mmm4rec_kernels import sequences
from mmm4rec_kernels.backend import BackendUnavailable, load
from mmm4rec_kernels.ssd.steps import step_sizes

MODULE = "mamba_ssm.ops.triton.ssd_combined"


def chunk_size(length: int) -> int:
    """Places of a chunk: the power of two that holds the sequence, up to the 256 that the package takes for itself."""
    return min(max(32, 1 << (length - 1).bit_length()), 256)


def scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    softplus: bool,
    limit: tuple[float, float] | None,
    skip: str,
    initial: torch.Tensor | None,
    want_final: bool,
    lengths: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Y in the dtype of x, and the last states if they are asked for; arguments as in `ssd`.

    Raises:
        BackendUnavailable: the package cannot be imported, or cannot take the call.
    """
    if cu_seqlens is not None and (initial is not None or want_final):
        raise BackendUnavailable("ssd: backend 'mamba_ssm' cannot take this call: packed sequences with states")
    combined = load("mamba_ssm", MODULE).mamba_chunk_scan_combined
    outside = None if lengths is None else ~sequences.mask(lengths, x.shape[1])
    if outside is not None:  # a NaN behind the end would reach the gradient of dt_bias if dt were masked once only
        dt = dt.masked_fill(outside[..., None], 0)
        x, B, C = (t.masked_fill(outside[..., None, None], 0) for t in (x, B, C))
    scaled_skip = skip == "dt_x" and D is not None
    if outside is not None or scaled_skip:
        dt = step_sizes(dt.float(), None if bias is None else bias.float(), softplus, limit)
        bias, softplus, limit = None, False, None
    if outside is not None:
        dt = dt.masked_fill(outside[..., None], 0)
    y = combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size(x.shape[1]),
        D=None if scaled_skip else D,
        dt_bias=bias,
        initial_states=initial,
        seq_idx=None if cu_seqlens is None else sequences.numbers(cu_seqlens, x.shape[1]),
        dt_softplus=softplus,
        dt_limit=(0.0, torch.inf) if limit is None else limit,
        return_final_states=want_final,
    )
    y, final = y if want_final else (y, None)
    if scaled_skip:
        assert D is not None
        y = (y + D.reshape(x.shape[2], -1) * dt[..., None] * x).to(x.dtype)
    if outside is not None:
        y = y.masked_fill(outside[..., None, None], 0)
    return y, None if final is None else final.float()
