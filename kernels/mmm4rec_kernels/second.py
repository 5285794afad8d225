"""A second stream of a GPU, for work that the main line need not wait for."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager

import torch


@functools.cache
def _of(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call]


def second_stream() -> torch.cuda.Stream:
    """The second stream of the present GPU."""
    return _of(torch.cuda.current_device())


def on_second_stream(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Work inside goes to the second stream of a tensor's GPU, and so do its gradients; elsewhere nothing changes."""
    return torch.cuda.stream(second_stream()) if tensor.is_cuda else contextlib.nullcontext()
