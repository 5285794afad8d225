"""The first call of an operation in a fresh process with an empty cache of kernels, on one GPU otherwise idle.

    python kernels/benchmarks/cold.py --out kernels/benchmarks/results/h200_cold.jsonl

A row is one process: `first_s` from the first call, forward and backward, until the device is done, `process_s` the
whole process with the import of torch. Products are tf32x3, as without any setting. Shapes and inputs as in `run`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from peers import forms
from run import PACKED, Shape, inputs_of, options_of

CASES = {
    "ssd": [Shape(1024, 64)],
    "ssd_block": [Shape(1024, 20), Shape(1024, 64), PACKED],
}


def first_call(operation: str, shape: Shape) -> float:
    """Seconds."""
    form = next(form for form in forms() if form.operation == operation and form.name == "triton")
    function, options = form.build(), options_of(shape)
    leaves = {k: t.requires_grad_() for k, t in inputs_of(operation, shape, torch.float32).items()}
    torch.cuda.synchronize()
    begin = time.perf_counter()
    y = function(**leaves, **options)
    torch.autograd.grad(y, list(leaves.values()), y.detach())
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def fresh(command: list[str]) -> dict[str, Any]:
    """The row of one case, measured in a process of its own."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        return {"error": f"exit status {done.returncode}"}
    return json.loads(done.stdout) | {"process_s": round(time.perf_counter() - begin, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="jsonl file, appended to")
    parser.add_argument("--commit", default="unknown", help="recorded")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        operation, number = options.case
        sys.stdout.write(json.dumps({"first_s": round(first_call(operation, CASES[operation][int(number)]), 2)}))
        sys.stdout.flush()
        os._exit(0)  # an interpreter that ends while autograd's thread still lets go of a graph may abort
    about = {
        "commit": options.commit,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    for operation, shapes in CASES.items():
        for number, shape in enumerate(shapes):
            row = {"operation": operation, "batch": shape.batch, "length": shape.length, "packed": shape.packed}
            row |= fresh([sys.executable, __file__, "--out", str(options.out), "--case", operation, str(number)])
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row | about) + "\n")


if __name__ == "__main__":
    main()
