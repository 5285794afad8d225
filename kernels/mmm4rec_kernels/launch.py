"""How a call's tensors become launch parameters. Imported only by modules that launch Triton kernels."""

from __future__ import annotations

import functools

import torch
import triton.language as tl

KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def kind(dtype: torch.dtype) -> tl.dtype:
    """Type of the operands of matrix products."""
    return KINDS[dtype]


def precision() -> str:
    """How float32 products are taken: as torch does it for its own matrix products.

    With torch.set_float32_matmul_precision("highest"), the default, three TF32 products make up one of about float32
    precision; with "high" or "medium" one TF32 product.
    """
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def tile(size: int) -> int:
    """The power of two that holds `size`, at least 16, the smallest side of a matrix product."""
    return max(16, 1 << (size - 1).bit_length())


def align(*strides: int) -> int:
    """Largest of 16, 8, 4, 2, 1 that divides all strides: tells the compiler how wide it may load."""
    for unit in (16, 8, 4, 2):
        if all(stride % unit == 0 for stride in strides):
            return unit
    return 1


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(tensor: torch.Tensor) -> int:
    """Multiprocessors of the tensor's device; a small number for the interpreter."""
    return _processors(tensor.device.index or 0) if tensor.is_cuda else 1


@functools.cache
def _capability(index: int) -> int:
    return torch.cuda.get_device_properties(index).major


def warp_group_products(tensor: torch.Tensor) -> bool:
    """Whether the tensor's device is a Hopper GPU, whose products of 64 rows read operands from shared memory.

    True without a device: kernels that are compiled ahead are compiled as for Hopper.
    """
    return not tensor.is_cuda or _capability(tensor.device.index or 0) == 9
