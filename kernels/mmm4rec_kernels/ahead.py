"""Compiling kernels for a GPU that is not there, to see what they need: registers, spilled bytes, shared memory.

A call's launches are recorded instead of run, then each is compiled for the named architecture. Not under the
interpreter.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Needs:
    """What one compiled kernel needs."""

    kernel: str
    capability: int
    registers: int
    """For each thread."""
    spilled: int
    """Bytes of local memory for each thread."""
    shared: int
    """Bytes of shared memory for each program."""
    warps: int
    assembly: str
    """The PTX."""


@dataclass(frozen=True)
class Launch:
    """A recorded launch."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, Triton launches run nothing and are listed."""
    launches: list[Launch] = []

    def record(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, arguments, options))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def compile_launch(launch: Launch, capability: int) -> Needs:
    """Compile one recorded launch, for example for capability 90."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.arguments, strict=False)) | {
        k: v for k, v in launch.options.items() if k not in _OPTIONS
    }
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and special):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and special:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {k: v for k, v in launch.options.items() if k in _OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _resources(compiled.asm["cubin"])
    return Needs(
        launch.kernel.__name__,
        capability,
        registers,
        spilled,
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        compiled.asm["ptx"],
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def needs(call: Callable[[], object], capability: int) -> list[Needs]:
    """What the kernels that `call` would launch need on a GPU of that compute capability."""
    with recorded() as launches:
        call()
    return [compile_launch(launch, capability) for launch in launches]
