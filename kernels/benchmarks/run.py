"""Speed of the operations on one GPU, each form checked before it is timed; every row is kept, losing ones too.

    python kernels/benchmarks/run.py --out kernels/benchmarks/results/h200.jsonl

A row is one form of one operation at one shape: median and 20 % and 80 % quantiles of the device time of CUDA-graph
replays and, beside it, the host time of an ordinary call. The byte floor counts each input read once and each output
written once. Letters: B sequences, L places, E width, H heads, P head dim, G groups, N state, C channels, K taps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton

from mmm4rec_kernels import causal_conv1d, gated_rms_norm, ssd, ssd_block
from mmm4rec_kernels.agreement import disagreement

Tensors = dict[str, torch.Tensor]
H, P, N, K = 8, 64, 64, 4
E, GN = H * P, H * N
BYTES_PER_MICROSECOND = 4.3e6
"""Copy bandwidth of an H200."""
TF32_FLOOR, BFLOAT16_FLOOR = 2e-2, 4e-2
"""What one-pass TF32 products, and forms that round intermediates to bfloat16, may lose more than the recurrence."""


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


def scan_inputs(batch: int, length: int, dtype: torch.dtype) -> Tensors:
    return {
        "x": normal(batch, length, H, P).to(dtype),
        "dt": normal(batch, length, H).to(dtype),
        "A": -torch.rand(H, device="cuda") * 15 - 1,
        "B": normal(batch, length, H, N).to(dtype),
        "C": normal(batch, length, H, N).to(dtype),
        "D": normal(H),
        "dt_bias": normal(H) - 3,
    }


def block_inputs(batch: int, length: int, dtype: torch.dtype) -> Tensors:
    return {
        "projected": normal(batch, length, 2 * E + 2 * GN + H).to(dtype),
        "conv_weight_CK": normal(E + 2 * GN, K) / 2,
        "conv_bias_C": normal(E + 2 * GN) / 2,
        "A_log_H": normal(H).abs(),
        "D_H": normal(H),
        "dt_bias_H": normal(H) - 3,
        "norm_weight_E": normal(E),
        "time_factor_BLH": normal(batch, H, length).transpose(1, 2),
    }


def conv_inputs(batch: int, length: int, dtype: torch.dtype) -> Tensors:
    channels = E + 2 * GN
    return {
        "x_BLC": normal(batch, length, channels).to(dtype),
        "weight_CK": normal(channels, K),
        "bias": normal(channels),
    }


def norm_inputs(batch: int, length: int, dtype: torch.dtype) -> Tensors:
    return {
        "y": normal(batch, length, E).to(dtype),
        "z": normal(batch, length, E).to(dtype),
        "weight": normal(E),
    }


def naive_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
) -> torch.Tensor:
    """The quadratic form as it is usually written: decay matrix by segment sums, three einsums."""
    dt = F.softplus(dt.float() + dt_bias)
    step = dt[..., None] * x.float()
    length = x.shape[1]
    a = (dt * A).transpose(1, 2)[..., None].expand(-1, -1, -1, length)
    lower = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(-1)
    decay = a.masked_fill(~lower, 0).cumsum(-2)
    decay = decay.masked_fill(torch.ones_like(lower).triu(1), -torch.inf).exp()
    scores = torch.einsum("blhn,bshn->bhls", C.float(), B.float())
    y = torch.einsum("bhls,bshp->blhp", scores * decay, step)
    return (y + D[:, None] * step).to(x.dtype)


def ours(function: Callable[..., torch.Tensor], **options: Any) -> Callable[..., torch.Tensor]:
    return lambda **inputs: function(**inputs, **options)


CASES: dict[str, dict[str, Any]] = {
    "ssd": {
        "inputs": scan_inputs,
        "reference": ours(ssd, skip="dt_x", backend="reference"),
        "forms": {
            "triton": ours(ssd, skip="dt_x", backend="triton"),
            "torch": ours(ssd, skip="dt_x", backend="torch"),
            "naive": naive_scan,
            "naive compiled": torch.compile(naive_scan, dynamic=False),
        },
        "shapes": [(1024, 20), (1024, 50), (256, 200), (64, 1024), (8, 4096)],
    },
    "causal_conv1d": {
        "inputs": conv_inputs,
        "reference": ours(causal_conv1d, activation="silu", backend="reference"),
        "forms": {
            "triton": ours(causal_conv1d, activation="silu", backend="triton"),
            "torch": ours(causal_conv1d, activation="silu", backend="torch"),
        },
        "shapes": [(1024, 20)],
    },
    "gated_rms_norm": {
        "inputs": norm_inputs,
        "reference": ours(gated_rms_norm, eps=1e-12, backend="reference"),
        "forms": {
            "triton": ours(gated_rms_norm, eps=1e-12, backend="triton"),
            "torch": ours(gated_rms_norm, eps=1e-12, backend="torch"),
        },
        "shapes": [(1024, 20)],
    },
    "ssd_block": {
        "inputs": block_inputs,
        "reference": ours(ssd_block, n_groups=H, eps=1e-12, backend="reference"),
        "forms": {
            "triton": ours(ssd_block, n_groups=H, eps=1e-12, backend="triton"),
            "torch": ours(ssd_block, n_groups=H, eps=1e-12, backend="torch"),
        },
        "shapes": [(1024, 20), (1024, 50), (256, 200)],
    },
}


def outcome(function: Callable[..., torch.Tensor], inputs: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    """Output and every gradient, for the sum of squares of the output."""
    leaves = {k: (t if dtype is None else t.to(dtype)).detach().requires_grad_() for k, t in inputs.items()}
    y = function(**leaves)
    y.float().square().sum().backward() if dtype is None else y.square().sum().backward()
    return {"y": y.detach(), **{f"d_{k}": t.grad for k, t in leaves.items() if t.grad is not None}}


def replays(step: Callable[[], object], count: int = 20) -> list[float]:
    """Device times in microseconds of graph replays, sorted."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(5):
        graph.replay()
    pairs = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return sorted(1e3 * start.elapsed_time(end) for start, end in pairs)


