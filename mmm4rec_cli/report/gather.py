"""What a report shows of one run: read from its files, and computed where the files do not hold it.

Letters: U users of the test split, V catalogue rows with padding row 0.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mmm4rec_cli.data import columns
from mmm4rec_cli.data.dataset import Dataset
from mmm4rec_cli.data.sequences import Split
from mmm4rec_cli.data.tables import read_manifest
from mmm4rec_cli.device import resolve_device
from mmm4rec_cli.errors import RunError
from mmm4rec_cli.evaluation.evaluate import RankedSplit, Ranking, rank_split
from mmm4rec_cli.evaluation.evaluate_run import later_share, run_dataset
from mmm4rec_cli.evaluation.rank_files import SCHEMA
from mmm4rec_cli.evaluation.segments import SEGMENTS, segment_metrics
from mmm4rec_cli.published import PublishedResult, published_result
from mmm4rec_cli.report.gallery import Case, cases
from mmm4rec_cli.report.weighing import Weighing, weigh
from mmm4rec_cli.reporter import Reporter
from mmm4rec_cli.runs import Run, load_model
from mmm4rec_cli.settings.schema import RuntimeSettings, Settings
from mmm4rec_cli.workspace import Workspace

Segments = dict[str, dict[str, Mapping[str, float]]]


@dataclass(frozen=True)
class Curve:
    """One seed's training, epoch by epoch."""

    seed: int
    epochs: list[int]
    loss: list[float]
    valid: list[float]
    """The metric that chose the epoch."""
    best_epoch: int


@dataclass(frozen=True)
class Facts:
    """Everything that a report shows of one run."""

    run: Run
    label: str
    about: dict[str, Any]
    result: dict[str, Any]
    metric: str
    metrics: dict[str, dict[str, float]]
    """By column (valid, test, popularity, repeat last, published), then by metric."""
    published: PublishedResult | None
    """The published run whose figures stand beside ours, if there is one."""
    spread: dict[str, dict[str, float]]
    """Standard deviation over seeds of the valid and test columns; empty with one seed."""
    curves: list[Curve]
    segments: Segments
    weighing: Weighing | None
    cases: list[Case]
    changed_settings: list[tuple[str, str, str]]
    """Setting, the run's value, the default."""
    manifests: dict[str, dict[str, Any]]
    health: list[tuple[str, str]]
    notes: list[str]

    @property
    def domain(self) -> str:
        """What the run was trained on."""
        return str(self.about["domain"])


def gather(workspace: Workspace, run: Run, runtime: RuntimeSettings, reporter: Reporter) -> Facts:
    """Read and compute everything of one run.

    Args:
        workspace: where data lie.
        run: a finished fine-tuning run.
        runtime: the device to compute on.
        reporter: progress.

    Raises:
        RunError: the run is no fine-tuning, unfinished, damaged, or of a domain that is gone.
        DataError: the run's domain is not whole.
    """
    about = run.about
    if about.get("command") != "finetune":
        raise RunError(
            f"run {run.id} is no fine-tuning run", hint="a report takes fine-tuning runs: see `mmm4rec runs`"
        )
    if not run.finished:
        raise RunError(
            f"run {run.id} is not finished: there is nothing to report yet",
            hint=f"finish it with: mmm4rec finetune --domain {about['domain']} --resume {run.short_id}",
        )
    result, settings = run.result, run.settings.model_copy(update={"runtime": runtime})
    dataset = run_dataset(workspace, run)
    split = dataset.sequences.split(settings.data.split, settings.data.split_share)
    device = resolve_device(runtime.device)
    notes = []
    same_data = dataset.fingerprint == about["data_fingerprint"]
    if not same_data:
        notes.append(
            f"The tables of {dataset.name} have changed since run {run.short_id} was trained. Its table of metrics "
            "and its curves are of the data it was trained on, everything else is of the present tables."
        )
    with reporter.stage(f"read run {run.short_id}"):
        model, _ = load_model(run.members[0], dataset, device)
    model.eval()
    ranked = list(_ranked(run, dataset, split, settings, same_data, device))
    first = ranked[0]
    return Facts(
        run=run,
        label=run.short_id,
        about=about,
        result=result,
        metric=settings.finetune.metric,
        metrics=_metrics(result, settings),
        published=_published(result, settings),
        spread=result.get("metrics_sd", {}),
        curves=[_curve(member, settings.finetune.metric) for member in run.members],
        segments=_mean_segments(
            [segment_metrics(SEGMENTS, one, dataset, split, settings.evaluate.k) for one in ranked]
        ),
        weighing=weigh(model, dataset, split, settings, device, reporter),
        cases=cases(workspace, model, dataset, split, first, settings, device),
        changed_settings=list(_changed(run.settings_document)),
        manifests={domain: read_manifest(workspace, domain) for domain in dataset.domains},
        health=_health(dataset, split),
        notes=notes,
    )


