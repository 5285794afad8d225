"""The measurements behind the defaults: time, missing images, optimisation, transfer.

    python examples/studies/study.py run ml100k.npz office.npz … --out results --seconds 400 --arms time:1,2 missing:1 …
    python examples/studies/study.py pace ml100k.npz office.npz … --out results --seconds 90 --arms time missing …
    python examples/studies/study.py page results --out docs/measurements.md

Inputs are those of `examples/benchmarks/baselines.py prepare`. Every training is a `mmm4rec finetune` (after a
`mmm4rec pretrain`) through the same functions; several share a GPU. What has a row in `rows.jsonl` is not trained
again. Trainings that share a GPU wait for each other, so `pace` times an epoch of each kind of training alone. Arms are
named by their key or its beginning (* stands for anything), with the seeds behind a colon; they begin in the order that
is given.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "benchmarks")]

from arms import ARMS, KNOWN, training_of, written
from baselines import Workers, read_inputs

from mmm4rec_cli.data.dataset import Dataset
from mmm4rec_cli.data.sequences import Sequences
from mmm4rec_cli.errors import UserError
from mmm4rec_cli.evaluation.evaluate import Ranking, rank_split
from mmm4rec_cli.evaluation.metrics import summary
from mmm4rec_cli.reporter import Progress, SilentReporter
from mmm4rec_cli.runs import Run, load_model
from mmm4rec_cli.settings import load
from mmm4rec_cli.training.finetune import finetune_on
from mmm4rec_cli.training.pretrain import pretrain_on
from mmm4rec_cli.workspace import Workspace

CURVE = ("Hit@10", "NDCG@10")


class OutOfTimeError(UserError):
    """The deadline came."""

    code = 130


class UntilDeadline(SilentReporter):
    """Says nothing and ends the training at the deadline."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Progress]:
        if time.time() > self.deadline:
            raise OutOfTimeError("out of time", hint="give it more seconds")
        with super().stage(name, total, unit) as progress:
            yield progress


@dataclass(frozen=True)
class Job:
    """One training: an arm with a seed, or the pre-training that arms start from."""

    arm: str
    seed: int
    pretrain: bool = False

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"


_datasets: dict[str, Dataset] = {}
_folder = Path()


def start(inputs: list[Path], workspace: Path, threads: int) -> None:
    """What a process holds: all data sets."""
    global _folder
    torch.set_num_threads(threads)
    _folder = workspace
    for path in inputs:
        dataset = read_inputs(path)
        _datasets[dataset.name] = dataset


def with_hidden_images(dataset: Dataset, share: float, seed: int) -> Dataset:
    """The data set without a random share of the images that it has."""
    features = dataset.features
    items = np.flatnonzero(features.has_image)
    gone = np.random.default_rng(seed).choice(items, round(share * len(items)), replace=False)
    has, image = features.has_image.copy(), features.image.copy()
    has[gone], image[gone] = False, 0
    return replace(dataset, features=replace(features, has_image=has, image=image))


def with_fewer_users(dataset: Dataset, share: float) -> Dataset:
    """The data set with a random share of its users, the same in every call."""
    kept = np.sort(np.random.default_rng(0).permutation(dataset.n_users)[: round(share * dataset.n_users)])
    return _with_interactions(dataset, np.isin(_users(dataset), kept), kept)


def known_part(dataset: Dataset) -> Dataset:
    """What training may see of it: no interaction that validation or test asks for."""
    known = dataset.sequences.split("leave_one_out").known_N.numpy()
    return _with_interactions(dataset, known, np.arange(dataset.n_users))


def _users(dataset: Dataset) -> Any:
    return dataset.sequences.users_of(torch.arange(len(dataset.sequences.items_N))).numpy()


def _with_interactions(dataset: Dataset, chosen: Any, users: Any) -> Dataset:
    s, user = dataset.sequences, np.searchsorted(users, _users(dataset)[chosen]).astype(np.int32)
    return replace(
        dataset,
        sequences=Sequences.of(user, s.items_N.numpy()[chosen], s.times_N.numpy()[chosen], len(users)),
        raw_user_ids=[dataset.raw_user_ids[i] for i in users],
    )


