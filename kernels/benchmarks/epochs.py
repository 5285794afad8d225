"""Whole epochs at the published data sets' sizes, on synthetic interactions, with data delivery and evaluation.

    python kernels/benchmarks/epochs.py [--out FILE]

`scientific`: 8,442 users, 4,385 items, 59,427 interactions, 23 epochs of fine-tuning as published (8 x 1024) with
validation after each and one test. `pretrain`: 1,361,408 users, 446,975 items, 14 million interactions, in-batch loss,
two layers; the first micro-batches of an epoch are timed and the epoch follows from their number.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from step import interactions, settings

from mmm4rec_cli.evaluation.evaluate import Ranking, rank_split
from mmm4rec_cli.models.mmm4rec import MMM4Rec
from mmm4rec_cli.settings import Settings
from mmm4rec_cli.training.loop import Task, Trainer, epoch_targets


def built(items: int, config: Settings) -> MMM4Rec:
    torch.manual_seed(0)
    features = [torch.randn(items + 1, 768, device="cuda") * 0.04 for _ in range(2)]
    return MMM4Rec(config.model, *features).cuda()


def scientific() -> dict[str, object]:
    config = settings(accumulation=8)
    sequences, _ = interactions(8442, 4385, 59_427, full=False)
    split = sequences.split("leave_one_out").to(torch.device("cuda"))
    sequences = sequences.to(torch.device("cuda"))
    seconds = []
    for _ in range(2):  # the second time with every kernel compiled
        begin = time.perf_counter()
        model = built(4385, config)
        task = Task("finetune", config.finetune, targets=split.train, in_batch=False)
        trainer = Trainer(model, sequences, task, max_len=20, runtime=config.runtime, say=print)
        ranking = Ranking(batch_size=config.evaluate.batch_size, precision="tf32")
        for epoch in range(1, 24):
            model.train()
            total = torch.zeros((), dtype=torch.float64, device="cuda")
            for group in trainer.groups(epoch_targets(sequences, task, 0, epoch)):
                total += trainer.step(group)
            ranked = rank_split(model, sequences, split.valid, "valid", 20, ranking)
        rank_split(model, sequences, split.test, "test", 20, ranking)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    mrr = float((1 / (ranked.rank0_U + 1)).mean())
    return {"what": "scientific, 23 epochs", "cold_s": seconds[0], "seconds": seconds[1], "valid_mrr": mrr}


def pretraining(micro_batches: int = 400) -> dict[str, object]:
    config = Settings.model_validate({"protocol": "published", "model": {"time": "published", "num_layers": 2}})
    sequences, _ = interactions(1_361_408, 446_975, 14_029_229, full=False)
    sequences = sequences.to(torch.device("cuda"))
    targets = sequences.all_targets()
    model = built(446_975, config).train()
    task = Task("pretrain", config.pretrain, targets=targets, in_batch=True)
    trainer = Trainer(model, sequences, task, max_len=20, runtime=config.runtime, say=print)
    begin = time.perf_counter()
    order = epoch_targets(sequences, task, 0, 1)
    ordering = time.perf_counter() - begin
    for part in (slice(0, 100 * 1024), slice(100 * 1024, (100 + micro_batches) * 1024)):
        groups = list(trainer.groups(order[part]))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for group in groups:
            trainer.step(group)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    each = seconds / micro_batches
    return {
        "what": "pre-training, a micro-batch of 1024 with its share of the step",
        "ms": 1000 * each,
        "samples_s": 1024 / each,
        "epoch_s_from_these": ordering + each * len(targets) / 1024,
        "targets": len(targets),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    for measure in (scientific, pretraining):
        row = {**measure(), "device": torch.cuda.get_device_name(), "torch": torch.__version__}
        print(json.dumps(row), flush=True)
        if out:
            with out.open("a") as stream:
                stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
