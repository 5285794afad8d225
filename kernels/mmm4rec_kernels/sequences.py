"""Sequences of different lengths: right padding with `lengths`, or packed one behind the other with `cu_seqlens`.

Letters: B sequences, L padded length, T places of all packed sequences together.
"""

from __future__ import annotations

import torch


def check(
    lengths: torch.Tensor | None, cu_seqlens: torch.Tensor | None, batch: int, length: int, device: torch.device
) -> None:
    """Raise ValueError unless the two arguments describe sequences inside a [batch, length, ...] tensor.

    Values are looked at on the CPU only: reading them on a GPU would make every call wait for the device.
    """
    if lengths is not None and cu_seqlens is not None:
        raise ValueError("lengths: give lengths or cu_seqlens, not both")
    for name, tensor in (("lengths", lengths), ("cu_seqlens", cu_seqlens)):
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: expected an int32 or int64 tensor")
        if tensor.device != device:
            raise ValueError(f"{name}: expected device {device}, got {tensor.device}")
    if lengths is not None:
        if tuple(lengths.shape) != (batch,):
            raise ValueError(f"lengths: expected shape [B] = [{batch}], got {list(lengths.shape)}")
        if _readable(lengths) and bool(((lengths < 0) | (lengths > length)).any()):
            raise ValueError(f"lengths: expected values from 0 to L = {length}, got {lengths.tolist()}")
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens: expected packed inputs of shape [1, T, ...], got a batch of {batch}")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
            raise ValueError(f"cu_seqlens: expected shape [B + 1] with B >= 1, got {list(cu_seqlens.shape)}")
        if _readable(cu_seqlens):
            steps = cu_seqlens.diff()
            if bool((steps < 0).any()) or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != length:
                raise ValueError(
                    f"cu_seqlens: expected offsets that start at 0, never fall and end at T = {length}, "
                    f"got {cu_seqlens.tolist()}"
                )


def _readable(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def mask(lengths: torch.Tensor, length: int) -> torch.Tensor:
    """[B, L], true at the places before each sequence's end."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]


def unpack(packed: torch.Tensor, cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """[1, T, ...] packed sequences to [B, length, ...], zero behind each end."""
    place = cu_seqlens[:-1, None] + torch.arange(length, device=packed.device)
    inside = place < cu_seqlens[1:, None]
    rows = packed[0][torch.where(inside, place, 0)]
    return torch.where(inside.reshape(*inside.shape, *[1] * (packed.dim() - 2)), rows, rows.new_zeros(()))


def pack(padded: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """[B, L, ...] to the packed [1, T, ...]; the inverse of `unpack` on the places that count."""
    inside = mask(cu_seqlens.diff(), padded.shape[1])
    return padded[inside][None]


def longest(cu_seqlens: torch.Tensor) -> int:
    """Length of the longest packed sequence (waits for the device)."""
    return int(cu_seqlens.diff().max())


def numbers(cu_seqlens: torch.Tensor, places: int) -> torch.Tensor:
    """[1, T] int32: which of the packed sequences each of the `places` belongs to."""
    order = torch.arange(cu_seqlens.numel() - 1, dtype=torch.int32, device=cu_seqlens.device)
    return torch.repeat_interleave(order, cu_seqlens.diff(), output_size=places)[None]
