"""Evaluate a finished run: the document of `evaluate --json`, with the yardsticks beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any

import torch

from mmm4rec_cli.data.dataset import Dataset, load_dataset
from mmm4rec_cli.data.sequences import Split, placed
from mmm4rec_cli.device import resolve_device
from mmm4rec_cli.errors import DataError, RunError
from mmm4rec_cli.evaluation.compare import paired_bootstrap
from mmm4rec_cli.evaluation.evaluate import (
    RankedSplit,
    Ranking,
    rank_by_popularity,
    rank_by_repeating,
    rank_split,
)
from mmm4rec_cli.evaluation.metrics import summary
from mmm4rec_cli.evaluation.rank_files import write_ranks
from mmm4rec_cli.evaluation.segments import segment_metrics
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.runs import Run, load_model
from mmm4rec_cli.settings.schema import Settings
from mmm4rec_cli.workspace import Workspace
from mmm4rec_cli.world import first_process, join


@dataclass(frozen=True)
class _Ranked:
    plain: RankedSplit
    masked: RankedSplit | None


def evaluate_run(
    workspace: Workspace,
    run: Run,
    settings: Settings,
    *,
    split: str = "test",
    mask_seen: bool = False,
    segments: Sequence[str] = (),
    compare: Run | None = None,
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
        mask_seen: give the figures with seen items hidden (popularity's too), and the model's others beside them.
        segments: kinds of segments (`mmm4rec_cli.evaluation.segments`) to measure too.
        compare: another run of the same domain: differences with a paired bootstrap over users.
        reporter: progress and notes.

    Raises:
        DataError: the run's domain is not whole.
        RunError: a run is unfinished, damaged, of a removed domain, or does not fit the present tables.
    """
    about = run.about
    check_finished(run)
    reporter = reporter or SilentReporter()
    dataset = run_dataset(workspace, run)
    sequences = dataset.sequences
    held_out = sequences.split(settings.data.split, settings.data.split_share)
    targets = held_out.targets(split)

    members = _rank_members(run, dataset, held_out, settings, split, mask_seen, reporter)
    for member, ranked in zip(run.members, members, strict=True):
        if first_process():
            write_ranks(member.path / "ranks.parquet", [ranked.plain])
    chosen = [one.masked if one.masked is not None else one.plain for one in members]
    cutoffs, ties = settings.evaluate.k, settings.evaluate.ties
    rows = [summary(one.rank0_U, cutoffs) for one in chosen]
    popular = rank_by_popularity(
        sequences, held_out.known_N, targets, split, dataset.n_items, ties, mask_seen=mask_seen
    )
    repeated = rank_by_repeating(sequences, targets, split, dataset.n_items, ties)
    document: dict[str, Any] = {
        "run": run.id,
        "domain": dataset.name,
        "split": split,
        "model": about["model"],
        "n_users": len(targets),
        "n_items": dataset.n_items,
        "metrics": _over(rows, mean),
        "ties": ties,
        "mask_seen": mask_seen,
        "segments": _over_groups([segment_metrics(segments, one, dataset, held_out, cutoffs) for one in chosen]),
        "yardsticks": {
            "popularity": summary(popular.rank0_U, cutoffs),
            "repeat last": summary(repeated.rank0_U, cutoffs),
        },
        "data_split": held_out.kind,
        "repeated_targets": float(sequences.repeated(targets).double().mean()),
        "tied_targets": float(sequences.tied(targets).double().mean()),
        "trained_on_later": later_share(dataset, held_out, targets),
    }
    if mask_seen:
        unmasked = [summary(one.plain.rank0_U, cutoffs) for one in members]
        document["metrics_unmasked"] = _over(unmasked, mean)
        if len(members) > 1:
            document["metrics_unmasked_sd"] = _over(unmasked, stdev)
        # What repeats the last item has nothing left to say where seen items are hidden.
        del document["yardsticks"]["repeat last"]
    if len(members) > 1:
        document["seeds"] = about["seeds"]
        document["metrics_mean"], document["metrics_sd"] = document["metrics"], _over(rows, stdev)
    if compare is not None:
        others = _rank_other(workspace, compare, dataset, held_out, settings, split, mask_seen, reporter)
        document["compared_with"] = compare.id
        ours, theirs = ([one.rank0_U for one in ranked] for ranked in (chosen, others))
        document["compare"] = paired_bootstrap(ours, theirs, cutoffs, settings.runtime.seed)
    return document