def host_time(step: Callable[[], object], count: int = 10) -> float:
    """Median host time of a call in microseconds, the device kept idle before each."""
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append(1e6 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(times)


def rows(name: str, case: dict[str, Any], only: list[str]) -> Iterator[dict[str, Any]]:
    modes = (
        ("float32", torch.float32, "highest"),
        ("float32", torch.float32, "high"),
        ("bfloat16", torch.bfloat16, "high"),
    )
    for batch, length in case["shapes"]:
        for label, dtype, precision in modes:
            for form, function in case["forms"].items():
                if only and form not in only:
                    continue
                torch.set_float32_matmul_precision("highest")
                torch.manual_seed(0)
                few = case["inputs"](2, length, dtype)
                truth = outcome(case["reference"], few, torch.float64)
                yardstick = outcome(case["reference"], few)
                torch.set_float32_matmul_precision(precision)
                row = {"operation": name, "form": form, "batch": batch, "length": length, "dtype": label}
                row["products"] = {"highest": "tf32x3", "high": "tf32"}[precision] if dtype == torch.float32 else label
                try:
                    floor = 1e-6 if precision == "highest" else TF32_FLOOR if dtype == torch.float32 else BFLOAT16_FLOOR
                    wrong = disagreement(outcome(function, few), truth, yardstick, floor)
                    if wrong:
                        yield {**row, "error": "; ".join(wrong)}
                        continue
                    yield from timed(row, function, case["inputs"](batch, length, dtype))
                except torch.OutOfMemoryError as error:
                    yield {**row, "error": str(error).splitlines()[0]}
                torch.cuda.empty_cache()


def timed(row: dict[str, Any], function: Callable[..., torch.Tensor], inputs: Tensors) -> Iterator[dict[str, Any]]:
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.items()}
    with torch.no_grad():
        y = function(**leaves)
    cotangent = torch.randn_like(y)
    size = sum(t.numel() * t.element_size() for t in inputs.values())
    result = y.numel() * y.element_size()

    def forward() -> None:
        with torch.no_grad():
            function(**leaves)

    def both() -> None:
        torch.autograd.grad(function(**leaves), list(leaves.values()), cotangent)

    for direction, step, moved in (
        ("forward", forward, size + result),
        ("forward+backward", both, 3 * size + 2 * result),
    ):
        times = replays(step)
        yield {
            **row,
            "direction": direction,
            "us": round(times[len(times) // 2], 1),
            "us_20": round(times[len(times) // 5], 1),
            "us_80": round(times[len(times) * 4 // 5], 1),
            "host_us": round(host_time(step), 1),
            "floor_us": round(moved / BYTES_PER_MICROSECOND, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="jsonl file, appended to")
    parser.add_argument("--operation", action="append", choices=list(CASES), help="only these")
    parser.add_argument("--form", action="append", default=[], help="only these forms")
    parser.add_argument("--commit", help="recorded; asked of git if absent")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    commit = (
        options.commit
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
    )
    about = {
        "commit": commit,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a") as file:
        for name in options.operation or list(CASES):
            for row in rows(name, CASES[name], options.form):
                file.write(json.dumps({**row, **about}) + "\n")
                file.flush()
                print({k: v for k, v in row.items() if k != "operation"} | {"op": name}, flush=True)


if __name__ == "__main__":
    main()
