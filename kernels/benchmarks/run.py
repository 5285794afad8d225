"""Speed of the operations on one GPU beside their peers, each form checked before it is timed; every row is kept.

    python kernels/benchmarks/run.py --out kernels/benchmarks/results/h200_kernels.jsonl [--warm 16]

Each peer runs in a process of its own, with our Triton kernels timed again beside it. A row is one form of one
operation at one shape: `us` the device time of CUDA-graph replays (median, and 20 % and 80 % quantiles), `call_us` the
time of an ordinary call until the device is done, `host_us` the part of it in which the host is busy. The byte floor
counts each input read once and each output written once. Packed are 1,024 sequences one behind the other whose lengths
are those of a small domain (mean 4.4, at most 20). Forms that know no packed sequences have no such row.

Checked means: the first sequences of the very batch that is timed, output and gradients, against the recurrence in
float64. Letters: B sequences, L places, E width, H heads, P head dim, G groups, N state, C channels, K taps.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from peers import EPS, GN, E, Form, H, K, Missing, N, P, forms

from mmm4rec_kernels import causal_conv1d, gated_rms_norm, ssd, ssd_block
from mmm4rec_kernels.agreement import disagreement

Tensors = dict[str, torch.Tensor]
BYTES_PER_MICROSECOND = {"NVIDIA H200": 4.3e6, "NVIDIA H100 80GB HBM3": 3.0e6}
"""What a copy on the device reads and writes, by the card's name; others have no floor."""
MODES = {
    "tf32x3": (torch.float32, "highest", 1e-5),
    "tf32": (torch.float32, "high", 2e-2),
    "bfloat16": (torch.bfloat16, "high", 4e-2),
}
"""Products: dtype, torch's precision of float32 products, and what a form may lose more than the recurrence."""
FORWARD, BACKWARD = "forward", "forward+backward"
CHECKED, CHECKED_PACKED = 2, 8
"""Sequences that are compared with the recurrence."""
REFERENCES = {
    "ssd": (ssd, {}),
    "causal_conv1d": (causal_conv1d, {"activation": "silu"}),
    "gated_rms_norm": (gated_rms_norm, {"eps": EPS}),
    "ssd_block": (ssd_block, {"n_groups": H, "eps": EPS, "skip": "x"}),
}


@dataclass(frozen=True)
class Shape:
    """B sequences of L places, or with packed sequences [1, T] of at most L."""

    batch: int
    length: int
    packed: bool = False

    def offsets(self) -> torch.Tensor | None:
        if not self.packed:
            return None
        draw = torch.rand(self.batch, generator=torch.Generator().manual_seed(0))
        lengths = (1 + (draw.log() / math.log(1 - 1 / 4.35)).floor()).clamp(max=self.length).long()
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).cuda()

    def leading(self) -> tuple[int, int]:
        offsets = self.offsets()
        return (self.batch, self.length) if offsets is None else (1, int(offsets[-1]))


PACKED = Shape(1024, 20, packed=True)
SHAPES = {
    "ssd": [Shape(1024, 20), Shape(1024, 50), Shape(256, 200), Shape(64, 1024), Shape(8, 4096), PACKED],
    "causal_conv1d": [Shape(1024, 20), Shape(1024, 50), Shape(256, 200), PACKED],
    "gated_rms_norm": [Shape(1024, 20)],
    "ssd_block": [Shape(1024, 20), Shape(1024, 50), Shape(256, 200), Shape(64, 1024), PACKED],
}
CROSSINGS = {
    "ssd": [Shape(1, 20), Shape(32, 20), Shape(1, 200), Shape(32, 200), Shape(2, 2048)],
    "causal_conv1d": [Shape(1, 20), Shape(32, 20), Shape(1, 200)],
    "gated_rms_norm": [Shape(1, 20), Shape(32, 20)],
    "ssd_block": [Shape(1, 20), Shape(32, 20), Shape(1, 200), Shape(32, 200)],
}
"""Where the torch backend, too, might be the fastest: batches that do not fill a GPU."""


def shapes_of(operation: str, peer: str) -> list[Shape]:
    """Where a peer is timed."""
    return SHAPES[operation] + (CROSSINGS[operation] if peer == "torch" else [])


