"""Every baseline and MMM4Rec on equal terms: one set of features, one grid, three seeds, chosen by validation NDCG@10.

    python examples/benchmarks/baselines.py prepare WORKSPACE DOMAIN --out inputs.npz
    python examples/benchmarks/baselines.py run inputs.npz --out results --seconds 400 --processes 12
    python examples/benchmarks/baselines.py alone inputs.npz --out results
    python examples/benchmarks/baselines.py page results --out docs/baselines.md --settings examples/settings/baselines

`run` needs a machine with torch, and a GPU if it is to be quick; several processes share it. All models get the same
points of the grid in the same order, then the other seeds at the best point. When the time is over what is there is
kept: a row a training in `rows.jsonl`, the ranks of all test users beside it; the same command goes on from there, and
a training that was cut is done again. With `--points N` the grid is its first N points; a model that was not through
with them has no row. `alone` times an epoch of each model at its best point with nothing else on the GPU; `page` writes
the table, the rows behind it, and each model's best point as a settings file.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from mmm4rec_cli.data.dataset import Dataset, load_dataset
from mmm4rec_cli.data.sequences import Sequences
from mmm4rec_cli.errors import RunError
from mmm4rec_cli.evaluation.evaluate import Ranking, rank_by_popularity, rank_split
from mmm4rec_cli.evaluation.metrics import summary
from mmm4rec_cli.features.store import ItemFeatures
from mmm4rec_cli.models.registry import MODELS, build_model
from mmm4rec_cli.settings import Settings, load
from mmm4rec_cli.training.loop import Task, Trainer, epoch_targets
from mmm4rec_cli.workspace import Workspace

SEEDS = (1, 2, 3, 4, 5)
"""The first tunes; the others follow at the best point."""
GRID = (  # learning rate, dropout, length: the first points are the ones that a short run sees
    (1e-3, 0.2, 20),
    (1e-3, 0.5, 50),
    (3e-4, 0.2, 50),
    (1e-3, 0.5, 20),
    (1e-3, 0.2, 50),
    (3e-4, 0.5, 50),
    (3e-4, 0.2, 20),
    (3e-4, 0.5, 20),
    (3e-3, 0.5, 20),
    (3e-3, 0.2, 50),
    (3e-3, 0.2, 20),
    (3e-3, 0.5, 50),
)
PLAN = {"epochs": 100, "prefixes": 16, "batch_size": 512, "accumulation": 1, "patience": 10, "shuffle": True}
"""An epoch is 16 random targets of each user, so that the validation looks often; otherwise each model's preset."""
STEADY = {"schedule": "constant", "warmup": 0.0, "lr_decay": 1.0, "decayed": "all", "average": 0.0, "loss": "full"}
MMM4REC: dict[str, Any] = {
    **{"hidden_size": 256, "inner_size": 256, "num_layers": 1, "d_state": 64, "n_groups": 8, "d_conv": 4, "expand": 2},
    **{"head_dim": 64, "item_bias": True, "fusion": "static", "time": "observed", "feature_scale": "none"},
    **{"feed_forward": True, "point_time_gate": False, "temperature": 0.8},
}
"""Its published sizes and parts."""
MMM4REC_OPTIMISER = {"optimizer": "nadam", "weight_decay": 0.005, "momentum_decay": 0.004}
CUTOFFS = (10, 20)
METRIC = "NDCG@10"
SLOWEST_FIRST = (
    *("athwe", "hm4sr", "mmm4rec", "m3rec", "unisrec", "tim4rec", "tim4rec-t", "mamba4rec", "mamba4rec-t", "bsarec"),
    *("sasrec-t", "sasrec", "gru4rec"),
)
NO_TIME = "mmm4rec-no-time"
"""MMM4Rec without its time streams, a row more; `run` trains it when it is asked for."""


@dataclass(frozen=True)
class Job:
    """One training."""

    model: str
    point: int
    seed: int

    @property
    def name(self) -> str:
        """Unique, and a file's name."""
        return f"{self.model}-point{self.point}-seed{self.seed}"


def architecture(name: str) -> str:
    """The model behind a row, as `--model` calls it."""
    return "mmm4rec" if name == NO_TIME else name


