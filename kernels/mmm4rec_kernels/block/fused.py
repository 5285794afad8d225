"""The block as the kernels of its three operations, one behind the other, any length.

Letters: B sequences, L places, E width, H heads, P head dim, G groups, N state, C = E + 2GN channels, K taps.
Each kernel reads its columns where the in-projections left them, and backward each writes its gradient straight into
the columns of the projections' gradients: nothing is split, joined or copied. What the convolution and the scan
return is saved.
"""

from __future__ import annotations

import torch

from mmm4rec_kernels.conv1d import fused as conv1d
from mmm4rec_kernels.norm import fused as norm1d
from mmm4rec_kernels.ssd import fused as scan


def _columns(projected: torch.Tensor, C: torch.Tensor | None, width: int, states: int) -> list[torch.Tensor]:
    """Neighbouring columns that are convolved together: [xBC] or [xB, C]."""
    if C is None:
        return [projected[..., width : 2 * (width + states)]]
    return [projected[..., : width + states], C]


def _scan_inputs(acts: list[torch.Tensor], width: int, states: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of x, B and C inside the convolved columns."""
    x, B = acts[0][..., :width], acts[0][..., width : width + states]
    C = acts[0][..., width + states :] if len(acts) == 1 else acts[1]
    return x, B, C


def _heads(t: torch.Tensor, count: int) -> torch.Tensor:
    """[B, L, count columns] as [B, L, count, columns] without a copy."""
    return t.as_strided(
        (*t.shape[:2], count, t.shape[2] // count),
        (t.stride(0), t.stride(1), t.shape[2] // count, 1),
    )


def forward(
    projected: torch.Tensor,
    z: torch.Tensor | None,
    C: torch.Tensor | None,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    norm: torch.Tensor,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    groups: int,
    eps: float,
    skip_dt: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Normalised output [B, L, E], and what backward needs: 1/rms, y, the scan's states, the convolved columns."""
    heads, width = A_log.shape[0], norm.shape[0]
    states = (weight.shape[0] - width) // 2
    acts, at = [], 0
    for columns in _columns(projected, C, width, states):
        to = at + columns.shape[2]
        acts.append(conv1d.forward(columns, weight[at:to], bias[at:to], ends, packed, longest, True))
        at = to
    dt = projected[..., -heads:]
    x, B, c = _scan_inputs(acts, width, states)
    y, kept, _ = scan.forward(
        _heads(x, heads),
        dt,
        -torch.exp(A_log.float()),
        _heads(B, groups),
        _heads(c, groups),
        D,
        dt_bias,
        None,
        ends,
        packed,
        longest,
        True,
        None,
        skip_dt,
        False,
        factor,
    )
    y = y.view(*y.shape[:2], width)
    gate = projected[..., :width] if z is None else z
    out, scale = norm1d.forward(y, gate, norm, eps, False, None if packed else ends)
    return out, [scale, y, kept, *acts]


def backward(
    grad: torch.Tensor,
    saved: list[torch.Tensor],
    projected: torch.Tensor,
    z: torch.Tensor | None,
    C: torch.Tensor | None,
    factor: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    A_log: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    norm: torch.Tensor,
    ends: torch.Tensor | None,
    packed: bool,
    longest: int,
    groups: int,
    skip_dt: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of projected, z, C, factor (empty where absent) and, one behind the other, of the parameters.

    The parameters' order is taps [C, K], bias [C], norm [E], D [H], A_log [H], dt_bias [H], all float32.
    """
    scale, y, kept, *acts = saved
    heads, width, taps = A_log.shape[0], norm.shape[0], weight.shape[1]
    states = (weight.shape[0] - width) // 2
    d_projected = torch.empty_like(projected, memory_format=torch.contiguous_format)
    d_z = projected.new_empty(0) if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    d_C = projected.new_empty(0) if C is None else torch.empty_like(C, memory_format=torch.contiguous_format)
    gate, d_gate = (projected[..., :width], d_projected[..., :width]) if z is None else (z, d_z)
    d_y, _, d_norm = norm1d.backward(grad, y, gate, norm, scale, False, None if packed else ends, d_gate)

    x, B, c = _scan_inputs(acts, width, states)
    d_acts = [torch.empty_like(act) for act in acts]
    dt = projected[..., -heads:]
    A = -torch.exp(A_log.float())
    d_factor = (
        projected.new_empty(0) if factor is None else torch.empty(factor.shape, dtype=factor.dtype, device=dt.device)
    )
    *_, sums, _ = scan.backward(
        d_y,
        None,
        kept,
        _heads(x, heads),
        dt,
        A,
        _heads(B, groups),
        _heads(c, groups),
        D,
        dt_bias,
        None,
        ends,
        packed,
        longest,
        True,
        None,
        skip_dt,
        (*_scan_inputs(d_acts, width, states), d_projected[..., -heads:]),
        factor,
        d_factor,
    )
    d_taps, d_bias, at = [], [], 0
    d_columns = _columns(d_projected, None if C is None else d_C, width, states)
    for columns, d_act, d_column in zip(_columns(projected, C, width, states), d_acts, d_columns, strict=True):
        to = at + columns.shape[2]
        _, flat = conv1d.backward(d_act, columns, weight[at:to], bias[at:to], ends, packed, longest, True, d_column)
        d_taps.append(flat[: (to - at) * taps])
        d_bias.append(flat[(to - at) * taps :])
        at = to
    flat = torch.cat([*d_taps, *d_bias, d_norm, sums[2], sums[0] * A, sums[1]])
    return d_projected, d_z, d_C, d_factor, flat
