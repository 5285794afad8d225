"""Which of the house's own backends is the fastest on a GPU, by length and products: what "auto" goes by there.

Forward and backward together, as measured by kernels/benchmarks/run.py in the file that SOURCE names; a test holds this
table to its rows. They hold no crossover: on an H100 the torch backend took 4.9 to 18 times as long as Triton for the
scan of 20 to 4096 places in large batches. Small batches and other operations were not timed so; Triton stands there
too. Kernels of other projects are not in it: they need not repeat bit for bit, and take single TF32
products where three were asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

SOURCE = "kernels/benchmarks/results/h100_kernels.jsonl"
ALWAYS_TRITON = ((math.inf, "triton"),)

FASTEST: Mapping[str, Mapping[str, tuple[tuple[float, str], ...]]] = {
    operation: {"tf32x3": ALWAYS_TRITON, "tf32": ALWAYS_TRITON, "bfloat16": ALWAYS_TRITON}
    for operation in ("ssd", "causal_conv1d", "gated_rms_norm", "ssd_block")
}
"""Operation -> products -> (longest length, backend), ascending. float16 goes by bfloat16."""


def products(dtype: torch.dtype) -> str:
    """How products of a dtype are taken, as the rows name it."""
    if dtype != torch.float32:
        return "bfloat16"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


# A constant to torch.compile, which cannot follow the question for the precision.
products._dynamo_marked_constant = True  # type: ignore[attr-defined]


def fastest(operation: str, dtype: torch.dtype, length: int | None) -> str:
    """The backend for CUDA tensors; operations that were not measured so, and unknown lengths, go to "triton"."""
    spans = FASTEST.get(operation, {}).get(products(dtype), ALWAYS_TRITON)
    if length is None:
        return "triton"
    return next(backend for longest, backend in spans if length <= longest)


def in_words(operation: str) -> str:
    """What the table says of an operation."""
    said: dict[str, list[str]] = {}
    for kind, spans in FASTEST.get(operation, {"every dtype": ALWAYS_TRITON}).items():
        parts, beyond = [], 0.0
        for longest, backend in spans:
            where = f" up to {longest:.0f} places" if longest < math.inf else f" beyond {beyond:.0f}" if beyond else ""
            parts.append(backend + where)
            beyond = longest
        said.setdefault(", ".join(parts), []).append(kind)
    if len(said) == 1:
        return next(iter(said))
    return "; ".join(f"{'/'.join(kinds)}: {words}" for words, kinds in said.items())
