"""The full softmax over large catalogues: time and peak memory of loss and gradients, ours and the plain form.

    python kernels/benchmarks/catalogue_loss.py [--out FILE]

Batch 1024, width 256, float32 with TF32 products; values are compared before anything is timed. `ms` is a call as it
is, the host's work included; `graph_ms` a replay of the same call as a CUDA graph, which is how training runs it.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from mmm4rec_kernels import softmax_cross_entropy


def plain(query: torch.Tensor, table: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(query @ table[1:].T, target - 1)


def ours(query: torch.Tensor, table: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return softmax_cross_entropy(query, table, target, first_row=1).mean()


def gradients(
    function: Callable[..., torch.Tensor], query: torch.Tensor, table: torch.Tensor, target: torch.Tensor
) -> object:
    return torch.autograd.grad(function(query, table, target), (query, table))


def replayed(call: Callable[[], object]) -> float:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    for rows in (4_386, 25_987, 446_976, 1_000_001):
        torch.manual_seed(0)
        query = torch.randn(1024, 256, device="cuda", requires_grad=True)
        table = (torch.randn(rows, 256, device="cuda") * 0.05).requires_grad_()
        target = torch.randint(1, rows, (1024,), device="cuda")
        torch.set_float32_matmul_precision("highest")
        results = [
            (f(query, table, target), *torch.autograd.grad(f(query, table, target), (query, table)))
            for f in (plain, ours)
        ]
        worst = max(float((a - b).norm() / a.norm()) for a, b in zip(*results, strict=True))
        assert worst < 1e-4, worst
        del results
        torch.set_float32_matmul_precision("high")
        for name, function in (("plain", plain), ("ours", ours)):
            times = []
            call = partial(gradients, function, query, table, target)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            for _ in range(8):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
            row = {
                "form": name,
                "rows": rows,
                "ms": statistics.median(times[2:]),
                "peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30,
                "graph_ms": replayed(call),
                "worst_error": worst,
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
            }
            print(json.dumps(row), flush=True)
            if out:
                with out.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
