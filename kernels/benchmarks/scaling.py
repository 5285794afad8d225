"""Several GPUs of one host: the same losses as one, and how much faster.

    torchrun --standalone --nproc-per-node N kernels/benchmarks/scaling.py [--out FILE]

Equality: global batch 1024, dropout 0, the losses of 50 steps. Scaling, at 1024 targets a GPU and step group of 8:
pre-training at the published mix's size (in-batch negatives of the whole batch) and fine-tuning at office size; share
of time in communication is one minus the time of the same work without adding gradients up.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from step import interactions, settings

from mmm4rec_cli.data.sequences import Sequences
from mmm4rec_cli.device import resolve_device
from mmm4rec_cli.models.mmm4rec import MMM4Rec
from mmm4rec_cli.settings import Settings
from mmm4rec_cli.training.loop import Task, Trainer, epoch_targets
from mmm4rec_cli.world import World, join, leave


class Silent(World):
    """The same shares, and no communication."""

    def add_up(self, tensor: torch.Tensor) -> None:
        """Leave it as it is."""


def trainer(
    items: int,
    config: Settings,
    sequences: Sequences,
    targets: torch.Tensor,
    in_batch: bool,
    batch: int,
    world: World,
) -> Trainer:
    torch.manual_seed(0)
    features = [torch.randn(items + 1, 768, device="cuda") * 0.04 for _ in range(2)]
    model = MMM4Rec(config.model, *features).cuda().train()
    plan = (config.pretrain if in_batch else config.finetune).model_copy(update={"batch_size": batch})
    task = Task("pretrain" if in_batch else "finetune", plan, targets=targets, in_batch=in_batch)
    return Trainer(model, sequences, task, max_len=20, runtime=config.runtime, world=world, say=print)


def equality(world: World, in_batch: bool) -> list[float]:
    """Losses of 50 steps of one micro-batch of 1024, the sum over all processes."""
    config = settings(0.0, accumulation=1)
    config = config.model_copy(
        update={
            "runtime": config.runtime.model_copy(update={"precision": "fp32"}),
            "pretrain": config.pretrain.model_copy(update={"accumulation": 1}),
        }
    )
    device = torch.device("cuda", torch.cuda.current_device())
    sequences, targets = interactions(8442, 4385, 59_427, full=False)
    sequences, targets = sequences.to(device), targets.to(device)
    made = trainer(4385, config, sequences, targets, in_batch, 1024, world)
    losses = []
    while len(losses) < 50:
        for group in made.groups(epoch_targets(sequences, made.task, 0, len(losses))):
            size = torch.tensor(float(len(group[0].positions_B)), device=device)
            loss = made.step(group)
            world.add_up(loss)
            world.add_up(size)
            losses.append(float(loss / size))
    return losses[:50]


def speed(world: World, name: str, users: int, items: int, total: int, in_batch: bool, groups: int) -> dict:
    layers = {"num_layers": 2 if in_batch else 1, "time": "published"}
    config = Settings.model_validate({"protocol": "published", "model": layers})
    device = torch.device("cuda", torch.cuda.current_device())
    sequences, targets = interactions(users, items, total, full=False)
    sequences = sequences.to(device)
    targets = sequences.all_targets() if in_batch else targets.to(device)
    made = trainer(items, config, sequences, targets, in_batch, 1024 * world.size, world)
    order = epoch_targets(sequences, made.task, 0, 1)
    size = 8 * 1024 * world.size
    timed = {}
    for kind, how in (("warm", world), ("silent", Silent(world.rank, world.size)), ("whole", world)):
        made.world = how
        made.gradients.world = how
        some = list(made.groups(order[: size * groups]))
        torch.cuda.synchronize()
        world.gathered(None)
        begin = time.perf_counter()
        for group in some:
            made.step(group)
        torch.cuda.synchronize()
        world.gathered(None)
        timed[kind] = time.perf_counter() - begin
    return {
        "what": name,
        "gpus": world.size,
        "samples_s": len(order[: size * groups]) / timed["whole"],
        "communication_share": 1 - timed["silent"] / timed["whole"],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    device = resolve_device("cuda")
    torch.cuda.set_device(device)
    world = join(device)
    rows: list[dict] = []
    for in_batch in (False, True):
        losses = equality(world, in_batch)
        rows.append({"what": f"losses, in_batch={in_batch}", "gpus": world.size, "losses": losses})
    rows.append(speed(world, "finetune, office size", 87_346, 25_986, 684_837, False, 8))
    torch.cuda.reset_peak_memory_stats()
    rows.append(speed(world, "pretrain, mix size", 1_361_408, 446_975, 14_029_229, True, 20))
    if world.first:
        for row in rows:
            shown = {**row, "losses": row["losses"][::10]} if "losses" in row else row
            print(json.dumps(shown), flush=True)
        if out:
            with out.open("a") as stream:
                stream.write("".join(json.dumps(row) + "\n" for row in rows))
    leave()


if __name__ == "__main__":
    main()