def source_of(name: str) -> Dataset:
    """One of the data sets, or several that are joined by "+", as `mmm4rec pretrain` does with several domains."""
    if "+" not in name:
        return known_part(_datasets[name.removesuffix(KNOWN)]) if name.endswith(KNOWN) else _datasets[name]
    parts = [without_images(source_of(one)) for one in name.split("+")]
    users, items = (np.cumsum([0, *(getattr(part, n) for part in parts)]) for n in ("n_users", "n_items"))
    kept = [part.sequences for part in parts]

    def rows(which: str) -> Any:
        tables = [getattr(part.features, which) for part in parts]
        return np.concatenate([tables[0], *(table[1:] for table in tables[1:])])

    names = ("text", "has_text", "image", "has_image")
    return replace(
        parts[0],
        name=name,
        domains=tuple(name.split("+")),
        sequences=Sequences.of(
            np.concatenate([_users(part) + np.int32(u) for part, u in zip(parts, users, strict=False)]),
            np.concatenate([s.items_N.numpy() + np.int32(i) for s, i in zip(kept, items, strict=False)]),
            np.concatenate([s.times_N.numpy() for s in kept]),
            int(users[-1]),
        ),
        raw_item_ids=[f"{part.name}-{raw}" for part in parts for raw in part.raw_item_ids],
        raw_user_ids=[f"{part.name}-{raw}" for part in parts for raw in part.raw_user_ids],
        features=replace(parts[0].features, **{which: rows(which) for which in names}),
        categories=None,
    )


def without_images(dataset: Dataset) -> Dataset:
    """As `mmm4rec preprocess --no-images` leaves it."""
    features, none = dataset.features, np.zeros((dataset.n_items + 1, 1), np.float32)
    return replace(dataset, features=replace(features, image=none, has_image=none[:, 0] > 0))


def train(job: Job, device: str, deadline: float, source: str | None, more: tuple[str, ...]) -> dict[str, Any]:
    """One training to its end; the row. Ranks of all users come with it under `ranks_…`."""
    arm, reporter = ARMS[job.arm], UntilDeadline(deadline)
    workspace = Workspace(_folder / f"{job.name}{'-source' if job.pretrain else ''}")
    shutil.rmtree(workspace.root, ignore_errors=True)
    runtime = [f"runtime.seed={job.seed}", f"runtime.device={device}", *more]
    try:
        if job.pretrain:
            assert arm.source is not None
            settings = load(overrides=[*written(arm.source_sets), *runtime], workspace=workspace)
            result = pretrain_on(workspace, source_of(arm.source), settings, reporter=reporter)
            row = {"pretrain": arm.source, "sets": arm.source_sets, "seed": job.seed, "loss": round(result["loss"], 4)}
            return row | {
                "run": str(Run(workspace.runs / "pretrain" / arm.source / result["run"]).path),
                "seconds": result["seconds"],
            }
        settings = load(overrides=[*written(arm.sets), *runtime], workspace=workspace)
        dataset = _datasets[arm.domain]
        if arm.users < 1:
            dataset = with_fewer_users(dataset, arm.users)
        if arm.hidden:
            dataset = with_hidden_images(dataset, arm.hidden, job.seed)
        result = finetune_on(
            workspace, dataset, settings, pretrained=source or "none", time_is_set=True, reporter=reporter
        )
    except UserError as error:
        return {"arm": job.arm, "seed": job.seed, "error": error.problems[0][:100]}
    run = Run(workspace.runs / "finetune" / dataset.name / result["run"])
    epochs = run.epochs
    best = result["best_epoch"]
    row = {
        **{"arm": job.arm, "block": arm.block, "domain": arm.domain, "seed": job.seed},
        **{"sets": arm.sets, "source": arm.source, "source_sets": arm.source_sets},
        **{"hidden": arm.hidden, "users": arm.users},
        **{"best_epoch": best, "epochs": result["epochs"], "seconds": result["seconds"]},
        "seconds_to_best": sum(epoch["seconds"] for epoch in epochs[:best]),
        "train_seconds_to_best": sum(epoch["train_seconds"] for epoch in epochs[:best]),
        "curve": {name: [round(epoch["valid"][name], 5) for epoch in epochs] for name in CURVE},
        "loss": [round(epoch["loss"], 4) for epoch in epochs],
        "seconds_curve": [round(epoch["seconds"], 4) for epoch in epochs],
        **result["metrics"],
        "popularity": result["yardsticks"]["popularity"]["test"]["NDCG@10"],
        "device": result["hardware"]["name"],
        "torch": result["versions"]["torch"],
    }
    model, _ = load_model(run, dataset, torch.device(device))
    sequences = dataset.sequences.to(torch.device(device))
    split = dataset.sequences.split("leave_one_out").to(torch.device(device))
    ranking = Ranking(precision=settings.runtime.precision)
    length = settings.model.max_len
    for name in ("valid", "test"):
        ranked = rank_split(model, sequences, split.targets(name), name, length, ranking)
        row[f"ranks_{name}"] = ranked.rank0_U.numpy()
    if model.reads_target_time:
        model.reads_target_time = False
        ranks = rank_split(model, sequences, split.test, "test", length, ranking).rank0_U
        row["test_without_target_time"] = summary(ranks, (10, 20, 50))
        row["ranks_without_target_time"] = ranks.numpy()
    shutil.rmtree(workspace.root)
    return row


