"""Seconds an epoch of fine-tuning takes on a CPU: ours against the naive model, on a preprocessed domain.

    python kernels/benchmarks/cpu_epoch.py --workspace FOLDER --domain NAME [--batches N] [--threads N] [--out FILE]

Published sizes, protocol and micro-batches of 1,024 (accumulation 8). First both train on the same windows without
dropout from the same weights, and their losses must agree to 1e-5. Then micro-batches are timed in turn, each form on
the same windows, with dropout; the epoch follows from the number of micro-batches and steps.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from naive_mmm4rec import NaiveMMM4Rec
from step import settings

from mmm4rec_cli.data.dataset import Dataset, load_dataset
from mmm4rec_cli.data.sequences import Windows
from mmm4rec_cli.models.mmm4rec import MMM4Rec
from mmm4rec_cli.workspace import Workspace


def models(dataset: Dataset, dropout: float) -> tuple[MMM4Rec, NaiveMMM4Rec]:
    """Ours and the naive one with the same weights."""
    torch.manual_seed(0)
    config = settings(dropout).model
    features = dataset.model_features("mean")
    ours = MMM4Rec(config, features.text, features.image).train()
    naive = NaiveMMM4Rec(SimpleNamespace(**dict(config)), features.text, features.image).train()
    published = ours.published_state()
    naive.load_state_dict({k: v for k, v in published.items() if k in naive.state_dict()}, strict=False)
    return ours, naive


def losses(ours: MMM4Rec, naive: NaiveMMM4Rec) -> list[tuple[torch.nn.Module, Callable[[Windows], torch.Tensor]]]:
    def of_naive(windows: Windows) -> torch.Tensor:
        user_BD = naive(windows.items_BT, windows.lengths_B, windows.timestamps_BT)
        return naive.loss(user_BD, windows.target_B)

    return [(naive, of_naive), (ours, ours.training_loss)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--domain", required=True)
    parser.add_argument("--encoder", help="name of the features (the only ones)")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    workspace = Workspace(arguments.workspace)
    encoder = arguments.encoder or next(workspace.features(arguments.domain, "any").parent.iterdir()).stem
    dataset = load_dataset(workspace, [arguments.domain], encoder)
    targets = dataset.sequences.split("leave_one_out").train
    order = targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]

    def windows(begin: int, size: int) -> Windows:
        chosen = order[begin : begin + size]
        rows = int(dataset.sequences.lengths(chosen, 20).sum())
        return dataset.sequences.windows(chosen, 20, with_target_time=True, rows=rows)

    seen = []
    for model, loss_of in losses(*models(dataset, 0.0)):
        optimizer = torch.optim.NAdam(model.parameters(), lr=1e-4, weight_decay=0.005)
        row = []
        for i in range(4):
            optimizer.zero_grad()
            loss = loss_of(windows(128 * i, 128))
            loss.backward()
            optimizer.step()
            row.append(loss.item())
        seen.append(row)
    worst = max(abs(a - b) / a for a, b in zip(*seen, strict=True))
    assert worst < 1e-5, seen
    forms = losses(*models(dataset, 0.4))
    batch = 1024
    times: dict[str, list[float]] = {"naive": [], "ours": []}
    busy: dict[str, list[float]] = {"naive": [], "ours": []}
    for i in range(arguments.batches):
        given = windows(4096 + batch * i, batch)
        for name, (model, loss_of) in zip(times, forms, strict=True):
            model.zero_grad(set_to_none=False)
            start, processor = time.perf_counter(), time.process_time()
            loss_of(given).backward()
            times[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - processor)
    count = -(-len(targets) // batch)
    rows = [
        {
            "what": f"CPU, {arguments.domain}, micro-batches of {batch}",
            "form": name,
            "targets": len(targets),
            "mean_length": round(float(dataset.sequences.lengths(targets, 20).double().mean()), 2),
            "seconds_a_batch": statistics.median(times[name]),
            "epoch_s_from_these": statistics.median(times[name]) * len(targets) / batch,
            "processor_s_a_batch": statistics.median(busy[name]),
            "micro_batches": count,
            "loss_difference": worst,
            "threads": arguments.threads,
            "torch": torch.__version__,
        }
        for name in times
    ]
    for row in rows:
        print(json.dumps(row), flush=True)
    ratios = [rows[0][key] / rows[1][key] for key in ("seconds_a_batch", "processor_s_a_batch")]
    print(f"ratio {ratios[0]:.2f}, of processor time {ratios[1]:.2f}")
    if arguments.out:
        with arguments.out.open("a") as stream:
            stream.write("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
