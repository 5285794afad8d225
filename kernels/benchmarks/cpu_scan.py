"""The scan on a CPU: ours in torch beside the naive form, in turn, checked before; every row is kept.

    python kernels/benchmarks/cpu_scan.py --out kernels/benchmarks/results/cpu_scan.jsonl --commit HASH \
        [--threads N] [--repeats N]

A row is one form at one shape: medians and fastest times in milliseconds, forward and backward, and forward alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peers import H, N, P, naive_scan

from mmm4rec_kernels import ssd

SHAPES = ((256, 20), (256, 50), (64, 200), (4, 1024))
Tensors = dict[str, torch.Tensor]


def inputs(batch: int, length: int) -> Tensors:
    """As in `run`."""
    torch.manual_seed(0)
    tensors = {
        "x": torch.randn(batch, length, H, P),
        "dt": torch.randn(batch, length, H),
        "A": -torch.rand(H) * 15 - 1,
        "B": torch.randn(batch, length, H, N),
        "C": torch.randn(batch, length, H, N),
        "D": torch.randn(H),
        "dt_bias": torch.randn(H) - 3,
    }
    return {name: t.requires_grad_() for name, t in tensors.items()}


def ours(**tensors: torch.Tensor) -> torch.Tensor:
    return ssd(**tensors, backend="torch")


def results(scan: Callable[..., torch.Tensor], tensors: Tensors, cotangent: torch.Tensor) -> list[torch.Tensor]:
    y = scan(**tensors)
    return [y, *torch.autograd.grad(y, list(tensors.values()), cotangent)]


def milliseconds(function: Callable[..., object], *positional: object, **named: object) -> float:
    start = time.perf_counter()
    function(*positional, **named)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="jsonl file, appended to")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--note", default="", help="kept with the rows: how busy the machine was")
    parser.add_argument("--commit", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = {"threads": options.threads, "torch": torch.__version__, "commit": options.commit, "note": options.note}
    forms = {"naive": naive_scan, "torch": ours}
    for batch, length in SHAPES:
        tensors, cotangent = inputs(batch, length), torch.randn(batch, length, H, P)
        for one, other in zip(*(results(form, tensors, cotangent) for form in forms.values()), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())
        both: dict[str, list[float]] = {name: [] for name in forms}
        alone: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(options.repeats if length <= 50 else max(3, options.repeats // 5)):
            for name, form in forms.items():
                both[name].append(milliseconds(results, form, tensors, cotangent))
                with torch.no_grad():
                    alone[name].append(milliseconds(form, **tensors))
        for name in forms:
            row = {"operation": "ssd", "form": name, "batch": batch, "length": length, **about}
            for what, times in (("both", both[name]), ("forward", alone[name])):
                row |= {f"{what}_ms": round(statistics.median(times), 1), f"{what}_ms_fastest": round(min(times), 1)}
            print(json.dumps(row), flush=True)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
