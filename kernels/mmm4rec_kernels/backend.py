"""Which implementation of an operation runs: what can run here, and why the rest cannot.

Nothing is imported to find out: a backend is looked for on the import path only, so asking is cheap and without effect.
Kernels of other projects run where they are named; "auto" keeps to the house's own, whose results repeat bit for bit.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch

from mmm4rec_kernels.crossovers import fastest, in_words

_log = logging.getLogger("mmm4rec_kernels")

OPERATIONS: Mapping[str, tuple[str, ...]] = {
    "ssd": ("reference", "torch", "triton", "mamba_ssm"),
    "causal_conv1d": ("reference", "torch", "triton", "causal_conv1d"),
    "gated_rms_norm": ("reference", "torch", "triton"),
    "ssd_block": ("reference", "torch", "triton"),
    "selective_scan": ("reference", "torch", "triton", "mamba_ssm"),
    "softmax_cross_entropy": ("reference", "torch", "triton"),
    "lookup": ("reference", "torch", "triton"),
    "compare_counts": ("reference", "torch", "triton"),
}

OTHERS: Mapping[str, tuple[str, str]] = {
    "mamba_ssm": ("mamba-ssm", "selective_scan_cuda"),
    "causal_conv1d": ("causal-conv1d", "causal_conv1d_cuda"),
}
"""Backends of other projects, named as their packages: distribution, and the compiled module that its import needs."""

INSTALL_OTHERS = "pip install --no-build-isolation 'mmm4rec[cuda]'"


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run on this machine, and why (not)."""

    available: bool
    why: str


class BackendUnavailable(RuntimeError):
    """An explicitly requested backend cannot run; the message says why."""


@functools.cache
def _version(package: str, distribution: str) -> str | None:
    """Installed version of a package, without importing it; None if it is absent."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (on the CPU, very slowly): TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _probe_triton() -> Availability:
    version = _version("triton", "triton")
    if version is None:
        return Availability(False, "triton is not installed")
    if interpreting():
        return Availability(True, f"triton {version}, interpreted on the CPU (TRITON_INTERPRET=1)")
    if not torch.cuda.is_available():
        return Availability(False, f"triton {version} is installed, but torch sees no CUDA device")
    return _triton_on(torch.cuda.current_device(), version)


@functools.cache
def _triton_on(device: int, version: str) -> Availability:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return Availability(False, f"the GPU has compute capability {major}.{minor}; 8.0 or newer is needed")
    return Availability(True, f"triton {version}, {torch.cuda.get_device_name(device)}")


_failed: dict[str, str] = {}
"""Why the import of a backend failed when it was tried."""


def _probe_other(package: str) -> Availability:
    distribution, extension = OTHERS[package]
    version = _version(package, distribution)
    if version is None:
        return Availability(False, f"{distribution} is not installed ({INSTALL_OTHERS}, which compiles it)")
    name = f"{distribution} {version}"
    if package in _failed:
        return Availability(False, f"{name}: {_failed[package]}")
    if package not in sys.modules and importlib.util.find_spec(extension) is None:
        return Availability(False, f"{name} lies here without its compiled {extension}, so it cannot be imported")
    if not torch.cuda.is_available():
        return Availability(False, f"{name} is installed, but torch sees no CUDA device")
    return Availability(True, f"{name}, {torch.cuda.get_device_name()}")


def load(backend: str, module: str) -> ModuleType:
    """A module of another project, imported at the first call that needs it.

    Raises:
        BackendUnavailable: if the import fails, whatever the reason; `availability` then knows it too.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:
        _failed[backend] = f"import {module} failed: {(str(error) or type(error).__name__).splitlines()[0]}"
        raise BackendUnavailable(f"backend {backend!r} cannot run here: {_failed[backend]}") from error


def availability(backend: str) -> Availability:
    """Whether one backend can run on this machine.

    Raises:
        ValueError: if no backend has that name.
    """
    if backend == "reference":
        return Availability(True, "plain sequential torch, any device")
    if backend == "torch":
        return Availability(True, f"torch {torch.__version__}, any device")
    if backend == "triton":
        return _probe_triton()
    if backend in OTHERS:
        return _probe_other(backend)
    raise ValueError(f"backend: no backend is called {backend!r}")


