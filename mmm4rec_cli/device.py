"""The device and the number format that a command computes with."""

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from mmm4rec_cli.errors import DeviceError, UsageError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> "torch.device":
    """The torch device of `runtime.device`; `auto` takes the GPU when there is one.

    Raises:
        DeviceError: a GPU was asked for that is not there.
        UsageError: no such kind of device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun starts one process a GPU
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r} is not known", hint="use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device {name!r} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs",
            hint="see `mmm4rec doctor`, or use --device cpu",
        )
    return device


def precision(name: str, device: "torch.device") -> AbstractContextManager[object]:
    """Set how float32 matrix products are done and give the autocast context of a forward pass.

    Args:
        name: `tf32`, `fp32` or `bf16` (`runtime.precision`); on the CPU float32 products are always IEEE.
        device: where the forward pass runs.
    """
    import torch

    torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
    # No cache of cast weights: it would be filled while a CUDA graph is recorded and read after.
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=name == "bf16", cache_enabled=False)