def _ranked(
    run: Run, dataset: Dataset, split: Split, settings: Settings, same_data: bool, device: torch.device
) -> Iterator[RankedSplit]:
    """The test ranks of every seed: the stored ones while the data are the same, else ranked anew."""
    for member in run.members:
        stored = _stored(member, len(split.test)) if same_data else None
        if stored is None:
            model, _ = load_model(member, dataset, device)
            ranking = Ranking(
                ties=settings.evaluate.ties,
                padding_candidate=settings.model.padding_candidate,
                batch_size=settings.evaluate.batch_size,
            )
            sequences, targets = dataset.sequences.to(device), split.targets("test").to(device)
            stored = rank_split(model, sequences, targets, "test", settings.model.max_len, ranking)
        yield stored


def _stored(run: Run, users: int) -> RankedSplit | None:
    try:
        table = pq.read_table(run.path / "ranks.parquet", schema=SCHEMA, filters=[("split", "==", "test")])
    except (OSError, pa.ArrowException):
        return None
    if table.num_rows != users:
        return None
    table = table.sort_by(columns.USER_ID)
    user, item, rank = (
        torch.from_numpy(table[name].to_numpy().copy()) for name in (columns.USER_ID, columns.ITEM_ID, "rank0")
    )
    return RankedSplit("test", user.long(), item.long(), rank)


def _metrics(result: Mapping[str, Any], settings: Settings) -> dict[str, dict[str, float]]:
    found = {"valid": result["metrics"]["valid"], "test": result["metrics"]["test"]}
    for name, values in result.get("yardsticks", {}).items():
        found[name] = values["test"]
    published = _published(result, settings)
    if published is not None:
        found["published"] = published.test
    return found


def _published(result: Mapping[str, Any], settings: Settings) -> PublishedResult | None:
    """The published run that ours can be held against: same model, domain, item bias and split."""
    if result["model"] != "mmm4rec" or settings.data.split != "leave_one_out":
        return None
    return published_result(result["domain"], item_bias=settings.model.item_bias)


def _curve(run: Run, metric: str) -> Curve:
    rows = run.epochs
    try:
        return Curve(
            seed=run.settings.runtime.seed,
            epochs=[row["epoch"] for row in rows],
            loss=[row["loss"] for row in rows],
            valid=[row["valid"][metric] for row in rows],
            best_epoch=int(run.result["best_epoch"]),
        )
    except KeyError as error:
        raise RunError(f"{run.path / 'metrics.jsonl'} lacks {error}", hint="train again") from None


def _mean_segments(seeds: list[Segments]) -> Segments:
    return {
        kind: {group: {m: mean(one[kind][group][m] for one in seeds) for m in values} for group, values in rows.items()}
        for kind, rows in seeds[0].items()
    }


def _changed(document: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    def leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, below in value.items():
            if isinstance(below, Mapping):
                yield from leaves(below, f"{prefix}{name}.")
            else:
                yield prefix + name, below

    defaults = dict(leaves(Settings().model_dump(mode="json")))
    for path, value in leaves(document):
        if value != defaults.get(path):
            yield path, _shown(value), _shown(defaults.get(path))


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _health(dataset: Dataset, split: Split) -> list[tuple[str, str]]:
    """Name and share, in the order shown."""
    sequences, tests = dataset.sequences, split.test
    positions = sequences.all_targets()
    has_text, has_image = dataset.features.has_text[1:], dataset.features.has_image[1:]
    rows = [
        ("events with the same time stamp as the one before", float(sequences.tied(positions).double().mean())),
        ("test targets tied in time with the event before", float(sequences.tied(tests).double().mean())),
        ("test targets that repeat an item of the history", float(sequences.repeated(tests).double().mean())),
        ("items without a text vector", float(1 - has_text.mean())),
        ("items without an image vector", float(1 - has_image.mean())),
        ("training events later than the test target (leakage)", later_share(dataset, split, tests)),
    ]
    return [(name, f"{share:.1%}") for name, share in rows]