def attempt(*args: Any) -> dict[str, Any]:
    """`train`; not every exception finds its way back from a process."""
    try:
        return train(*args)
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def jobs_of(words: list[str]) -> list[Job]:
    """Trainings in the order of the words "beginning:seed,seed", each arm and seed once."""
    jobs: dict[Job, None] = {}
    for word in words:
        beginning, _, seeds = word.partition(":")
        mine = [beginning] if beginning in ARMS else [key for key in ARMS if fnmatchcase(key, beginning + "*")]
        if not mine:
            raise SystemExit(f"no arm begins with {beginning}: {', '.join(ARMS)}")
        jobs |= {Job(key, int(seed)): None for seed in (seeds or "1").split(",") for key in mine}
    return list(jobs)


def read_rows(out: Path) -> list[dict[str, Any]]:
    path = out / "rows.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run(args: argparse.Namespace) -> None:
    """All jobs in their order until the time is over; a pre-training that several arms share is trained once."""
    args.out.mkdir(parents=True, exist_ok=True)
    begin = time.time()
    deadline = begin + args.seconds
    have = {(training_of(row), row["seed"]) for row in read_rows(args.out) if "curve" in row}
    waiting = []
    for job in jobs_of(args.arms):
        if (made := (ARMS[job.arm].training, job.seed)) not in have:
            have.add(made)
            waiting.append(job)
    workers = Workers(args.processes, attempt, start, args.inputs, args.workspace, args.threads)
    sources: dict[tuple[Any, ...], str | None] = {}
    """Pre-training and seed -> run, None: under way, "": failed."""

    def next_job() -> tuple[Job, str | None] | None:
        for job in list(waiting):
            key = ARMS[job.arm].source_key
            if key is None:
                waiting.remove(job)
                return job, None
            made = sources.get((*key, job.seed), "wanted")
            if made == "wanted":
                sources[*key, job.seed] = None
                return replace(job, pretrain=True), None
            if made is not None:
                waiting.remove(job)
                if made:
                    return job, made
        return None

    with (args.out / "rows.jsonl").open("a") as stream:
        while True:
            while workers.idle and time.time() < deadline - args.spare and (found := next_job()):
                job, source = found
                workers.begin(job, args.device, deadline, source, tuple(args.set))
            if not workers.busy:
                break
            for job, future in workers.finished():
                try:
                    row = future.result()
                except RuntimeError as error:
                    row = {"arm": job.arm, "seed": job.seed, "error": str(error).splitlines()[0][:100]}
                if job.pretrain:
                    sources[*(ARMS[job.arm].source_key or ()), job.seed] = row.pop("run", "")
                ranks = {name: row.pop(name) for name in list(row) if name.startswith("ranks_")}
                for name, values in ranks.items():
                    np.save(args.out / f"{job.name}-{name}.npy", values.astype(np.float32))
                row |= {"more": args.set, "processes": args.processes, "at": round(time.time() - begin, 1)}
                stream.write(json.dumps(row) + "\n")
                stream.flush()
                said = row.get("error") or row.get("test", {}).get("NDCG@10", "pre-trained")
                print(f"{row['at']:7.1f} s  {job.name}  {row.get('seconds', 0):.1f} s  {said}", flush=True)
    workers.close()
    print(f"{len(waiting)} left")