def inputs_of(operation: str, shape: Shape, dtype: torch.dtype) -> Tensors:
    """The same numbers in every process."""
    generator = torch.Generator("cuda").manual_seed(0)
    batch, length = shape.leading()

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", generator=generator)

    if operation == "ssd":
        return {
            "x": normal(batch, length, H, P).to(dtype),
            "dt": normal(batch, length, H).to(dtype),
            "A": -torch.rand(H, device="cuda", generator=generator) * 15 - 1,
            "B": normal(batch, length, H, N).to(dtype),
            "C": normal(batch, length, H, N).to(dtype),
            "D": normal(H),
            "dt_bias": normal(H) - 3,
        }
    if operation == "causal_conv1d":
        channels = E + 2 * GN
        return {
            "x_BLC": normal(batch, length, channels).to(dtype),
            "weight_CK": normal(channels, K),
            "bias": normal(channels),
        }
    if operation == "gated_rms_norm":
        return {"y": normal(batch, length, E).to(dtype), "z": normal(batch, length, E).to(dtype), "weight": normal(E)}
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


def first(tensors: Tensors, shape: Shape) -> tuple[Tensors, dict[str, Any], int]:
    """The sequences that are compared, the options that describe them, and how many rows or places they are."""
    offsets, leading = shape.offsets(), shape.leading()
    if offsets is None:
        count, options = min(CHECKED, shape.batch), {}
        return {k: t[:count] if t.shape[:2] == leading else t for k, t in tensors.items()}, options, count
    count = int(offsets[CHECKED_PACKED])
    options = {"cu_seqlens": offsets[: CHECKED_PACKED + 1]}
    return {k: t[:, :count] if t.shape[:2] == leading else t for k, t in tensors.items()}, options, count


def outcome(
    function: Callable[..., torch.Tensor], tensors: Tensors, cotangent: torch.Tensor | None, **options: Any
) -> Tensors:
    """Output and, with a cotangent, every gradient."""
    if cotangent is None:
        return {"y": function(**tensors, **options).detach()}
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
    y = function(**leaves, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), cotangent.to(y.dtype))
    return {"y": y.detach(), **{f"d_{k}": g for k, g in zip(leaves, grads, strict=True)}}


