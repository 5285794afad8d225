"""Evaluate a finished run: the document of `evaluate --json`, with the yardsticks beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

from mmm4rec_cli.data.dataset import Dataset, load_dataset
from mmm4rec_cli.device import resolve_device
from mmm4rec_cli.errors import DataError, RunError
from mmm4rec_cli.evaluation.evaluate import Ranking, rank_by_popularity, rank_split
from mmm4rec_cli.evaluation.metrics import summary
from mmm4rec_cli.evaluation.rank_files import write_ranks
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.runs import Run, load_model
from mmm4rec_cli.settings.schema import Settings
from mmm4rec_cli.workspace import Workspace


@dataclass(frozen=True)
class _Evaluated:
    metrics: dict[str, float]
    masked: dict[str, float] | None


def evaluate_run(
    workspace: Workspace,
    run: Run,
    settings: Settings,
    *,
    split: str = "test",
    mask_seen: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Rank a split with a run's best weights (every seed of it) on the present tables.

    Unmasked ranks go to each run's `ranks.parquet`; an item of the history is hidden only in the masked figures, and
    the target never.

    Args:
        workspace: where data lie.
        run: a finished run.
        settings: the run's, with `evaluate` and `runtime` of the invocation.
        split: `valid` or `test`.
        mask_seen: give the figures with seen items hidden, and the others beside them.
        reporter: progress and notes.

    Raises:
        DataError: the run's domain is no longer there.
        RunError: the run is unfinished, damaged, or does not fit the present tables.
    """
    about = run.about
    if not run.finished and about["command"] != "evaluate":
        raise RunError(f"run {run.id} is not finished", hint="finish it with --resume, or choose another run")
    reporter = reporter or SilentReporter()
    dataset = _dataset(workspace, run, about["domains"], about["encoder"])
    members = [
        _evaluate_one(member, dataset, settings, split, mask_seen=mask_seen, reporter=reporter)
        for member in run.members
    ]
    cutoffs, ties = settings.evaluate.k, settings.evaluate.ties
    sequences = dataset.sequences
    targets = sequences.held_out(split)
    popular = rank_by_popularity(sequences, split, dataset.n_items, ties)
    chosen = [one.masked if one.masked is not None else one.metrics for one in members]
    document: dict[str, Any] = {
        "run": run.id,
        "domain": dataset.name,
        "split": split,
        "model": about["model"],
        "n_users": len(targets),
        "n_items": dataset.n_items,
        "metrics": _over(chosen, mean),
        "ties": ties,
        "mask_seen": mask_seen,
        "segments": {},
        "yardsticks": {"popularity": summary(popular.rank0_U, cutoffs)},
        "repeated_targets": float(sequences.repeated(targets).double().mean()),
        "tied_targets": float(sequences.tied(targets).double().mean()),
    }
    if mask_seen:
        document["metrics_unmasked"] = _over([one.metrics for one in members], mean)
    if len(members) > 1:
        document["seeds"] = about["seeds"]
        document["metrics_mean"], document["metrics_sd"] = _over(chosen, mean), _over(chosen, stdev)
    return document


def _dataset(workspace: Workspace, run: Run, domains: Sequence[str], encoder: str) -> Dataset:
    try:
        return load_dataset(workspace, domains, encoder)
    except DataError as error:
        gone = [domain for domain in domains if not (workspace.processed(domain) / "manifest.json").is_file()]
        if not gone:
            raise
        raise RunError(
            f"run {run.id} needs the domain {', '.join(gone)}, which is no longer there", hint=error.hint
        ) from None


def _over(rows: Sequence[dict[str, float]], statistic: Any) -> dict[str, float]:
    return {name: statistic([row[name] for row in rows]) for name in rows[0]}


def _evaluate_one(
    run: Run, dataset: Dataset, settings: Settings, split: str, *, mask_seen: bool, reporter: Reporter
) -> _Evaluated:
    device = resolve_device(settings.runtime.device)
    model, moved = load_model(run, dataset, device)
    if moved.new or moved.gone:
        reporter.note(
            f"the catalogue has changed since run {run.id}: {moved.kept:,} items kept, {moved.new:,} new "
            f"(item bias zero), {moved.gone:,} gone"
        )
    ranking = Ranking(
        ties=settings.evaluate.ties,
        padding_candidate=settings.model.padding_candidate,
        batch_size=settings.evaluate.batch_size,
        precision=settings.runtime.precision,
    )
    sequences, max_len = dataset.sequences.to(device), settings.model.max_len
    ranked = rank_split(model, sequences, split, max_len, ranking, reporter=reporter)
    write_ranks(run.path / "ranks.parquet", [ranked])
    masked = None
    if mask_seen:
        hidden = rank_split(model, sequences, split, max_len, replace(ranking, mask_seen=True), reporter=reporter)
        masked = summary(hidden.rank0_U, settings.evaluate.k)
    return _Evaluated(summary(ranked.rank0_U, settings.evaluate.k), masked)
