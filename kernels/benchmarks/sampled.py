"""The sampled loss at sizes that the full one does not fit: memory and time of training steps, with data delivery.

    python kernels/benchmarks/sampled.py [--items 2000000] [--interactions 200000000] [--out FILE]

Users of 4 to 10 interactions (mean 7) with items drawn by popularity (the cube of a uniform number), paper sizes,
vectors 512 wide, with item bias, batch 1024 x 8, 4,096 drawn negatives. An epoch over so many users as 30 million
follows from the time of a micro-batch: over all their prefixes, and over one a user (`finetune.prefixes = 1`).
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from mmm4rec_cli.data.sequences import Sequences
from mmm4rec_cli.models.mmm4rec import MMM4Rec
from mmm4rec_cli.settings import Settings
from mmm4rec_cli.training.loop import Task, Trainer

USERS = 30_000_000


def made_up(interactions: int, items: int, device: torch.device) -> Sequences:
    generator = torch.Generator(device).manual_seed(0)
    counts_U = torch.randint(4, 11, (interactions // 7,), generator=generator, device=device)
    ends_U = counts_U.cumsum(0)
    total = int(ends_U[-1])
    item_N = (torch.rand(total, generator=generator, device=device).pow_(3) * items).int().clamp_(max=items - 1) + 1
    times_N = torch.arange(total, device=device) * 1000 + 1_400_000_000
    first_N = (ends_U - counts_U).repeat_interleave(counts_U)
    return Sequences(item_N, times_N, first_N, torch.cat([ends_U.new_zeros(1), ends_U]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", type=int, default=2_000_000)
    parser.add_argument("--interactions", type=int, default=200_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = torch.device(given.device)
    config = Settings.model_validate(
        {
            "model": {"time": "observed"},
            "finetune": {"loss": "sampled"},
            "runtime": {"cuda_graphs": not given.no_graphs},
        }
    )
    plan = config.finetune
    torch.manual_seed(0)
    sequences = made_up(given.interactions, given.items, device)
    features = torch.randn(given.items + 1, given.width, device=device) * 0.04
    model = MMM4Rec(config.model, features, features.clone()).to(device).train()
    group = plan.batch_size * plan.accumulation
    drawn = torch.randint(len(sequences.items_N), (2 * group * given.steps,), device=device)
    targets = drawn[drawn > sequences.first_N[drawn]][: group * given.steps]
    task = Task("finetune", plan, targets=targets, in_batch=False, negatives=plan.negatives)
    trainer = Trainer(model, sequences, task, max_len=config.model.max_len, runtime=config.runtime, say=print)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    took, losses = [], []
    for micro_batches in trainer.groups(targets):
        begin = time.perf_counter()
        losses.append(trainer.step(micro_batches).item() / group)  # waits for the step
        took.append(1000 * (time.perf_counter() - begin))
    a_step = statistics.median(took[3:] or took)
    a_user = (len(sequences.items_N) - len(sequences.counts_U)) / len(sequences.counts_U)
    row = {
        "what": "sampled loss",
        "items": given.items,
        "interactions": len(sequences.items_N),
        "negatives": plan.negatives,
        "graphs": config.runtime.cuda_graphs,
        "step_ms": a_step,
        "micro_batch_ms": a_step / plan.accumulation,
        "targets_per_second": 1000 * group / a_step,
        "loss": [losses[0], losses[-1]],
        "hours_an_epoch_30m_users_all_prefixes": USERS * a_user * a_step / group / 3_600_000,
        "hours_an_epoch_30m_users_one_prefix": USERS * a_step / group / 3_600_000,
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        row |= {
            "held_gib": before / 2**30,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "device": torch.cuda.get_device_name(),
        }
    print(json.dumps(row), flush=True)
    if given.out:
        with given.out.open("a") as stream:
            stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