def chosen_settings(name: str, point: int) -> dict[str, dict[str, Any]]:
    """What a point sets, by section and name; of MMM4Rec also what it rests on, so that no new default changes it."""
    lr, dropout, length = GRID[point]
    dropouts = dict.fromkeys(("dropout", "embedding_dropout", "time_dropout"), dropout)
    sections: dict[str, dict[str, Any]] = {"model": {"max_len": length, **dropouts}}
    plan: dict[str, Any] = {"lr": lr, "metric": METRIC, **PLAN, **STEADY}
    if architecture(name) == "mmm4rec":
        time_streams = {"time": "none"} if name == NO_TIME else {}
        return {"model": sections["model"] | MMM4REC | time_streams, "finetune": plan | MMM4REC_OPTIMISER}
    if name.startswith("tim4rec"):
        sections["model"]["time"] = "observed"
    return sections | {"model.baseline": {"attention_dropout": dropout}, "finetune": plan}


def settings_of(job: Job) -> Settings:
    """The settings of one training."""
    sections = chosen_settings(job.model, job.point)
    sets = [f"{where}.{name}={_toml(value)}" for where, each in sections.items() for name, value in each.items()]
    return load(overrides=[*sets, f"runtime.seed={job.seed}"], model=architecture(job.model))


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else json.dumps(value)


def settings_file(model: str, point: int, about: str) -> str:
    """The same as TOML, for `--config`."""
    lines = [f"# {line}" for line in about.splitlines()]
    for where, each in chosen_settings(model, point).items():
        lines += ["", f"[{where}]", *(f"{name} = {_toml(value)}" for name, value in each.items())]
    return "\n".join(lines) + "\n"


def command_of(model: str, domain: str, seeds: Iterable[int]) -> str:
    """The command line that trains this row."""
    said = " ".join(f"--seed {seed}" for seed in seeds)
    config = f"--config examples/settings/baselines/{model}.toml"
    return f"mmm4rec finetune --domain {domain} --model {architecture(model)} --pretrained none {config} {said}"


def prepare(workspace: Workspace, domain: str, encoder: str, out: Path) -> None:
    """Put what training needs into one file that numpy alone can read."""
    dataset = load_dataset(workspace, [domain], encoder)
    sequences, features = dataset.sequences, dataset.features
    np.savez_compressed(
        out,
        user=sequences.users_of(torch.arange(len(sequences.items_N))).numpy().astype(np.int32),
        item=sequences.items_N.numpy(),
        time=sequences.times_N.numpy(),
        text=features.text.astype(np.float16),
        has_text=features.has_text,
        image=features.image.astype(np.float16),
        has_image=features.has_image,
        about=json.dumps(
            {"domain": domain, "encoder": encoder, "n_users": dataset.n_users, "categories": dataset.categories}
        ),
    )


def read_inputs(path: Path) -> Dataset:
    """The data set of `prepare`."""
    with np.load(path) as file:
        about = json.loads(str(file["about"]))
        features = ItemFeatures(
            text=file["text"].astype(np.float32),
            has_text=file["has_text"],
            image=file["image"].astype(np.float32),
            has_image=file["has_image"],
            metadata={},
            fingerprint="",
        )
        sequences = Sequences.of(file["user"], file["item"], file["time"], about["n_users"])
    return Dataset(
        name=about["domain"],
        domains=(about["domain"],),
        sequences=sequences,
        raw_item_ids=[str(i) for i in range(1, len(features.text))],
        raw_user_ids=[str(i) for i in range(about["n_users"])],
        features=features,
        encoder=about["encoder"],
        fingerprint="",
        categories=about["categories"],
    )


_dataset: Dataset | None = None


def _start(path: Path, threads: int) -> None:
    global _dataset
    torch.set_num_threads(threads)
    _dataset = read_inputs(path)


