"""Inputs and runs shared by the kernel tests.

Letters: B sequences, L places, H heads, P head dim, G groups, N state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent.parent / "data" / "golden" / "golden_kernels.safetensors"

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Tensors:
    return load_file(GOLDEN)


def _scan_inputs(
    batch: int,
    length: int,
    heads: int = 4,
    width: int = 16,
    groups: int = 4,
    state: int = 16,
    *,
    seed: int = 0,
    extreme: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Tensors:
    """Random inputs of the scan; `extreme` spreads step sizes over 1e-4 to 30 and A over -1e-3 to -64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) * (high - low) + low

    if extreme:
        step = torch.exp(uniform(-9.2, 3.4, batch, length, heads).double())
        dt, bias = torch.log(torch.expm1(step)).float(), torch.zeros(heads)
        A = -torch.exp(torch.linspace(-6.9, 4.15, heads))
    else:
        dt, bias = normal(batch, length, heads), uniform(-4, -1, heads)
        A = -uniform(1, 16, heads)
    inputs = {
        "x": normal(batch, length, heads, width),
        "dt": dt,
        "A": A,
        "B": normal(batch, length, groups, state),
        "C": normal(batch, length, groups, state),
        "D": normal(heads),
        "dt_bias": bias,
        "cotangent": normal(batch, length, heads, width),
    }
    low = {"x", "B", "C", "cotangent", "dt"}
    return {k: t.to(device, dtype if k in low else torch.float32) for k, t in inputs.items()}


def _run(
    function: Callable[..., torch.Tensor], inputs: Tensors, dtype: torch.dtype | None = None, **options: object
) -> Tensors:
    """Outputs and gradients (of the sum of y times the cotangent) of one call; `dtype` replaces that of the inputs."""
    leaves = {
        k: (t if dtype is None else t.to(dtype)).detach().clone().requires_grad_()
        for k, t in inputs.items()
        if k != "cotangent"
    }
    y = function(**leaves, **options)
    (y * inputs["cotangent"].to(y.dtype)).sum().backward()
    grads = {f"d_{k}": t.grad for k, t in leaves.items()}
    return {"y": y.detach(), **{k: g for k, g in grads.items() if g is not None}}


@pytest.fixture
def scan_inputs() -> Callable[..., Tensors]:
    return _scan_inputs


@pytest.fixture
def run() -> Callable[..., Tensors]:
    return _run