def cotangent_of(y_shape: tuple[int, ...], shape: Shape, count: int) -> torch.Tensor:
    """Zero behind the sequences that are compared, so that the gradients of the parameters are theirs alone."""
    whole = torch.randn(y_shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    whole[(slice(None), slice(count, None)) if shape.packed else slice(count, None)] = 0
    return whole


def y_shape(operation: str, shape: Shape) -> tuple[int, ...]:
    wide = {"ssd": (H, P), "causal_conv1d": (E + 2 * GN,)}.get(operation, (E,))
    return (*shape.leading(), *wide)


def truth(folder: Path, form: Form, shape: Shape, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """What the recurrence gives in float64 and in the dtype itself, for the sequences that are compared."""
    known = "-".join(form.without) or "all"
    path = folder / f"{form.operation}-{shape.batch}-{shape.length}-{shape.packed}-{str(dtype)[6:]}-{known}.pt"
    if not path.exists():
        tensors = {k: t for k, t in inputs_of(form.operation, shape, dtype).items() if k not in form.without}
        few, options, count = first(tensors, shape)
        cotangent = cotangent_of(y_shape(form.operation, shape), shape, count)
        cotangent = cotangent[:, :count] if shape.packed else cotangent[:count]
        function, fixed = REFERENCES[form.operation]
        options |= fixed | {"backend": "reference"}
        exact = outcome(function, {k: t.double() for k, t in few.items()}, cotangent, **options)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save((exact, outcome(function, few, cotangent, **options)), partial)
        partial.rename(path)
    return torch.load(path)


def wrong(
    folder: Path, form: Form, function: Callable[..., torch.Tensor], shape: Shape, mode: str, directions: list[str]
) -> str:
    """What a form gets wrong in the batch that is timed; empty if nothing."""
    dtype, precision, floor = MODES[mode]
    torch.set_float32_matmul_precision("highest")
    exact, yardstick = truth(folder, form, shape, dtype)
    torch.set_float32_matmul_precision(precision)
    tensors = {k: t for k, t in inputs_of(form.operation, shape, dtype).items() if k not in form.without}
    _, _, count = first(tensors, shape)
    cotangent = cotangent_of(y_shape(form.operation, shape), shape, count) if BACKWARD in directions else None
    got = outcome(function, tensors, cotangent, **options_of(shape))
    leading = shape.leading()
    few = {k: (t[:, :count] if shape.packed else t[:count]) if t.shape[:2] == leading else t for k, t in got.items()}
    return "; ".join(disagreement(few, {k: exact[k] for k in few}, yardstick, floor))


def options_of(shape: Shape) -> dict[str, Any]:
    return {"cu_seqlens": shape.offsets(), "max_length": shape.length} if shape.packed else {}


def replays(step: Callable[[], object], count: int) -> list[float]:
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
    for _ in range(3):
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


def calls(step: Callable[[], object], count: int) -> tuple[float, float]:
    """Medians in microseconds of ordinary calls, the device idle before each: until it is done, and of the host."""
    whole, host = [], []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        host.append(1e6 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        whole.append(1e6 * (time.perf_counter() - start))
    return statistics.median(whole), statistics.median(host)


def timed(
    form: Form, function: Callable[..., torch.Tensor], shape: Shape, mode: str, directions: list[str]
) -> Iterator[dict[str, Any]]:
    """A row a direction."""
    tensors = {k: t for k, t in inputs_of(form.operation, shape, MODES[mode][0]).items() if k not in form.without}
    leaves, options = {k: t.detach().requires_grad_() for k, t in tensors.items()}, options_of(shape)
    with torch.no_grad():
        y = function(**leaves, **options)
    cotangent = torch.randn_like(y)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    result = y.numel() * y.element_size()

    def forward() -> None:
        with torch.no_grad():
            function(**leaves, **options)

    def both() -> None:
        torch.autograd.grad(function(**leaves, **options), list(leaves.values()), cotangent)

    for direction, step, moved in ((FORWARD, forward, size + result), (BACKWARD, both, 3 * size + 2 * result)):
        if direction not in directions:
            continue
        for _ in range(2):
            step()
        call, host = calls(step, 3)
        call, host = calls(step, max(5, min(11, int(1e5 / call))))
        row = {"direction": direction, "call_us": round(call, 1), "host_us": round(host, 1)}
        if bandwidth := BYTES_PER_MICROSECOND.get(torch.cuda.get_device_name()):
            row["floor_us"] = round(moved / bandwidth, 1)
        try:
            times = replays(step, max(5, min(25, int(1e5 / call))))
            for name, part in (("us", 2), ("us_20", 5)):
                row[name] = round(times[len(times) // part], 1)
            row["us_80"] = round(times[len(times) * 4 // 5], 1)
        except RuntimeError as error:
            torch.cuda.synchronize()
            row["not_recorded"] = str(error).splitlines()[0][:200]
        yield row


def takes(form: Form, shape: Shape) -> bool:
    """Whether a form knows sequences of that length and kind."""
    return form.lengths(shape.length) and shape.packed <= form.packed


def worker(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one peer, ours beside it."""
    end = time.monotonic() + options.seconds
    for operation in options.operation or list(SHAPES):
        # While compiling, ours are other processes' work.
        peers = (options.peer,) if options.check_only else (options.peer, "triton")
        mine = [form for form in forms() if form.operation == operation and form.peer in peers]
        if all(form.peer == "triton" for form in mine) and options.peer != "triton":
            continue
        built = {}
        for form in reversed(mine):
            try:
                built[form.name] = form.build()
            except Missing as error:
                yield {"operation": operation, "form": form.name, "peer": options.peer, "error": f"missing: {error}"}
        if options.peer != "triton" and set(built) <= {"triton"}:
            continue
        for number, shape in enumerate(shapes_of(operation, options.peer)):
            if options.shape and number not in options.shape:
                continue
            for mode in options.products or list(MODES):
                if mode == "tf32x3" and options.peer not in ("triton", "torch"):
                    continue  # others take single TF32 products, whatever is asked for
                here = [form for form in mine if form.name in built and takes(form, shape)]
                if all(form.peer != options.peer for form in here):
                    continue
                for form in here:
                    if time.monotonic() > end:
                        return
                    yield from _rows(options, form, built[form.name], shape, mode)


def _rows(
    options: argparse.Namespace, form: Form, function: Callable[..., torch.Tensor], shape: Shape, mode: str
) -> Iterator[dict[str, Any]]:
    row = {"operation": form.operation, "form": form.name, "peer": options.peer}
    row |= {"batch": shape.batch, "length": shape.length, "packed": shape.packed, "places": math.prod(shape.leading())}
    row |= {"dtype": str(MODES[mode][0])[6:], "products": mode}
    for directions in ([FORWARD, BACKWARD], [FORWARD]):
        try:
            bad = wrong(options.truths, form, function, shape, mode, directions)
            if bad:
                yield {**row, "error": bad}
            elif not options.check_only:
                for more in timed(form, function, shape, mode, directions):
                    yield row | more
            break
        except Exception as error:  # another project's kernels may fail in any way; the row says how
            said = (str(error) or type(error).__name__).splitlines()[0][:300]
            yield {**row, "direction": directions[-1], "error": said}
            torch.cuda.empty_cache()
    torch.cuda.empty_cache()


def spawn(options: argparse.Namespace, peer: str, *more: str) -> str:
    """One worker, ended after --limit seconds; what it printed."""
    command = [sys.executable, __file__, "--out", str(options.out), "--peer", peer, "--truths", str(options.truths)]
    command += ["--commit", options.commit, "--seconds", str(options.seconds), *more]
    for name in ("operation", "products", "shape"):
        if f"--{name}" not in more:
            command += [part for value in getattr(options, name) or [] for part in (f"--{name}", str(value))]
    begin = time.perf_counter()
    environment = os.environ | {"TRITON_CACHE_AUTOTUNING": "0" if "--check-only" in more else "1"}
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=options.limit, env=environment
        )
        said = done.stdout if done.returncode == 0 else f"{done.stdout[-2000:]}\nexit status {done.returncode}\n"
    except subprocess.TimeoutExpired as error:
        said = f"{(error.stdout or b'').decode()[-2000:]}\nended after {options.limit} s\n"
    return f"{said}{peer} {' '.join(more)}: {time.perf_counter() - begin:.1f} s"


def warm(options: argparse.Namespace) -> None:
    """Compiles and checks ours and torch's compiled forms, several at a time, before anything is timed.

    The recurrence's results, which every check needs, are there afterwards too.
    """
    tasks = []
    for form in forms():
        if form.peer not in options.peers or form.peer not in ("triton", "torch.compile"):
            continue
        if options.operation and form.operation not in options.operation:
            continue
        for mode in options.products or list(MODES):
            common = ("--check-only", "--operation", form.operation, "--products", mode)
            if form.peer == "triton":
                tasks.append((form.peer, *common))
            elif mode != "tf32x3":
                tasks += [(form.peer, *common, "--shape", number) for number in fitting(options, form)]
    begin = time.perf_counter()
    with ThreadPoolExecutor(options.warm) as pool:
        for said in pool.map(lambda task: spawn(options, *task), tasks):
            print(said, flush=True)
    print(f"warm after {time.perf_counter() - begin:.1f} s", flush=True)


def fitting(options: argparse.Namespace, form: Form) -> list[str]:
    """Numbers of the shapes that a form is asked for and can take."""
    shapes = enumerate(SHAPES[form.operation])
    fit = [number for number, shape in shapes if takes(form, shape)]
    return [str(number) for number in fit if not options.shape or number in options.shape]


def turns(options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """A process each: a peer, and of what torch compiles, which keeps what it compiled before, an operation's shape."""
    compiled = {form.operation: form for form in forms() if form.peer == "torch.compile"}
    for peer in options.peers:
        if peer != "torch.compile":
            yield (peer,)
            continue
        for operation in options.operation or list(compiled):
            if operation in compiled:
                numbers = fitting(options, compiled[operation])
                yield from ((peer, "--operation", operation, "--shape", number) for number in numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(dict.fromkeys(form.peer for form in forms()))
    parser.add_argument("--out", type=Path, required=True, help="jsonl file, appended to")
    parser.add_argument("--operation", action="append", choices=list(SHAPES), help="only these")
    parser.add_argument("--products", action="append", choices=list(MODES), help="only these")
    parser.add_argument("--peers", default=",".join(known), help=f"only these, in this order: {', '.join(known)}")
    parser.add_argument("--warm", type=int, default=0, help="compile first, with so many processes at a time")
    parser.add_argument("--warm-only", action="store_true", help="and time nothing")
    parser.add_argument("--limit", type=int, default=900, help="seconds after which a peer's process is ended")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no new row after so long in a peer's turn")
    parser.add_argument("--commit", help="recorded; asked of git if absent")
    parser.add_argument("--truths", type=Path, help="where the recurrence's results are kept; a new folder if absent")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--shape", action="append", type=int, help="only these of an operation's shapes, from 0")
    parser.add_argument("--check-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    if not options.commit:
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        options.commit = asked.stdout.strip() or "unknown"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.peer:
        about = {
            "commit": options.commit,
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        torch.zeros(1, device="cuda")
        with options.out.open("a") as file:
            if not options.check_only:
                fcntl.flock(file, fcntl.LOCK_EX)  # one process times at a time; the next may start meanwhile
            for row in worker(options):
                file.write(json.dumps(row | about) + "\n")
                file.flush()
                print(json.dumps(row), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.truths = options.truths or Path(folder)
        options.truths.mkdir(parents=True, exist_ok=True)
        options.peers = options.peers.split(",")
        if options.warm:
            warm(options)
        if options.warm_only:
            return
        with ThreadPoolExecutor(2) as pool:  # one times, the next one starts meanwhile
            for said in pool.map(lambda turn: spawn(options, *turn), turns(options)):
                print(said, flush=True)


if __name__ == "__main__":
    main()