def attempt(*args: Any) -> tuple[dict[str, Any], Any]:
    """`train` in a process of its own, from which not every exception finds its way back."""
    try:
        return train(*args)
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def train(
    job: Job, device_name: str, deadline: float, epochs: int | None = None, graphs: bool = True
) -> tuple[dict[str, Any], Any]:
    """Train until patience, epochs or time end; the row, and the test ranks of the best epoch."""
    assert _dataset is not None
    device, settings = torch.device(device_name), settings_of(job)
    plan, max_len = settings.finetune, settings.model.max_len
    sequences = _dataset.sequences.to(device)
    split = _dataset.sequences.split("leave_one_out").to(device)
    torch.manual_seed(job.seed)
    model = build_model(architecture(job.model), settings.model, _dataset.model_features("mean")).to(device)
    task = Task("finetune", plan, split.train, in_batch=False, metric=METRIC, patience=plan.patience)
    notes: list[str] = []
    runtime = settings.runtime.model_copy(update={"cuda_graphs": graphs})
    trainer = Trainer(model, sequences, task, max_len=max_len, runtime=runtime, say=notes.append)
    ranking = Ranking(precision=settings.runtime.precision)
    best: dict[str, Any] = {METRIC: -1.0}
    ranks: Any = None
    seconds: list[float] = []
    limit, diverged = epochs or plan.epochs, False
    while len(seconds) < limit and len(seconds) - best.get("epoch", 0) < plan.patience and time.time() < deadline:
        begin = time.perf_counter()
        model.train()
        try:
            for group in trainer.groups(epoch_targets(sequences, task, job.seed, len(seconds) + 1)):
                loss = trainer.step(group)
            trainer.check(loss)
        except RunError as error:
            diverged = True
            notes.append(error.problems[0])
            break
        valid = summary(rank_split(model, sequences, split.valid, "valid", max_len, ranking).rank0_U, CUTOFFS)
        seconds.append(time.perf_counter() - begin)
        if valid[METRIC] >= best[METRIC]:
            best = {METRIC: valid[METRIC], "epoch": len(seconds), "seconds": sum(seconds), "valid": valid}
            ranks = rank_split(model, sequences, split.test, "test", max_len, ranking).rank0_U
    row = {
        **asdict(job),
        "epochs": len(seconds),
        "cut": time.time() >= deadline,
        "diverged": diverged,
        "best_epoch": best.get("epoch", 0),
        "seconds_to_best": best.get("seconds", 0.0),
        "seconds": sum(seconds),
        "seconds_an_epoch": sorted(seconds)[len(seconds) // 2] if seconds else 0.0,
        "valid": best.get("valid", {}),
        "test": {} if ranks is None else summary(ranks, CUTOFFS),
        "parameters": sum(p.numel() for p in model.parameters()),
        "notes": notes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
    }
    del trainer, model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row, None if ranks is None else ranks.numpy()


class Workers:
    """Processes with one training each; one that failed is replaced, because a GPU error lasts as long as its process.

    Args:
        count: processes.
        train: called there with a job and what belongs to it.
        start: called at the start of each process.
        state: its arguments.
    """

    def __init__(self, count: int, train: Callable[..., Any], start: Callable[..., None], *state: Any) -> None:
        self.train, self.start, self.state = train, start, state
        self.idle = [self._new() for _ in range(count)]
        self.busy: dict[Future[Any], tuple[ProcessPoolExecutor, Any]] = {}

    def _new(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, get_context("spawn"), initializer=self.start, initargs=self.state)

    def begin(self, job: Any, *args: Any) -> None:
        """Train in an idle process."""
        worker = self.idle.pop()
        self.busy[worker.submit(self.train, job, *args)] = worker, job

    def finished(self) -> Iterator[tuple[Any, Future[Any]]]:
        """Those that ended within a second."""
        for future in wait(self.busy, return_when=FIRST_COMPLETED, timeout=1).done:
            worker, job = self.busy.pop(future)
            if future.exception() is not None:
                worker.shutdown(wait=False)
                worker = self._new()
            self.idle.append(worker)
            yield job, future

    def close(self) -> None:
        """End all processes."""
        for worker in self.idle:
            worker.shutdown()


def run(inputs: Path, out: Path, args: argparse.Namespace) -> None:
    """All jobs in the order of their worth until the time is over, those of an earlier call aside."""
    out.mkdir(parents=True, exist_ok=True)
    begin = time.time()
    deadline = begin + args.seconds
    names = args.models or SLOWEST_FIRST
    rows = read_rows(out)
    dataset = read_inputs(inputs)
    known = json.loads((out / "about.json").read_text())["models"] if (out / "about.json").is_file() else []
    about = {"models": list(dict.fromkeys([*known, *names])), "domain": dataset.name, "points": args.points}
    about |= {"popularity": _popularity(dataset), "users": dataset.n_users, "items": dataset.n_items}
    (out / "about.json").write_text(json.dumps(about))
    grid = [Job(name, point, SEEDS[0]) for point in range(args.points) for name in names]
    waiting, failed, with_seeds = list(grid), set[Job](), set[str]()
    workers = Workers(args.processes, attempt, _start, inputs, args.threads)
    with (out / "rows.jsonl").open("a") as stream:
        while True:
            done = {Job(r["model"], r["point"], r["seed"]) for r in counted(rows)}
            for name in names:
                # A model that is through with the grid goes on with the other seeds at its best point.
                if name not in with_seeds and {job for job in grid if job.model == name} <= done:
                    point = best_point(rows, name, args.points)
                    if point is not None:
                        waiting += [Job(name, point, seed) for seed in SEEDS[1 : args.seeds]]
                    with_seeds.add(name)
            waiting = sorted({job for job in waiting if job not in done}, key=lambda job: order(job, names))
            fitting = [job for job in waiting if time.time() + expected(rows, job, args.processes) < deadline - 5]
            while fitting and workers.idle:
                job = fitting.pop(0)
                waiting.remove(job)
                workers.begin(job, args.device, deadline - 2, args.epochs, job not in failed)
            if not workers.busy:
                break
            for job, future in workers.finished():
                try:
                    row, ranks = future.result()
                except RuntimeError as error:
                    row, ranks = {**asdict(job), "error": str(error).splitlines()[0]}, None
                    if job not in failed:  # once more, without CUDA graphs
                        failed.add(job)
                        waiting.append(job)
                rows.append({**row, "processes": args.processes, "at": round(time.time() - begin, 1)})
                stream.write(json.dumps(rows[-1]) + "\n")
                stream.flush()
                if ranks is not None and not row["cut"]:
                    np.save(out / f"{job.name}.npy", ranks)
    workers.close()


def order(job: Job, names: Sequence[str]) -> tuple[bool, int, int, int]:
    """The grid before the seeds, point by point and seed by seed, the slow models first; what is extra last."""
    point = job.point if job.seed == SEEDS[0] else 0
    return job.model == NO_TIME, SEEDS.index(job.seed), point, names.index(job.model)


def alone(inputs: Path, out: Path, args: argparse.Namespace) -> None:
    """Time a few epochs of each model at its best point, one training at a time."""
    _start(inputs, args.threads)
    rows, about = read_rows(out), json.loads((out / "about.json").read_text())
    timed = _alone(out)
    with (out / "alone.jsonl").open("a") as stream:
        for name in about["models"]:
            point = best_point(rows, name, about["points"])
            if point is None or any((row["model"], row["point"]) == (name, point) for row in timed):
                continue
            row, _ = train(Job(name, point, SEEDS[0]), args.device, time.time() + args.seconds, args.epochs)
            kept = ("model", "point", "epochs", "seconds_an_epoch", "notes", "device")
            stream.write(json.dumps({key: row[key] for key in kept}) + "\n")
            stream.flush()


def read_rows(out: Path) -> list[dict[str, Any]]:
    """What was trained so far."""
    path = out / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def expected(rows: list[dict[str, Any]], job: Job, processes: int) -> float:
    """The longest that this model took with windows of this length among so many processes; 0 if nobody knows."""
    alike = [r for r in rows if "error" not in r and r["model"] == job.model]
    alike = [r for r in alike if GRID[r["point"]][2] == GRID[job.point][2]]
    return max((r["seconds"] * processes / r["processes"] for r in alike), default=0.0)


def _popularity(dataset: Dataset) -> dict[str, float]:
    split = dataset.sequences.split("leave_one_out")
    ranked = rank_by_popularity(dataset.sequences, split.known_N, split.test, "test", dataset.n_items)
    return summary(ranked.rank0_U, CUTOFFS)


def counted(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trainings that were neither cut nor failed."""
    return [row for row in rows if "error" not in row and not row["cut"]]


def finished(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of these, the ones with a result: a training that diverged is one for the grid and none for the table."""
    return [row for row in counted(rows) if not row["diverged"]]


def tried(rows: list[dict[str, Any]], name: str, points: int) -> dict[int, dict[str, Any]]:
    """A model's trainings of the first seed by point; of a point that was cut, the one that came furthest."""
    mine = [r for r in rows if "error" not in r and r["model"] == name and r["seed"] == SEEDS[0] and r["valid"]]
    return {r["point"]: r for r in sorted(mine, key=lambda r: (not r["cut"], r["epochs"])) if r["point"] < points}


def best_point(rows: list[dict[str, Any]], name: str, points: int) -> int | None:
    """The point with the best validation NDCG@10, cut trainings with what they had reached; None if there is none."""
    mine = [row for row in tried(rows, name, points).values() if not row["diverged"]]
    return max(mine, key=lambda r: r["valid"][METRIC])["point"] if mine else None


def through(rows: list[dict[str, Any]], name: str, points: int) -> bool:
    """Whether a model went through the whole grid."""
    return {r["point"] for r in counted(rows) if r["model"] == name} >= set(range(points))


def page(out: Path, before: str = "", points: int | None = None) -> str:
    """The table as Markdown, best first; every row with its command, and the whole grid.

    Args:
        out: where `run` left its rows.
        before: the command that makes the data, if it is to be said.
        points: points of the grid, if not as many as the last `run` was told.
    """
    from mmm4rec_cli.evaluation.compare import paired_bootstrap  # needs scipy, which `run` does not

    about = json.loads((out / "about.json").read_text())
    rows = read_rows(out)
    names, domain = about["models"], about["domain"]
    points = points or about["points"]
    chosen = {n: p for n in names if through(rows, n, points) and (p := best_point(rows, n, points)) is not None}
    at_best = {n: [r for r in finished(rows) if r["model"] == n and r["point"] == p] for n, p in chosen.items()}
    seeds = sorted(set.intersection(*({r["seed"] for r in mine} for mine in at_best.values())))
    at_best = {n: [r for r in mine if r["seed"] in seeds] for n, mine in at_best.items()}
    files = {n: [out / f"{_name(r)}.npy" for r in mine] for n, mine in at_best.items()}
    ranks = {n: [torch.from_numpy(np.load(f)) for f in mine if f.is_file()] for n, mine in files.items()}
    order = sorted(at_best, key=lambda n: -mean(r["test"][METRIC] for r in at_best[n]))
    seconds = {n: r["seconds_an_epoch"] for r in _alone(out) if chosen.get(n := r["model"]) == r["point"]}
    shown = sorted({r["point"] for r in finished(rows)})
    machines = sorted({f"{r['device']} (torch {r['torch']})" for mine in at_best.values() for r in mine})
    heads = ["model", "seeds", "Hit@10", METRIC, "difference to MMM4Rec", "epochs to best", "seconds an epoch"]
    heads += ["seconds to best", "parameters", "lr, dropout, length"]
    lines = [
        "# The baselines on equal terms",
        "",
        f"{domain}: {about['users']:,} users, {about['items']:,} items. Every model is given the same vectors of texts "
        "and pictures, the same targets and the same ranking: the whole catalogue, seen items not masked, the last "
        "interaction of a user for the test, the one before for validation.",
        "",
        f"Tuned by validation {METRIC} of seed {SEEDS[0]} over learning rate, dropout and length. Every model was "
        f"given the same {points} points, each trained once and to its end:",
        "",
        *("- learning rate {:g}, dropout {:g}, length {}".format(*GRID[p]) for p in range(points)),
        "",
        "and the other seeds at its best one. Sizes, optimiser and weight decay are those of each model's published "
        f"preset. All else is the same: batches of {PLAN['batch_size']}, an epoch of {PLAN['prefixes']} random targets "
        f"a user, at most {PLAN['epochs']} epochs, patience {PLAN['patience']}, the epoch with the best validation "
        f"{METRIC}; no pre-training. MMM4Rec has the paper's sizes and time streams of observed gaps "
        f"(`model.time = observed`); `{NO_TIME}`, where it stands below, is the same without them.",
        "",
        "Mean ± standard deviation over seeds. The difference to MMM4Rec is that of the test "
        f"{METRIC} with the 95 % interval of a paired bootstrap over users (each user's value is the mean over seeds). "
        "Seconds an epoch: the median of the first epochs (at least four, so recording the graphs still weighs in) of "
        "a training with the GPU to itself, validation included; where there is none, < and what it took beside other "
        "trainings. Times the epochs to the best one they are the seconds to it. "
        f"On one {' or '.join(machines)}.",
        "",
        *(["Fewer than three seeds so far: nothing here is a claim.", ""] if len(seeds) < 3 else []),
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    gaps = {
        n: paired_bootstrap(ranks[n], ranks["mmm4rec"], (10,))[METRIC]
        for n in order
        if n != "mmm4rec" and ranks[n] and ranks.get("mmm4rec")
    }
    for name in order:
        mine, gap, epochs = at_best[name], "–", mean(r["best_epoch"] for r in at_best[name])
        if name in gaps:
            gap = "{difference:+.4f} [{low:+.4f}, {high:+.4f}]".format(**gaps[name])
        lr, dropout, length = GRID[chosen[name]]
        cells = [name, str(len(mine)), _spread(mine, "Hit@10"), _spread(mine, METRIC), gap, f"{epochs:.0f}"]
        # What a training took beside others it takes at most alone.
        each, sign = (seconds[name], "") if name in seconds else (min(r["seconds_an_epoch"] for r in mine), "< ")
        cells += [f"{sign}{each:.2f}", f"{sign}{epochs * each:.1f}"]
        cells.append(f"{mine[0]['parameters']:,}")
        lines.append(f"| {' | '.join([*cells, f'{lr:g}, {dropout:g}, {length}'])} |")
    popular = about["popularity"]
    lines += [f"| popularity | – | {popular['Hit@10']:.4f} | {popular[METRIC]:.4f} |" + " – |" * (len(heads) - 4), ""]
    for name in (n for n in names if n not in chosen):
        why = next(
            (r["error"] for r in rows if r["model"] == name and "error" in r), "the time was over before it was through"
        )
        lines += [f"{name}: no row, because {why}.", ""]
    above, below = [n for n, g in gaps.items() if g["low"] > 0], [n for n, g in gaps.items() if g["high"] < 0]
    lines += [
        "## What it says",
        "",
        f"Above MMM4Rec by an interval without 0: {', '.join(above) or 'none'}. Below it so: "
        f"{', '.join(below) or 'none'}. Between MMM4Rec and the others "
        f"({', '.join(n for n in gaps if n not in above + below) or 'none'}) this comparison does not decide.",
        "",
        "What it does not say:",
        "",
        "- The intervals are over users with the trained models as they are; what another seed would give is in the "
        f"deviations beside them, of {len(seeds)} seeds. Of {len(gaps)} intervals of 95 % one may well leave out 0 by "
        "chance.",
        f"- {domain} is one small data set with {about['users']:,} test targets; the paper's are others, with other "
        "vectors, and there MMM4Rec is pre-trained.",
        f"- {points} points are few, and in them learning rate, dropout and length do not change one by one. A model "
        "whose best settings lie elsewhere stands lower than it could; so does one that one seed of validation misled.",
        "- The budget is equal, the sizes are not: they are the published ones.",
        "- The filters of BSARec and ATHWE mix all places of a history, so their states are not causal place by place; "
        "no model is shown what comes after the history.",
        "",
        "## The command of each row",
        "",
        "In a clone of this project; the settings files hold each model's best point. The command trains what the "
        "script behind this page trains, on a CPU to the last digit; from machine to machine sums are added in another "
        "order, so figures come back within the deviation between seeds.",
        "",
        "```",
        *([before] if before else []),
        *(command_of(name, domain, seeds) for name in order),
        "```",
        "",
        "## The grid",
        "",
        f"Validation and test {METRIC} of seed {SEEDS[0]} at learning rate, dropout and length; * stopped by the "
        f"{PLAN['epochs']} epochs, not by patience; † cut by the end of the time, with what was reached.",
        "",
        f"| model | {' | '.join('{:g}, {:g}, {}'.format(*GRID[p]) for p in shown)} |",
        "|---|" + "---|" * len(shown),
    ]
    for name in sorted(names, key=[*order, *names].index):
        mine = tried(rows, name, len(GRID))
        lines.append(f"| {name} | {' | '.join(_tried(mine.get(p)) for p in shown)} |")
    return "\n".join([*lines, ""])


def _alone(out: Path) -> list[dict[str, Any]]:
    """What `alone` timed; the first epochs compile and record, so fewer than four say nothing."""
    path = out / "alone.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return [row for row in rows if row["epochs"] >= 4]


def _tried(row: dict[str, Any] | None) -> str:
    if row is None or row["diverged"]:
        return "–" if row is None else "diverged"
    mark = "†" if row["cut"] else "*" if row["epochs"] == PLAN["epochs"] else ""
    return f"{row['valid'][METRIC]:.4f}, {row['test'][METRIC]:.4f}{mark}"


def settings_files(out: Path, folder: Path, points: int | None = None) -> None:
    """Write each model's best point; arguments as for `page`."""
    about = json.loads((out / "about.json").read_text())
    rows, points = read_rows(out), points or about["points"]
    folder.mkdir(parents=True, exist_ok=True)
    for name in about["models"]:
        point = best_point(rows, name, points)
        if point is None:
            continue
        head = f"The best of {points} points on {about['domain']} by validation {METRIC} (docs/baselines.md).\n"
        whose = "the paper's" if architecture(name) == "mmm4rec" else "those of the model's preset"
        head += f"Sizes, optimiser and weight decay are {whose}."
        (folder / f"{name}.toml").write_text(settings_file(name, point, head), encoding="utf-8")


def _name(row: dict[str, Any]) -> str:
    return Job(row["model"], row["point"], row["seed"]).name


def _spread(rows: list[dict[str, Any]], metric: str) -> str:
    values = [row["test"][metric] for row in rows]
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def main(words: list[str] | None = None) -> None:
    """The three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    one = commands.add_parser("prepare")
    one.add_argument("workspace", type=Path)
    one.add_argument("domain")
    one.add_argument("--encoder", default="own")
    one.add_argument("--out", type=Path, required=True)
    two = commands.add_parser("run")
    two.add_argument("inputs", type=Path)
    two.add_argument("--out", type=Path, required=True)
    two.add_argument("--seconds", type=float, default=400, help="all in all")
    two.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of them")
    two.add_argument("--points", type=int, default=len(GRID), help="points of the grid, from the first on")
    two.add_argument("--processes", type=int, default=5)
    two.add_argument("--epochs", type=int, help="epochs at most")
    two.add_argument("--models", nargs="*", choices=[*sorted(MODELS), NO_TIME])
    four = commands.add_parser("alone")
    four.add_argument("inputs", type=Path)
    four.add_argument("--out", type=Path, required=True)
    four.add_argument("--seconds", type=float, default=60, help="for each model, at most")
    four.add_argument("--epochs", type=int, default=8, help="their median counts, so that recordings do not")
    for command in (two, four):
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    three = commands.add_parser("page")
    three.add_argument("results", type=Path)
    three.add_argument("--out", type=Path, required=True)
    three.add_argument("--settings", type=Path, help="folder for a settings file a model")
    three.add_argument("--points", type=int, help="points of the grid, from the first on")
    three.add_argument("--before", default="", help="the command that makes the data, to be said before the rows'")
    args = parser.parse_args(words)
    if args.command == "prepare":
        prepare(Workspace(args.workspace), args.domain, args.encoder, args.out)
    elif args.command == "run":
        run(args.inputs, args.out, args)
    elif args.command == "alone":
        alone(args.inputs, args.out, args)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(page(args.results, args.before, args.points), encoding="utf-8")
        kept = [json.dumps(row) for row in counted(read_rows(args.results))]
        args.out.with_suffix(".jsonl").write_text("\n".join([*kept, ""]), encoding="utf-8")
        if args.settings is not None:
            settings_files(args.results, args.settings, args.points)


if __name__ == "__main__":
    main()