def runs(backend: str) -> bool:
    """Whether a backend can run on this machine; to torch.compile a constant."""
    return availability(backend).available


# What torch.compiler.assume_constant_result does, but that imports the whole compiler.
runs._dynamo_marked_constant = True  # type: ignore[attr-defined]


def by_kernel(tensor: torch.Tensor) -> bool:
    """Whether Triton kernels can take a tensor where it lies; sizes and dtypes are each operation's own."""
    return (tensor.is_cuda or interpreting()) and runs("triton")


def backends() -> dict[str, dict[str, Availability]]:
    """Every operation's backends on this machine, with the reason for each: operation -> backend -> availability."""
    return {operation: {name: availability(name) for name in names} for operation, names in OPERATIONS.items()}


def choices() -> dict[str, dict[str, str]]:
    """What "auto" takes on this machine: operation -> {cuda, cpu} -> words; cuda only where a GPU is."""
    gpu = torch.cuda.is_available()
    lacking = "" if runs("triton") else f"torch: {availability('triton').why}"
    return {
        operation: ({"cuda": lacking or f"{in_words(operation)}; torch in float64"} if gpu else {}) | {"cpu": "torch"}
        for operation in OPERATIONS
    }


@functools.cache
def _announce(operation: str, backend: str, where: str) -> None:
    _log.info("%s on %s: backend %s", operation, where, backend)


def choose(
    operation: str,
    backend: str,
    tensor: torch.Tensor,
    *,
    fits: bool = True,
    unfit: str = "",
    length: int | None = None,
) -> str:
    """The backend that runs a call.

    Args:
        operation: name of the public function.
        backend: "auto" or an explicit name.
        tensor: main input; its device and dtype decide under "auto".
        fits: whether the Triton kernels can take this call (sizes, options); adapters look for themselves.
        unfit: the reason when they cannot.
        length: places of the longest sequence, if it is known without asking the device.

    Returns:
        The name of a backend that can run: with "auto" what `crossovers` found fastest for CUDA tensors, as far as
        Triton runs there and its kernels take the call, otherwise "torch". The choice is logged once for each
        operation, device and dtype.

    Raises:
        ValueError: if the operation has no such backend.
        BackendUnavailable: if an explicit backend cannot run here or cannot take this call.
    """
    names = OPERATIONS[operation]
    if backend != "auto" and backend not in names:
        raise ValueError(f"backend: {operation} has {', '.join(names)} and auto, not {backend!r}")
    if backend == "auto":
        kernels = tensor.is_cuda and tensor.dtype != torch.float64 and fits and runs("triton")
        chosen = fastest(operation, tensor.dtype, length) if kernels else "torch"
        if not torch.compiler.is_compiling():
            where = f"{tensor.device.type}, {str(tensor.dtype)[6:]}" if tensor.is_cuda else tensor.device.type
            _announce(operation, chosen, where if fits or not tensor.is_cuda else f"{where}, {unfit}")
        return chosen
    if backend in ("reference", "torch"):
        return backend
    if not runs(backend):
        raise BackendUnavailable(f"{operation}: backend {backend!r} cannot run here: {availability(backend).why}")
    if not tensor.is_cuda and not (backend == "triton" and interpreting()):
        raise BackendUnavailable(f"{operation}: backend {backend!r} needs CUDA tensors, got {tensor.device}")
    if tensor.dtype == torch.float64:
        raise BackendUnavailable(f"{operation}: backend {backend!r} has no float64; use 'torch' or 'reference'")
    if backend == "triton" and not fits:
        raise BackendUnavailable(f"{operation}: backend {backend!r} cannot take this call: {unfit}")
    return backend


def without_autocast(tensor: torch.Tensor) -> torch.autocast:
    """Leaves products in the precision that an operation promises, as the kernels do, whatever autocast would make."""
    return torch.autocast(tensor.device.type, enabled=False)
