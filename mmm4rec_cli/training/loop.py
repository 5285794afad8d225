"""The training loop: epochs over targets, gradients accumulated, best weights kept, early stopping, resume.

Pre-training and fine-tuning differ only in the `Task` they pass in. Several processes share each micro-batch: every one
computes its part, the gradients are added up before a step, and all take the same step.
"""

import json
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tensorboardX import SummaryWriter
from torch import Tensor

from mmm4rec_cli.data.sequences import Sequences
from mmm4rec_cli.errors import RunError
from mmm4rec_cli.files import written_whole
from mmm4rec_cli.models.interface import SequenceModel
from mmm4rec_cli.reporter import Reporter
from mmm4rec_cli.runs import Run, save_weights
from mmm4rec_cli.settings.schema import Optimisation, RuntimeSettings
from mmm4rec_cli.training.delivery import Delivery
from mmm4rec_cli.training.interrupt import Interruption, kept_signals
from mmm4rec_cli.training.optimizer import FlatParameters, is_matrix, optimizer_of
from mmm4rec_cli.training.sampled import ItemTables, SampledGradients
from mmm4rec_cli.training.state import Progress, load_state, save_state
from mmm4rec_cli.training.step import Gradients, MicroBatch, ShardedGradients
from mmm4rec_cli.world import World

TABLE_COPIES = 8
"""Tensors as large as the item table that the full loss holds at once: both modalities' vectors, their normalised
forms, the table, and gradients."""


@dataclass(frozen=True)
class Task:
    """What is trained on what, and how an epoch is judged."""

    name: str
    optimisation: Optimisation
    targets: Tensor
    """Flat positions of the training targets, on the device of the sequences."""
    in_batch: bool
    """In-batch loss instead of the whole catalogue."""
    negatives: int = 0
    """Sampled loss with so many drawn items instead of the whole catalogue (0: no)."""
    validate: Callable[[], dict[str, float]] | None = None
    """Metrics after an epoch, or None: no validation, the last weights are the result."""
    metric: str = ""
    """Which of them chooses the epoch."""
    patience: int = 0
    """Epochs below the best until training stops."""
    save_every: int = 0
    """Keep a copy of the weights every so many epochs (0: never)."""
    frozen: Collection[str] = ()
    """Parameters that stay as they are for the first epochs."""
    frozen_epochs: int = 0
    """How many."""


def learning_rate(plan: Optimisation, epoch: int, share: float) -> float:
    """The learning rate where `share` (0 to 1) of the epoch after `epoch` whole ones is done.

    A function of the place alone, so that it need not be saved. The fall goes on from the start to the end of
    `epochs`, also during the warm-up, and is multiplied with it.
    """
    rate = plan.lr * plan.lr_decay**epoch
    done = epoch + share
    if done < plan.warmup:
        rate *= done / plan.warmup
    if plan.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * done / plan.epochs))
    elif plan.schedule == "linear":
        rate *= 1 - done / plan.epochs
    return rate


def epoch_targets(sequences: Sequences, task: Task, seed: int, epoch: int) -> Tensor:
    """The targets of an epoch in their order: a function of seed and epoch alone, so that it can be gone on with.

    With `prefixes = n` each user has up to n targets, drawn anew every epoch. Without `shuffle` they stand by user and
    time.
    """
    # An unseeded run has a 64-bit seed of its own; a generator takes no more than that.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    targets = task.targets
    order = torch.randperm(len(targets), generator=generator).to(targets.device)
    if task.optimisation.prefixes != "all":
        # The first n of each user in a random order of all, still in that order.
        users = sequences.users_of(targets[order])
        by_user = torch.argsort(users, stable=True)
        sorted_users = users[by_user]
        first = torch.searchsorted(sorted_users, sorted_users)
        among = torch.arange(len(order), device=order.device) - first
        order = order[by_user[among < task.optimisation.prefixes].sort().values]
    if not task.optimisation.shuffle:
        order = order.sort().values
    return targets[order]


