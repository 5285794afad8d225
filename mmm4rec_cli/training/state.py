"""Everything an interrupted training needs to go on as if nothing had happened: one file, written whole."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmm4rec_cli.errors import RunError
from mmm4rec_cli.models.interface import SequenceModel
from mmm4rec_cli.runs import save_weights


@dataclass
class Progress:
    """Where the training stands after a whole epoch."""

    epoch: int = 0
    best_epoch: int = 0
    best_score: float = float("-inf")
    bad_epochs: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row an epoch, as in metrics.jsonl."""
    done: bool = False


def save_state(path: Path, model: SequenceModel, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write model, optimiser, random states and progress."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    document = {**vars(progress), "best_score": None if progress.best_epoch == 0 else progress.best_score}
    document["lr"] = [group["lr"] for group in optimizer.param_groups]
    save_weights(path, tensors, {"progress": json.dumps(document)})


def load_state(path: Path, model: SequenceModel, optimizer: torch.optim.Optimizer) -> Progress:
    """Bring model, optimiser and random states back; return where training stood.

    Raises:
        RunError: the file is missing, damaged, or of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads(file.metadata()["progress"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} cannot be resumed from: {error}", hint="train again without --resume") from None
    weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    own = model.state_dict()
    if {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in own.items()}:
        raise RunError(f"{path} belongs to another model", hint="resume with the run's own data and settings")
    model.load_state_dict(weights)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    for group, lr in zip(groups, document.pop("lr"), strict=True):
        group["lr"] = lr
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    if document["best_score"] is None:
        document["best_score"] = float("-inf")
    return Progress(**document)