def later_share(dataset: Dataset, held_out: Split, targets: torch.Tensor) -> float:
    """How much of what was trained on happened after the target, on average: the leakage of leave-one-out."""
    times = dataset.sequences.times_N
    known = times[held_out.known_N].sort().values
    if not len(known):
        return 0.0
    later = len(known) - torch.searchsorted(known, times[targets], right=True)
    return float((later / len(known)).double().mean())


def check_finished(run: Run) -> None:
    """Raise RunError unless the run came to its end or is an adopted checkpoint."""
    if not run.finished and run.about["command"] != "evaluate":
        raise RunError(f"run {run.id} is not finished", hint="finish it with --resume, or choose another run")


def run_dataset(workspace: Workspace, run: Run) -> Dataset:
    """The present tables and vectors of what a run was trained on.

    Raises:
        RunError: a domain of the run has been removed.
        DataError: the files there are not whole.
    """
    about = run.about
    try:
        return load_dataset(workspace, about["domains"], about["encoder"])
    except DataError as error:
        gone = [name for name in about["domains"] if not (workspace.processed(name) / "manifest.json").is_file()]
        if not gone:
            raise
        raise RunError(
            f"run {run.id} needs the domain {', '.join(gone)}, which is no longer there", hint=error.hint
        ) from None


def _over(rows: Sequence[dict[str, float]], statistic: Any) -> dict[str, float]:
    return {name: statistic([row[name] for row in rows]) for name in rows[0]}


def _over_groups(members: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, float]]]:
    first = members[0]
    return {k: {g: _over([member[k][g] for member in members], mean) for g in groups} for k, groups in first.items()}


def _rank_other(
    workspace: Workspace,
    other: Run,
    dataset: Dataset,
    held_out: Split,
    settings: Settings,
    split: str,
    mask_seen: bool,
    reporter: Reporter,
) -> list[RankedSplit]:
    """The other run's ranks of the same targets, by its own settings but for how ranks are counted."""
    check_finished(other)
    own = other.settings
    if other.about["domains"] != list(dataset.domains) or own.data.split != settings.data.split:
        raise RunError(
            f"run {other.id} is of {other.about['domain']} ({own.data.split}), not of {dataset.name} "
            f"({settings.data.split}): there are no pairs to compare",
            hint="compare runs of one domain and one split",
        )
    own = own.model_copy(update={"evaluate": settings.evaluate, "runtime": settings.runtime})
    same_vectors = other.about["encoder"] == dataset.encoder
    theirs = dataset if same_vectors else run_dataset(workspace, other)
    ranked = _rank_members(other, theirs, held_out, own, split, mask_seen, reporter)
    return [one.masked if one.masked is not None else one.plain for one in ranked]


def _rank_members(
    run: Run,
    dataset: Dataset,
    held_out: Split,
    settings: Settings,
    split: str,
    mask_seen: bool,
    reporter: Reporter,
) -> list[_Ranked]:
    """Rank with every seed of a run."""
    device = resolve_device(settings.runtime.device)
    world = join(device)
    sequences = placed(dataset.sequences, device, reporter)
    targets = held_out.targets(split).to(sequences.items_N.device)
    max_len = settings.model.max_len
    ranking = Ranking(
        ties=settings.evaluate.ties,
        padding_candidate=settings.model.padding_candidate,
        batch_size=settings.evaluate.batch_size,
        precision=settings.runtime.precision,
    )
    ranked = []
    for member in run.members:
        model, moved = load_model(member, dataset, device)
        if moved.new or moved.gone:
            reporter.note(
                f"the catalogue has changed since run {member.id}: {moved.kept:,} items kept, {moved.new:,} new "
                f"(item bias zero), {moved.gone:,} gone"
            )
        plain = rank_split(model, sequences, targets, split, max_len, ranking, reporter=reporter, world=world)
        masked = None
        if mask_seen:
            hidden = replace(ranking, mask_seen=True)
            masked = rank_split(model, sequences, targets, split, max_len, hidden, reporter=reporter, world=world)
        ranked.append(_Ranked(plain, masked))
    return ranked
