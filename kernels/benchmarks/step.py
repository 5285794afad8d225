"""The training step at the published sizes: ours against the naive model, checked before it is timed.

    python kernels/benchmarks/step.py [--out FILE] [--cpu] [--profile] [--lengths full|scientific] [--items N ...]
        [--streams auto|torch|triton] [--precision tf32|fp32|bf16] [--ours] [--unchecked] [--all-places]

Both train the same synthetic interactions (batch 1024, hidden 256, one layer, text and image vectors 768 wide, TF32
products, dropout 0.4, NAdam after every micro-batch). `full`: every history fills the 20 places; `scientific`: 8,442
users with 5 interactions or more, 59,427 in all, whose window lengths are printed. Rows: milliseconds a step (of 40
behind each other, as in training), samples a second with data delivery included (an epoch through the trainer) and
those that delivery alone gives, peak memory.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import roofline
import torch
from naive_mmm4rec import NaiveMMM4Rec

from mmm4rec_cli.data.sequences import Sequences
from mmm4rec_cli.models import blocks, time_stream
from mmm4rec_cli.models.mmm4rec import MMM4Rec
from mmm4rec_cli.settings import Settings
from mmm4rec_cli.training.loop import Task, Trainer, epoch_targets
from mmm4rec_cli.training.step import windows_of
from mmm4rec_kernels import compiled_side_by_side


def interactions(users: int, items: int, total: int, full: bool, seed: int = 0) -> tuple[Sequences, torch.Tensor]:
    """Synthetic sequences with a long tail of items, and the training targets."""
    random = np.random.default_rng(seed)
    if full:
        counts = np.full(users, 60)
    else:
        counts = 5 + random.geometric(1 / (1 + total / users - 5), users) - 1
        while counts.sum() != total:
            change = np.sign(total - counts.sum())
            chosen = random.integers(users)
            counts[chosen] = max(5, counts[chosen] + change)
    popularity = 1 / np.arange(1, items + 1) ** 0.8
    item = 1 + random.choice(items, counts.sum(), p=popularity / popularity.sum())
    user = np.repeat(np.arange(users), counts)
    times = 1_400_000_000 + np.cumsum(random.integers(0, 5 * 86_400, counts.sum())) % 200_000_000
    sequences = Sequences.of(user.astype(np.int32), item.astype(np.int32), times.astype(np.int64), users)
    targets = sequences.split("leave_one_out").train
    if full:
        targets = targets[targets - sequences.first_N[targets] >= 20]
    return sequences, targets


def settings(dropout: float = 0.4, precision: str = "tf32", **finetune: object) -> Settings:
    """The published sizes, the published time."""
    drops = dict.fromkeys(("dropout", "embedding_dropout", "time_dropout"), dropout)
    return Settings.model_validate(
        {
            "protocol": "published",
            "model": {"time": "published", **drops},
            "finetune": {"accumulation": 1, **finetune},
            "runtime": {"precision": precision},
        }
    )


def models(config: Settings, items: int, device: torch.device) -> tuple[MMM4Rec, NaiveMMM4Rec]:
    """Ours and the naive one with the same weights."""
    torch.manual_seed(0)
    features = [torch.randn(items + 1, 768, device=device) * 0.04 for _ in range(2)]
    for table in features:
        table[0] = 0
    ours = MMM4Rec(config.model, *features).to(device)
    naive = NaiveMMM4Rec(SimpleNamespace(**dict(config.model)), *features).to(device)
    published = ours.published_state()
    naive.load_state_dict({k: v for k, v in published.items() if k in naive.state_dict()}, strict=False)
    return ours, naive


def check(device: torch.device, items: int, sequences: Sequences, targets: torch.Tensor) -> float:
    """Relative difference of the losses and of the worst gradient without dropout, IEEE float32."""
    torch.set_float32_matmul_precision("highest")
    config = settings(0.0)
    ours, naive = models(config, items, device)
    windows = sequences.windows(targets[:256], 20, with_target_time=True)
    rows = int(windows.lengths_B.sum())
    with compiled_side_by_side(device):
        loss = ours.training_loss(sequences.windows(targets[:256], 20, with_target_time=True, rows=rows))
        torch.autograd.grad(loss, list(ours.parameters()), allow_unused=True)
    loss = ours.training_loss(sequences.windows(targets[:256], 20, with_target_time=True, rows=rows))
    other = naive.loss(naive(windows.items_BT, windows.lengths_B, windows.timestamps_BT), windows.target_B)
    loss.backward()
    other.backward()
    named = dict(naive.named_parameters())
    worst = abs(loss.item() - other.item()) / other.item()
    assert worst < 1e-5, worst
    from mmm4rec_cli.models.published import published_name

    for name, p in ours.named_parameters():
        theirs = named.get(published_name(name))
        if theirs is not None:
            got, want = p.grad.flatten(), theirs.grad.flatten()
            error = float((got - want).norm() / want.norm().clamp(min=1e-12))
            if float(want.norm()) > 1e-6:
                assert error < 5e-3, (name, error)
                worst = max(worst, error)
    return worst


def timed(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Milliseconds of a call: the median over `repeats` runs of several calls, one behind the other as in training."""
    times, calls = [], 40 if device.type == "cuda" else 1
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / calls)
        else:
            begin = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--profile", action="store_true", help="the device time of each part, beside its floor")
    parser.add_argument("--lengths", nargs="+", default=["full", "scientific"], choices=["full", "scientific"])
    parser.add_argument("--items", nargs="+", type=int, help="catalogues (4385 and 25986; with --cpu 4385)")
    parser.add_argument("--streams", choices=["auto", "torch", "triton"], default="auto", help="of the time streams")
    parser.add_argument("--precision", choices=["tf32", "fp32", "bf16"], default="tf32", help="ours; naive has TF32")
    parser.add_argument("--all-places", action="store_true", help="also those of the last layer that nobody reads")
    parser.add_argument("--ours", action="store_true", help="time ours alone")
    parser.add_argument("--unchecked", action="store_true", help="with --ours: no comparison with the naive model")
    arguments = parser.parse_args()
    if arguments.unchecked and not arguments.ours:
        parser.error("--unchecked goes with --ours")
    for name in ("stream_stage", "spectral_filter"):
        setattr(time_stream, name, partial(getattr(time_stream, name), backend=arguments.streams))
    if arguments.all_places:
        blocks.tail_unfit = lambda *sizes: "not asked for"
    device = torch.device("cpu" if arguments.cpu else "cuda")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    common = {
        "commit": commit.stdout.strip() or None,
        "device": "cpu" if arguments.cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    catalogues = arguments.items or ([4385] if arguments.cpu else [4385, 25986])
    for items in catalogues:
        for kind in arguments.lengths:
            sequences, targets = interactions(8442, items, 59_427, kind == "full")
            lengths = sequences.lengths(targets, 20)
            histogram = dict(sorted(Counter(lengths.tolist()).items()))
            if items == catalogues[0]:
                print(kind, "window lengths", histogram, "mean", round(float(lengths.double().mean()), 2), flush=True)
            sequences, targets = sequences.to(device), targets.to(device)
            worst = None if arguments.unchecked else check(device, items, sequences, targets)
            torch.set_float32_matmul_precision("high")
            config = settings(precision=arguments.precision)
            ours, naive = models(config, items, device)
            rows = [] if arguments.ours else [time_naive(naive, sequences, targets, device)]
            del naive
            rows.append(time_ours(ours, sequences, targets, config, device, arguments.profile))
            for row in rows:
                row |= {"items": items, "lengths": kind, "worst_error": worst, "streams": arguments.streams, **common}
                row["all_places"] = arguments.all_places or row["form"] == "naive"
                row["histogram"] = histogram
                row["precision"] = "tf32" if row["form"] == "naive" else arguments.precision
                print(json.dumps(row), flush=True)
                if arguments.out:
                    with arguments.out.open("a") as stream:
                        stream.write(json.dumps(row) + "\n")
            print(f"ratio {rows[0]['step_ms'] / rows[-1]['step_ms']:.1f}", flush=True)


def time_naive(naive: NaiveMMM4Rec, sequences: Sequences, targets: torch.Tensor, device: torch.device) -> dict:
    optimizer = torch.optim.NAdam(naive.parameters(), lr=1e-4, weight_decay=0.005)
    naive.train()
    batch = 1024 if device.type == "cuda" else 64

    def step() -> None:
        chosen = targets[torch.randint(len(targets), (batch,), device=device)]
        windows = sequences.windows(chosen, 20, with_target_time=True)
        optimizer.zero_grad()
        naive.loss(naive(windows.items_BT, windows.lengths_B, windows.timestamps_BT), windows.target_B).backward()
        optimizer.step()

    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ms = timed(step, device, 5)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {"form": "naive", "batch": batch, "step_ms": ms, "samples_s": 1000 * batch / ms, "peak_gib": peak}


def time_ours(
    ours: MMM4Rec, sequences: Sequences, targets: torch.Tensor, config: Settings, device: torch.device, profile: bool
) -> dict:
    batch = 1024 if device.type == "cuda" else 64
    plan = config.finetune.model_copy(update={"batch_size": batch})
    task = Task("finetune", plan, targets=targets, in_batch=False)
    trainer = Trainer(ours, sequences, task, max_len=20, runtime=config.runtime, say=print)
    ours.train()
    steps = 40 if device.type == "cuda" else 5
    order = epoch_targets(sequences, task, 0, 1)[: batch * steps]
    groups = list(trainer.groups(order))
    begin = time.perf_counter()
    for group in groups:
        trainer.step(group)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    first = time.perf_counter() - begin
    chosen = itertools.cycle(groups)
    ms = timed(lambda: trainer.step(next(chosen)), device, 8 if device.type == "cuda" else len(groups))
    begin, passes = time.perf_counter(), 5 if device.type == "cuda" else 1
    for epoch in range(passes):
        some = epoch_targets(sequences, task, 0, epoch)[: batch * steps]
        for group in trainer.groups(some):
            trainer.step(group)
    if device.type == "cuda":
        torch.cuda.synchronize()
    rate = passes * batch * steps / (time.perf_counter() - begin)
    begin = time.perf_counter()
    for group in trainer.groups(order):
        for part in group:
            windows_of(sequences, part, 20, trainer.world, with_target_time=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    delivered = batch * steps / (time.perf_counter() - begin)
    row = {"form": "ours", "batch": batch, "step_ms": ms, "samples_s": rate, "delivered_s": delivered}
    row["first_epoch_s"] = first
    if device.type == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["graphs"] = sorted(map(list, trainer.gradients._recorded))
    if profile:
        table = roofline.lines(ours, trainer, groups[0][0], device)
        row["parts"] = table
        print(f"{'part':48} {'us':>8} {'kernels':>7} {'GFLOP':>7} {'MB':>7} {'floor us':>8} {'share':>6}")
        for line in table:
            share = "" if line["share"] is None else f"{line['share']:6.2f}"
            numbers = f"{line['us']:8.1f} {line['kernels']:7.0f} {line['gflop']:7.1f} {line['mb']:7.1f}"
            print(f"{line['part']:48} {numbers} {line['floor_us']:8.1f} {share}", flush=True)
    if profile and device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            for group in groups[:10]:
                trainer.step(group)
            torch.cuda.synchronize()
        events = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)
        row["device_ms"] = sum(e.self_device_time_total for e in events) / 10_000
        row["kernels"] = sum(e.count for e in events) / 10
        print(f"in the graph: device time a step {row['device_ms']:.3f} ms, {row['kernels']:.0f} kernels", flush=True)
        for event in events[:45]:
            print(
                f"{event.self_device_time_total / 10:8.1f} us {event.count / 10:6.1f} x {event.key[:110]}", flush=True
            )
    return row


if __name__ == "__main__":
    sys.exit(main())
