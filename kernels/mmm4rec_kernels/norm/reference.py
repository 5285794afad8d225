"""The gated norm as it is defined. Letter: E width."""

from __future__ import annotations

import torch


def normalise(y: torch.Tensor, z: torch.Tensor, weight_E: torch.Tensor, eps: float, before_gate: bool) -> torch.Tensor:
    """Weight g / sqrt(mean(g^2) + eps), g = y silu(z); with `before_gate` the norm of y alone, times silu(z)."""
    gate = z / (1 + torch.exp(-z))
    g = y if before_gate else y * gate
    normed = weight_E * g / torch.sqrt((g * g).mean(-1, keepdim=True) + eps)
    return normed * gate if before_gate else normed
