"""The gated norm with the framework's fused pieces. Letter: E width."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def normalise(y: torch.Tensor, z: torch.Tensor, weight_E: torch.Tensor, eps: float, before_gate: bool) -> torch.Tensor:
    """As `reference.normalise`."""
    gate = F.silu(z)
    width = (y.shape[-1],)
    if before_gate:
        return F.rms_norm(y, width, weight_E, eps) * gate
    return F.rms_norm(y * gate, width, weight_E, eps)
