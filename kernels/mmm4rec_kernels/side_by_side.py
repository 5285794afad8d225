"""Compiling the kernels of a computation side by side, before it runs.

Kernels are compiled where they are launched for the first time, one behind the other; a training step has dozens. A dry
pass over the same code launches none and compiles all at once.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch

from mmm4rec_kernels.backend import interpreting, runs

LAUNCHED = "mmm4rec_kernels.windows.fused"
"""Module whose kernels run all the same: they give places in tensors, which must not be arbitrary."""

_done: set[Hashable] = set()
"""Kinds of work whose kernels this process has compiled."""


def compile_once(kind: Hashable, device: torch.device, work: Callable[[], object]) -> None:
    """Compile the kernels of `work` side by side, once a process for each kind.

    Args:
        kind: what the kernels depend on; numbers of rows are nothing that they are compiled for.
        device: where the work runs; elsewhere than on a GPU nothing is done.
        work: is called with launches that run nothing; nothing that it returns or writes means anything.
    """
    if kind not in _done and _compiles_on(device):
        with compiled_side_by_side(device):
            work()
        _done.add(kind)


def _compiles_on(device: torch.device) -> bool:
    return device.type == "cuda" and not interpreting() and runs("triton")


@contextlib.contextmanager
def compiled_side_by_side(device: torch.device) -> Iterator[None]:
    """Inside, Triton launches run nothing; outside again, all of them are compiled.

    What the launches would have written is arbitrary. Without a GPU, or with nothing to compile with, launches are
    what they were. An error of a compilation is left to the launch that needs the kernel.
    """
    if not _compiles_on(device):
        yield
        return
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    compiling: dict[tuple[Any, ...], Future[Any]] = {}

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if warmup or kernel.fn.__module__ == LAUNCHED:
            return launch(kernel, *arguments, grid=grid, warmup=warmup, **options)
        given = [_stand_in(argument) for argument in arguments]
        parameters = {parameter.name: parameter for parameter in kernel.params}
        key = (
            id(kernel),
            *(_kind(a, p) for a, p in zip(given, kernel.params, strict=False)),
            *((name, _kind(a, parameters.get(name))) for name, a in options.items()),
        )
        if key not in compiling:
            compiling[key] = pool.submit(_compiled, kernel, given, grid, options)
        return None

    index = torch.cuda.current_device() if device.index is None else device.index
    threads = max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with (
        ThreadPoolExecutor(threads, initializer=torch.cuda.set_device, initargs=(index,)) as pool,
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        yield


def _compiled(kernel: Any, given: list[Any], grid: Any, options: dict[str, Any]) -> None:
    """Compile a kernel, and what launches it: the latter is C, and takes Triton as long as the kernel."""
    compiled = kernel.warmup(*given, grid=grid, **options)
    load = getattr(compiled, "_init_handles", None)
    if load is not None:
        load()


def _stand_in(argument: Any) -> Any:
    """What stands for a tensor while its kernel is compiled: its dtype, as for an aligned one of that dtype."""
    if isinstance(argument, torch.Tensor) and argument.data_ptr() % 16 == 0:
        return argument.dtype
    return argument


def _kind(argument: Any, parameter: Any) -> Any:
    """What a kernel is compiled anew for, as far as an argument goes; options of a launch have no parameter."""
    fixed = parameter is None or parameter.is_constexpr
    if fixed or argument is None or isinstance(argument, (bool, torch.dtype)):
        return argument
    if isinstance(argument, int):
        special = () if parameter.do_not_specialize else (argument == 1, argument % 16 == 0)
        return *special, abs(argument) < 1 << 31
    return argument.dtype if isinstance(argument, torch.Tensor) else type(argument)
