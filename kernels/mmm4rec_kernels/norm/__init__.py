"""RMS norm with a SiLU gate. Letter: E width."""

from __future__ import annotations

import torch

from mmm4rec_kernels import arguments
from mmm4rec_kernels.backend import choose
from mmm4rec_kernels.norm import eager, reference
from mmm4rec_kernels.norm.ops import MAX_WIDTH, norm_forward

__all__ = ["gated_rms_norm"]


def gated_rms_norm(
    y: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    norm_before_gate: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Gated RMS norm over the last dimension.

    weight g / sqrt(mean(g^2) + eps) with g = y silu(z); with `norm_before_gate` the norm of y alone, times silu(z).
    Arithmetic is float32 for float16 and bfloat16, otherwise that of the input.

    Args:
        y: [..., E].
        z: [..., E], the gate before its SiLU; shape and dtype of y, any strides.
        weight: [E].
        eps: added to the mean square inside the root, not negative.
        norm_before_gate: see above.
        backend: "auto", "reference", "torch" or "triton".

    Returns:
        [..., E] in the dtype of y.

    Raises:
        ValueError: a shape, dtype, device or value is not as above; the message names the argument.
        BackendUnavailable: an explicit backend cannot run here or cannot take the call.
    """
    if not isinstance(y, torch.Tensor) or y.dim() < 1:
        raise ValueError("y: expected a tensor [..., E]")
    arguments.floating("y", y)
    arguments.shape("z", z, y.shape, "[..., E] of y")
    arguments.like("z", z, "y", y, dtype=True)
    arguments.shape("weight", weight, y.shape[-1:], "[E]")
    arguments.like("weight", weight, "y", y)
    if eps < 0:
        raise ValueError(f"eps: expected a number that is not negative, got {eps}")
    unfit = "" if y.shape[-1] <= MAX_WIDTH else f"rows of {y.shape[-1]}, at most {MAX_WIDTH}"
    chosen = choose("gated_rms_norm", backend, y, fits=not unfit, unfit=unfit)
    if chosen == "triton":
        out: torch.Tensor
        out, _ = norm_forward(_planes(y), _planes(z), weight, eps, norm_before_gate)
        return out.reshape(y.shape)
    compute = torch.promote_types(y.dtype, torch.float32)
    normalise = reference.normalise if chosen == "reference" else eager.normalise
    return normalise(y.to(compute), z.to(compute), weight.to(compute), eps, norm_before_gate).to(y.dtype)


def _planes(t: torch.Tensor) -> torch.Tensor:
    """[..., E] as [B, L, E] with contiguous columns."""
    t = t if t.stride(-1) == 1 else t.contiguous()
    return t if t.dim() == 3 else t.reshape(1, -1, t.shape[-1])
