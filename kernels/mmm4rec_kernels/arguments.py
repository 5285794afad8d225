"""Checks of arguments, all done before any computation; each message names the argument and what was expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape(name: str, tensor: torch.Tensor, expected: Sequence[int], letters: str) -> None:
    """Raise ValueError unless `tensor` has the expected shape; `letters` explains it, as in "[H]"."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor {letters}, got {type(tensor).__name__}")
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {letters} = {list(expected)}, got {list(tensor.shape)}")


def dimensions(name: str, tensor: torch.Tensor, letters: str, count: int) -> None:
    """Raise ValueError unless `tensor` is a tensor of `count` dimensions."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor {letters}, got {type(tensor).__name__}")
    if tensor.dim() != count:
        raise ValueError(f"{name}: expected shape {letters}, got {list(tensor.shape)}")


def floating(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless `tensor` holds floating-point numbers."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def like(name: str, tensor: torch.Tensor, main_name: str, main: torch.Tensor, *, dtype: bool = False) -> None:
    """Raise ValueError unless `tensor` is floating point and on the device (and, if asked, of the dtype) of `main`."""
    floating(name, tensor)
    if tensor.device != main.device:
        raise ValueError(f"{name}: expected device {main.device} as {main_name}, got {tensor.device}")
    if dtype and tensor.dtype != main.dtype:
        raise ValueError(f"{name}: expected dtype {main.dtype} as {main_name}, got {tensor.dtype}")


def member(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