PACE = {"epochs": 3, "patience": 3, "schedule": "constant"}
"""What is timed: the first epoch waits for kernels, the others are those of any longer training."""


def pace(args: argparse.Namespace) -> None:
    """Seconds of an epoch of each kind of training alone on its device; what has a row is not timed again."""
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + args.seconds
    reporter = UntilDeadline(deadline)
    start(args.inputs, args.workspace, args.threads)
    done = {row["pace"] for row in read_rows(args.out) if "pace" in row}
    arms = [ARMS[job.arm] for job in jobs_of(args.arms)]
    kinds = {arm.work: (arm, False) for arm in arms}
    kinds |= {work: (arm, True) for arm in arms if (work := arm.source_work)}
    with (args.out / "rows.jsonl").open("a") as stream:
        for work, (arm, pretrain) in kinds.items():
            if work in done:
                continue
            part, sets = ("pretrain", arm.source_sets) if pretrain else ("finetune", arm.sets)
            chosen = {name: value for name, value in PACE.items() if not (pretrain and name == "patience")}
            sets = {**sets, **{f"{part}.{name}": value for name, value in chosen.items()}}
            workspace = Workspace(args.workspace / "pace")
            shutil.rmtree(workspace.root, ignore_errors=True)
            runtime = [f"runtime.device={args.device}", *args.set]
            settings = load(overrides=[*written(sets), *runtime], workspace=workspace)
            dataset = source_of(arm.source or "") if pretrain else with_fewer_users(_datasets[arm.domain], arm.users)
            try:
                if pretrain:
                    result = pretrain_on(workspace, dataset, settings, reporter=reporter)
                else:
                    result = finetune_on(workspace, dataset, settings, pretrained="none", reporter=reporter)
            except OutOfTimeError:
                break
            epochs = Run(workspace.runs / part / dataset.name / result["run"]).epochs[1:]
            row = {"pace": work, "epochs": len(epochs), "device": result["hardware"]["name"]}
            row |= {"seconds": median(epoch["seconds"] for epoch in epochs), "torch": result["versions"]["torch"]}
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            print(f"{row['seconds']:8.3f} s  {work}", flush=True)
    shutil.rmtree(args.workspace / "pace", ignore_errors=True)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("inputs", type=Path, nargs="+")
    shared.add_argument("--arms", nargs="+", required=True, metavar="BEGINNING:SEEDS")
    shared.add_argument("--out", type=Path, required=True)
    shared.add_argument("--workspace", type=Path, required=True, help="where the runs lie; a folder in memory is quick")
    shared.add_argument("--seconds", type=float, default=400, help="all in all")
    shared.add_argument("--threads", type=int, default=1)
    shared.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    shared.add_argument("--set", action="append", default=[], help="as of `mmm4rec`, for every arm")
    one = commands.add_parser("run", parents=[shared])
    one.add_argument("--spare", type=float, default=10, help="seconds before the end when nothing new is begun")
    one.add_argument("--processes", type=int, default=8)
    commands.add_parser("pace", parents=[shared])
    two = commands.add_parser("page")
    two.add_argument("results", type=Path)
    two.add_argument("--out", type=Path, required=True)
    commands.add_parser("list")
    args = parser.parse_args(words)
    if args.command in ("run", "pace"):
        args.inputs = [path.resolve() for path in args.inputs]
        (run if args.command == "run" else pace)(args)
    elif args.command == "list":
        print("\n".join(ARMS))
    else:
        from pages import page  # what draws pictures need not be there to train

        page(args.results, args.out)


if __name__ == "__main__":
    main()