class Trainer:
    """What an epoch needs: model, optimiser and gradients on one device.

    Args:
        model: on its device.
        sequences: on the device of the task's targets: the model's, or the CPU, whence windows are delivered.
        task: see `Task`.
        max_len: places of a window.
        runtime: number format, graphs.
        world: the processes that share the work.
        say: takes a line that is good to know.
    """

    def __init__(
        self,
        model: SequenceModel,
        sequences: Sequences,
        task: Task,
        *,
        max_len: int,
        runtime: RuntimeSettings,
        world: World | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model, self.sequences, self.task, self.max_len = model, sequences, task, max_len
        self.world = world or World()
        own = dict(model.named_parameters())
        tables = {name: own[name] for name in model.item_rows if name in own} if task.negatives else {}
        self.parameters = FlatParameters(model, apart=tables)
        self.device = self.parameters.values.device
        plan = task.optimisation
        self.decay: Tensor | None = None
        """Weight decay of each value, where it is not that of the optimiser."""
        if plan.decayed == "matrices" and plan.weight_decay:
            self.decay = self.parameters.marked(is_matrix) * plan.weight_decay
        self.optimizer = optimizer_of(self.parameters.values, plan, decays=self.decay is None)
        self.average: Tensor | None = self.parameters.values.detach().clone() if plan.average else None
        """Mean of the values over the steps."""
        self.averaged_steps = 0
        self.frozen: Tensor | None = None
        """Which values stay as they are, bool; set and unset by `fit`."""
        # The tables hold what is bound to single items, which `decayed = matrices` leaves alone.
        of_tables = plan if self.decay is None else plan.model_copy(update={"weight_decay": 0.0})
        self.tables = ItemTables(tables, of_tables) if tables else None
        self.draws = torch.Generator(self.device)
        """Draws the negatives, the same ones in every process; set by `fit` and saved with the state."""
        options: dict[str, Any] = {
            **{"max_len": max_len, "number_format": runtime.precision, "device": self.device, "world": self.world},
            **{"graphs": runtime.cuda_graphs, "say": say},
        }
        self.delivery: Delivery | None = None
        if sequences.items_N.device.type != self.device.type:
            reads = {"with_target_time": model.reads_target_time}
            self.delivery = Delivery(sequences, self.device, max_len, self.world, **reads)
        self.gradients: Gradients | SampledGradients
        if task.negatives:
            options |= {"negatives": task.negatives, "n_items": model.n_rows - 1}
            self.gradients = SampledGradients(model, sequences, **options)
        elif self._shards(runtime):
            options["graphs"] = False
            self.gradients = ShardedGradients(model, sequences, in_batch=False, **options)
            say("the item table lies in slices, one a process (runtime.shard_items)")
        else:
            self.gradients = Gradients(model, sequences, in_batch=task.in_batch, **options)

    @property
    def layout(self) -> list[tuple[str, int]]:
        """Names and sizes of everything that is trained, in the order in which it lies."""
        tables = {} if self.tables is None else self.tables.tables
        return [*self.parameters.layout, *((name, table.numel()) for name, table in tables.items())]

    def groups(self, targets: Tensor) -> Iterator[list[MicroBatch]]:
        """The micro-batches of each optimiser step, this process's part of each.

        A step follows every `accumulation` micro-batches and the last one of the epoch, so the last group is smaller.
        The group's loss is the mean over its targets, or, with `mean_over_group` off, the sum of the micro-batches'
        means (published behaviour Q9).
        """
        groups = self._undrawn(targets)
        if self.delivery is not None:
            groups = self.delivery.ahead(groups)
        for group in groups:
            # Drawn last: what is saved between two steps is where the draws stand, whatever is delivered ahead.
            yield [replace(batch, negative_N=self._draw()) for batch in group]

    def _undrawn(self, targets: Tensor) -> Iterator[list[MicroBatch]]:
        if not len(targets):  # interrupted behind the last step of an epoch
            return
        plan = self.task.optimisation
        sharded = isinstance(self.gradients, ShardedGradients)
        among_all = self.world.size > 1 and (self.task.in_batch or self.task.negatives > 0)
        micro_batches = torch.split(targets, plan.batch_size)
        shares = [part[self.world.share(len(part))] for part in micro_batches]
        lengths = [self.sequences.lengths(share, self.max_len).sum() for share in shares]
        places = torch.stack(lengths).tolist()  # the one wait of an epoch
        for begin in range(0, len(micro_batches), plan.accumulation):
            group = range(begin, min(begin + plan.accumulation, len(micro_batches)))
            size = sum(len(micro_batches[i]) for i in group)
            yield [
                MicroBatch(
                    shares[i],
                    micro_batches[i] if among_all or (sharded and len(micro_batches[i]) >= self.world.size) else None,
                    places[i],
                    len(shares[i]) / (size if plan.mean_over_group else len(micro_batches[i])),
                )
                for i in group
            ]

    def _shards(self, runtime: RuntimeSettings) -> bool:
        """Whether the item table is cut into slices: if asked for, or if it is too large for each process."""
        if self.world.size == 1 or self.task.in_batch or not self.model.item_rows or runtime.shard_items == "never":
            return False
        if runtime.shard_items == "always" or self.device.type == "cpu":
            return runtime.shard_items == "always"
        table = self.model.n_rows * self.model.item_table(torch.ones(1, dtype=torch.int64, device=self.device)).shape[1]
        held = table * self.parameters.values.element_size() * TABLE_COPIES
        return held > torch.cuda.get_device_properties(self.device).total_memory / 2

    def _draw(self) -> Tensor | None:
        if not isinstance(self.gradients, SampledGradients):
            return None
        inner = self.gradients.inner
        return torch.randint(1, inner.n_items + 1, (inner.negatives,), generator=self.draws, device=self.device)

    def step(self, group: list[MicroBatch]) -> Tensor:
        """Gradients of a group and one step; the sum of its targets' losses, float64, perhaps not computed yet.

        On the CPU a loss that is not finite stops before the step; on a GPU, whose queue must not be waited for, the
        caller looks at the returned sum before anything of the weights is kept.
        """
        self.parameters.clear()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in group:
            if len(batch.positions_B):
                total += self.gradients(batch) * len(batch.positions_B)
        if self.device.type == "cpu":
            self.check(total)
        self.world.add_up(self.parameters.gradient)
        if self.tables is not None and isinstance(self.gradients, SampledGradients):
            self.tables.step(*self.gradients.take(group), self.optimizer.lr)
        self._move()
        return total

    @torch.no_grad()
    def _move(self) -> None:
        values, plan = self.parameters.values.detach(), self.task.optimisation
        if self.decay is not None:
            self.parameters.gradient.addcmul_(values, self.decay)
        before = None if self.frozen is None else values.clone()
        self.optimizer.step()
        if before is not None and self.frozen is not None:
            torch.where(self.frozen, before, values, out=values)
        if self.average is not None:
            # The mean of the first steps is young: it forgets its start as quickly as it grows.
            keep = min(plan.average, (1 + self.averaged_steps) / (10 + self.averaged_steps))
            self.average.lerp_(values, 1 - keep)
            self.averaged_steps += 1

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The mean of the weights in the place of the weights, if there is one."""
        if self.average is None:
            yield
            return
        values = self.parameters.values.detach()
        kept = values.clone()
        values.copy_(self.average)
        try:
            yield
        finally:
            values.copy_(kept)

    def check(self, loss: Tensor) -> None:
        """Stop on a loss that is not finite (with `stop_on_nonfinite`).

        Raises:
            RunError: it is not; no step that followed from it is kept.
        """
        task = self.task
        if task.optimisation.stop_on_nonfinite and not math.isfinite(value := loss.item()):
            raise RunError(
                f"the loss became {value} in {task.name}; no step that followed from it was kept",
                hint=f"lower {task.name}.lr ({task.optimisation.lr:g}), or look at the features for extreme values",
            )


class Checkpoints:
    """When and what is saved inside an epoch.

    Args:
        path: the state file.
        trainer: what is saved.
        minutes: between two savings.
        interruption: a kept signal, which asks for a saving and the end.
    """

    def __init__(self, path: Path, trainer: Trainer, minutes: float, interruption: Interruption) -> None:
        self.path, self.trainer, self.minutes, self.interruption = path, trainer, minutes, interruption
        self.last = time.monotonic()

    def save(self, progress: Progress) -> None:
        """Save now; every process gives its random state, the first one writes."""
        save_state(self.path, self.trainer, progress)
        self.last = time.monotonic()

    def after_step(self, progress: Progress, loss_sum: Tensor) -> None:
        """Save if it is time, and stop if somebody asked for it; the first process decides for all.

        Raises:
            KeyboardInterrupt: or SystemExit, for a kept signal, after saving.
            RunError: the loss is not finite.
        """
        due = self.interruption.signal is not None or time.monotonic() - self.last > 60 * self.minutes
        kept = self.trainer.world.first_says((due, self.interruption.signal))
        if not kept[0]:
            return
        self.trainer.check(loss_sum)
        progress.loss_sum = loss_sum.item()
        self.save(progress)
        self.interruption.signal = kept[1]
        self.interruption.obey()


def train_epoch(
    trainer: Trainer, targets: Tensor, progress: Progress, checkpoints: Checkpoints, advance: Callable[[int], None]
) -> float:
    """One pass over the targets, or what is left of it; the mean loss of a target.

    Raises:
        RunError: the loss is not finite (with `stop_on_nonfinite`).
    """
    trainer.model.train()
    plan, world = trainer.task.optimisation, trainer.world
    total = torch.full((), progress.loss_sum, dtype=torch.float64, device=trainer.device)
    left = targets[progress.targets_done :]
    if progress.targets_done:
        advance(progress.targets_done)
    before: Tensor | None = None
    for group in trainer.groups(left):
        size = min(plan.batch_size * plan.accumulation, len(targets) - progress.targets_done)
        middle = (progress.targets_done + size / 2) / len(targets)
        trainer.optimizer.lr = learning_rate(plan, progress.epoch, middle)
        loss_sum = trainer.step(group)
        if before is not None and trainer.device.type == "cuda":
            trainer.check(before)  # the last group's, so that the GPU always has the next one to do
        before = loss_sum
        total += loss_sum
        progress.targets_done += size
        advance(size)
        checkpoints.after_step(progress, total)
    world.add_up(total)
    trainer.check(total)
    return float(total / len(targets))


def fit(
    model: SequenceModel,
    sequences: Sequences,
    task: Task,
    run: Run,
    *,
    max_len: int,
    runtime: RuntimeSettings,
    reporter: Reporter,
    world: World | None = None,
) -> Progress:
    """Train until the epochs are over or patience ends; best weights go to the run's `model.safetensors`.

    Best means: score at least the best so far (a tie moves to the later epoch). Patience counts epochs strictly below
    the best in a row. After every epoch, every few minutes inside one and when it is interrupted, everything is saved
    in `state/`; a run with a state goes on from there and ends as an uninterrupted one would (bit for bit on the CPU).

    Returns:
        where training stood at the end; `model` holds the last weights, not the best.
    """
    plan, world = task.optimisation, world or World()
    trainer = Trainer(model, sequences, task, max_len=max_len, runtime=runtime, world=world, say=reporter.note)
    state_file = run.path / "state" / "training.safetensors"
    progress = Progress(order_seed=torch.initial_seed())
    trainer.draws.manual_seed(progress.order_seed % 2**63)
    if state_file.is_file():
        progress = load_state(state_file, trainer)
        within = f" and {progress.targets_done:,} targets" if progress.targets_done else ""
        reporter.note(f"going on after epoch {progress.epoch}{within} of run {run.id}")
    elif world.size > 1:
        # Dropout must differ between the processes; the order of the targets must not.
        torch.manual_seed(torch.initial_seed() + world.rank)
    book = _Book(run, progress) if world.first else None
    with kept_signals() as interruption:
        checkpoints = Checkpoints(state_file, trainer, runtime.save_minutes, interruption)
        while progress.epoch < plan.epochs and not progress.done:
            epoch = progress.epoch + 1
            trainer.frozen = None
            if epoch <= task.frozen_epochs:
                trainer.frozen = trainer.parameters.marked(lambda name, _: name in task.frozen).bool()
            start = time.perf_counter()
            targets = epoch_targets(sequences, task, progress.order_seed, epoch)
            with reporter.stage(f"epoch {epoch}/{plan.epochs}", len(targets), "targets") as stage:
                try:
                    loss = train_epoch(trainer, targets, progress, checkpoints, stage.advance)
                except RunError:
                    state_file.unlink(missing_ok=True)  # a diverged run is not gone on with
                    raise
                row: dict[str, Any] = {"epoch": epoch, "loss": loss}
                row["lr"] = learning_rate(plan, progress.epoch, 0.5)
                row["train_seconds"] = time.perf_counter() - start
                with trainer.averaged():
                    scores = task.validate() if task.validate else {}
                stage.advance(0, _status(loss, scores, task.metric))
            row |= {"seconds": time.perf_counter() - start, "valid": scores}
            _judge(progress, task, epoch, scores)
            progress.epoch, progress.targets_done, progress.loss_sum = epoch, 0, 0.0
            progress.seconds += row["seconds"]
            progress.history.append(row)
            if book is not None:
                with trainer.averaged():
                    if progress.best_epoch == epoch:
                        save_weights(run.weights, model.state_dict())
                    if task.save_every and epoch % task.save_every == 0:
                        save_weights(run.path / "checkpoints" / f"epoch-{epoch:03d}.safetensors", model.state_dict())
            checkpoints.save(progress)
            if book is not None:
                book.enter(row)
            interruption.obey()
    if book is not None:
        book.close()
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


class _Book:
    """What a run writes down after every epoch: `metrics.jsonl` and TensorBoard events.

    An epoch that was logged but not saved is trained again, so only the saved rows are kept at the start.
    """

    def __init__(self, run: Run, progress: Progress) -> None:
        self.path = run.path / "metrics.jsonl"
        with written_whole(self.path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in progress.history), encoding="utf-8")
        self.board = SummaryWriter(str(run.path))

    def enter(self, row: dict[str, object]) -> None:
        """Add one epoch."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        self.board.add_scalar("train/loss", row["loss"], row["epoch"])
        self.board.add_scalar("train/seconds", row["train_seconds"], row["epoch"])
        for name, value in dict(row["valid"]).items():  # type: ignore[call-overload]
            self.board.add_scalar(f"valid/{name}", value, row["epoch"])

    def close(self) -> None:
        """Write what is still kept back."""
        self.board.close()
