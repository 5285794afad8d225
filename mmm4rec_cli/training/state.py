"""Everything an interrupted training needs to go on as if nothing had happened: one file, written whole."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmm4rec_cli.errors import RunError
from mmm4rec_cli.runs import save_weights

if TYPE_CHECKING:
    from mmm4rec_cli.training.loop import Trainer


@dataclass
class Progress:
    """Where the training stands."""

    epoch: int = 0
    """Whole epochs."""
    targets_done: int = 0
    """Targets of the next epoch whose steps were taken."""
    loss_sum: float = 0.0
    """Their losses, those of this process."""
    order_seed: int = 0
    """What the order of the targets of every epoch follows from."""
    best_epoch: int = 0
    best_score: float = float("-inf")
    bad_epochs: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row an epoch, as in metrics.jsonl."""
    done: bool = False


def save_state(path: Path, trainer: "Trainer", progress: Progress) -> None:
    """Write parameters, optimiser, random states of all processes and progress; the first process writes."""
    device, world = trainer.device, trainer.world
    random = {"random.cpu": torch.get_rng_state(), "random.draws": trainer.draws.get_state()}
    if device.type == "cuda":
        random["random.cuda"] = torch.cuda.get_rng_state(device)
    own = world.gathered((random, progress.loss_sum))
    if not world.first:
        return
    tensors = {f"{name}.{rank}": tensor for rank, (states, _) in enumerate(own) for name, tensor in states.items()}
    tensors["parameters"] = trainer.parameters.values.detach()
    for name, value in trainer.optimizer.state.items():
        tensors[f"optimizer.{name}"] = value
    if trainer.tables is not None:
        tensors |= {f"tables.{name}": table.detach() for name, table in trainer.tables.tables.items()}
        tensors |= {f"tables.{name}": tensor for name, tensor in trainer.tables.state.items()}
    if trainer.average is not None:
        tensors["average"] = trainer.average
    document = {**vars(progress), "best_score": None if progress.best_epoch == 0 else progress.best_score}
    document |= {
        "loss_sum": [loss for _, loss in own],
        "averaged_steps": trainer.averaged_steps,
        "layout": trainer.layout,
        "processes": world.size,
    }
    save_weights(path, tensors, {"progress": json.dumps(document)})


def load_state(path: Path, trainer: "Trainer") -> Progress:
    """Bring parameters, optimiser and random states back; return where training stood.

    Raises:
        RunError: the file is missing, damaged, of another model or of another number of processes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads(file.metadata()["progress"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        layout, processes = [tuple(each) for each in document.pop("layout")], document.pop("processes")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} cannot be resumed from: {error}", hint="train again without --resume") from None
    world, parameters, optimizer = trainer.world, trainer.parameters, trainer.optimizer
    if layout != trainer.layout:
        raise RunError(f"{path} belongs to another model", hint="resume with the run's own data and settings")
    if processes != world.size:
        raise RunError(
            f"{path} was written by {processes} processes, this training has {world.size}",
            hint=f"resume with torchrun --nproc-per-node {processes}, or train again without --resume",
        )
    with torch.no_grad():
        parameters.values.copy_(tensors["parameters"])
        if trainer.average is not None:
            trainer.average.copy_(tensors["average"])
    trainer.averaged_steps = document.pop("averaged_steps", 0)
    for name, tensor in optimizer.state.items():
        if f"optimizer.{name}" in tensors:  # before the first step earlier versions wrote none
            tensor.copy_(tensors[f"optimizer.{name}"])
    if trainer.tables is not None:
        for name, tensor in (trainer.tables.tables | trainer.tables.state).items():
            tensor.detach().copy_(tensors[f"tables.{name}"])
    trainer.draws.set_state(tensors[f"random.draws.{world.rank}"])
    torch.set_rng_state(tensors[f"random.cpu.{world.rank}"])
    if trainer.device.type == "cuda" and f"random.cuda.{world.rank}" in tensors:
        torch.cuda.set_rng_state(tensors[f"random.cuda.{world.rank}"], trainer.device)
    if document["best_score"] is None:
        document["best_score"] = float("-inf")
    document["loss_sum"] = document["loss_sum"][world.rank]
    return Progress(**document)
