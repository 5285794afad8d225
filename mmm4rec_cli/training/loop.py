"""The training loop: epochs over targets, gradients accumulated, best weights kept, early stopping, resume.

Pre-training and fine-tuning differ only in the `Task` they pass in.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tensorboardX import SummaryWriter
from torch import Tensor

from mmm4rec_cli.data.sequences import Sequences
from mmm4rec_cli.device import precision
from mmm4rec_cli.errors import RunError
from mmm4rec_cli.files import written_whole
from mmm4rec_cli.models.interface import SequenceModel
from mmm4rec_cli.reporter import Reporter
from mmm4rec_cli.runs import Run, save_weights
from mmm4rec_cli.settings.schema import Optimisation
from mmm4rec_cli.training.state import Progress, load_state, save_state


@dataclass(frozen=True)
class Task:
    """What is trained on what, and how an epoch is judged."""

    name: str
    optimisation: Optimisation
    targets: Tensor
    """Flat positions of the training targets."""
    in_batch: bool
    """In-batch loss instead of the whole catalogue."""
    validate: Callable[[], dict[str, float]] | None = None
    """Metrics after an epoch, or None: no validation, the last weights are the result."""
    metric: str = ""
    """Which of them chooses the epoch."""
    patience: int = 0
    """Epochs below the best until training stops."""
    save_every: int = 0
    """Keep a copy of the weights every so many epochs (0: never)."""


def nadam(model: SequenceModel, optimisation: Optimisation) -> torch.optim.Optimizer:
    """NAdam over all parameters with coupled weight decay (spec 5; the published marks against decay are ignored)."""
    return torch.optim.NAdam(
        model.parameters(),
        lr=optimisation.lr,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=optimisation.weight_decay,
        momentum_decay=optimisation.momentum_decay,
    )


def train_epoch(
    model: SequenceModel,
    sequences: Sequences,
    task: Task,
    optimizer: torch.optim.Optimizer,
    max_len: int,
    number_format: str,
    advance: Callable[[int], None],
) -> float:
    """One pass over the targets in a random order; the mean loss of a target.

    A step follows every `accumulation` micro-batches and the last one of the epoch, so the last group is smaller.
    The group's loss is the mean over its targets, or, with `mean_over_group` off, the sum of the micro-batches' means
    (published behaviour Q9).

    Raises:
        RunError: the loss of a group is not finite (with `stop_on_nonfinite`); its step is not taken.
    """
    plan = task.optimisation
    device = task.targets.device
    model.train()
    order = torch.randperm(len(task.targets)).to(device)
    micro_batches = torch.split(task.targets[order], plan.batch_size)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for begin in range(0, len(micro_batches), plan.accumulation):
        group = micro_batches[begin : begin + plan.accumulation]
        size = sum(map(len, group))
        group_loss = torch.zeros((), dtype=torch.float64, device=device)
        optimizer.zero_grad(set_to_none=True)
        for positions in group:
            windows = sequences.windows(positions, max_len, with_target_time=model.reads_target_time)
            with precision(number_format, device):
                loss = model.training_loss(windows, in_batch=task.in_batch)
            group_loss += loss.detach().double() * len(positions)
            (loss * (len(positions) / size) if plan.mean_over_group else loss).backward()  # type: ignore[no-untyped-call]
        if plan.stop_on_nonfinite and not math.isfinite(group_loss.item()):
            raise RunError(
                f"the loss became {group_loss.item()} in {task.name}; the step was not taken",
                hint=f"lower {task.name}.lr ({plan.lr:g}), or look at the features for extreme values",
            )
        optimizer.step()
        total += group_loss
        advance(size)
    return float(total / len(task.targets))


def fit(
    model: SequenceModel,
    sequences: Sequences,
    task: Task,
    run: Run,
    *,
    max_len: int,
    number_format: str,
    reporter: Reporter,
) -> Progress:
    """Train until the epochs are over or patience ends; best weights go to the run's `model.safetensors`.

    Best means: score at least the best so far (a tie moves to the later epoch). Patience counts epochs strictly below
    the best in a row. After every epoch everything is saved in `state/`; a run with a state goes on from there and
    ends as an uninterrupted one would (bit for bit on the CPU).

    Returns:
        where training stood at the end; `model` holds the last weights, not the best.
    """
    plan = task.optimisation
    optimizer = nadam(model, plan)
    state_file = run.path / "state" / "training.safetensors"
    progress = Progress()
    if state_file.is_file():
        progress = load_state(state_file, model, optimizer)
        reporter.note(f"going on after epoch {progress.epoch} of run {run.id}")
    _rewrite_metrics(run, progress)
    with SummaryWriter(str(run.path)) as board:
        while progress.epoch < plan.epochs and not progress.done:
            epoch = progress.epoch + 1
            start = time.perf_counter()
            with reporter.stage(f"epoch {epoch}/{plan.epochs}", len(task.targets), "targets") as stage:
                try:
                    loss = train_epoch(model, sequences, task, optimizer, max_len, number_format, stage.advance)
                except RunError:
                    state_file.unlink(missing_ok=True)  # a diverged run is not gone on with
                    raise
                row = {"epoch": epoch, "loss": loss, "lr": optimizer.param_groups[0]["lr"]}
                row["train_seconds"] = time.perf_counter() - start
                scores = task.validate() if task.validate else {}
                stage.advance(0, _status(loss, scores, task.metric))
            for group in optimizer.param_groups:
                group["lr"] *= plan.lr_decay
            row |= {"seconds": time.perf_counter() - start, "valid": scores}
            _judge(progress, task, epoch, scores)
            progress.epoch = epoch
            progress.seconds += row["seconds"]
            progress.history.append(row)
            if progress.best_epoch == epoch:
                save_weights(run.weights, model.state_dict())
            if task.save_every and epoch % task.save_every == 0:
                save_weights(run.path / "checkpoints" / f"epoch-{epoch:03d}.safetensors", model.state_dict())
            save_state(state_file, model, optimizer, progress)
            _append_metrics(run, row)
            _draw(board, row)
    return progress


def _judge(progress: Progress, task: Task, epoch: int, scores: dict[str, float]) -> None:
    if task.validate is None:
        progress.best_epoch = epoch
        return
    score = scores[task.metric]
    if score >= progress.best_score:
        progress.best_epoch, progress.best_score, progress.bad_epochs = epoch, score, 0
    else:
        progress.bad_epochs += 1
        progress.done = progress.bad_epochs >= task.patience


def _status(loss: float, scores: dict[str, float], metric: str) -> str:
    names = [name for name in dict.fromkeys([metric, "Hit@10", "NDCG@10"]) if name in scores]
    return "  ".join([f"loss {loss:.4f}", *(f"{name} {scores[name]:.4f}" for name in names)])


def _rewrite_metrics(run: Run, progress: Progress) -> None:
    """An epoch that was logged but not saved is trained again: keep only the saved rows."""
    with written_whole(run.path / "metrics.jsonl") as part:
        part.write_text("".join(json.dumps(row) + "\n" for row in progress.history), encoding="utf-8")


def _append_metrics(run: Run, row: dict[str, object]) -> None:
    with Path(run.path / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def _draw(board: SummaryWriter, row: dict[str, object]) -> None:
    board.add_scalar("train/loss", row["loss"], row["epoch"])
    board.add_scalar("train/seconds", row["train_seconds"], row["epoch"])
    for name, value in dict(row["valid"]).items():  # type: ignore[call-overload]
        board.add_scalar(f"valid/{name}", value, row["epoch"])
