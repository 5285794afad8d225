"""Fine-tuning on one domain: full softmax, validation after every epoch, one test with the best weights (spec 5)."""

import shutil
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import torch

from mmm4rec_cli.data.dataset import Dataset, load_dataset
from mmm4rec_cli.data.sequences import Split, placed
from mmm4rec_cli.device import resolve_device
from mmm4rec_cli.errors import DataError, UsageError
from mmm4rec_cli.evaluation.evaluate import RankedSplit, Ranking, rank_by_popularity, rank_by_repeating, rank_split
from mmm4rec_cli.evaluation.metrics import summary
from mmm4rec_cli.evaluation.rank_files import write_ranks
from mmm4rec_cli.features.store import encoder_name
from mmm4rec_cli.models.registry import build_model, check_model
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.runs import Run, load_weights, read_weights
from mmm4rec_cli.settings.schema import Settings
from mmm4rec_cli.training.loop import Task, fit
from mmm4rec_cli.training.start import identity, machine, open_run, seed_run, training_in
from mmm4rec_cli.training.transfer import Source, choose_source, frozen_parameters, transfer
from mmm4rec_cli.workspace import Workspace
from mmm4rec_cli.world import World, join


def finetune(
    workspace: Workspace,
    domain: str,
    settings: Settings,
    *,
    model: str = "mmm4rec",
    pretrained: str | None = None,
    seeds: Sequence[int] = (),
    time_is_set: bool = False,
    resume: Run | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Train on one domain and test; returns the content of `result.json`.

    Args:
        workspace: where data and runs lie.
        domain: a preprocessed domain.
        settings: resolved settings.
        model: name in the registry.
        pretrained: a pre-training run, a published checkpoint, `none`, or None: the newest run that fits.
        seeds: one run a seed and the mean over them; empty: `runtime.seed` alone.
        time_is_set: `model.time` was chosen by the user; otherwise published weights set it to `published`.
        resume: an unfinished run to go on with.
        reporter: progress and notes.

    Raises:
        DataError: the domain is not preprocessed, or too small to train and to hold out.
        RunError: weights or the run to resume do not fit, or the loss stopped being finite.
    """
    check_model(model)
    dataset = load_dataset(workspace, [domain], encoder_name(settings.features))
    return finetune_on(
        workspace,
        dataset,
        settings,
        model=model,
        pretrained=pretrained,
        seeds=seeds,
        time_is_set=time_is_set,
        resume=resume,
        reporter=reporter,
    )


def finetune_on(
    workspace: Workspace,
    dataset: Dataset,
    settings: Settings,
    *,
    model: str = "mmm4rec",
    pretrained: str | None = None,
    seeds: Sequence[int] = (),
    time_is_set: bool = False,
    resume: Run | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """As `finetune`, on a data set that is at hand; runs lie in the workspace all the same."""
    device = resolve_device(settings.runtime.device)
    world = join(device)
    reporter = reporter or SilentReporter()
    split = dataset.sequences.split(settings.data.split, settings.data.split_share)
    if not len(split.train):
        raise DataError(
            f"{dataset.name} holds no training example: no user has two interactions to train on",
            hint="add data, or raise data.min_user",
        )
    seeds = list(dict.fromkeys(seeds)) or [settings.runtime.seed]
    if resume is not None:
        seeds, pretrained = resume.about["seeds"], pretrained or resume.about["pretrained"] or "none"
    widths = dataset.features.text.shape[1], dataset.features.image.shape[1]
    source = choose_source(workspace, pretrained, model, settings.model, dataset.features.fingerprint, widths)
    if source is not None and source.published and settings.model.time != "published" and not time_is_set:
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"time": "published"})})
        reporter.note("published weights read the target's own time: model.time = published")
    if source is not None:
        reporter.note(f"starting from {'published weights' if source.published else 'pre-training run'} {source.label}")
    else:
        reporter.note("starting from scratch" + ("" if pretrained == "none" else ": no pre-training run fits"))
    about = identity("finetune", dataset, model, list(seeds), None if source is None else source.label)
    run = open_run(workspace, dataset, settings, about, resume, world)
    if len(seeds) == 1:
        return _finetune(run, dataset, _with_seed(settings, seeds[0]), model, source, device, world, reporter)
    results = []
    with training_in(run, reporter, world) as log:
        for seed in seeds:
            one = _with_seed(settings, seed)
            member = seed_run(run, seed, one, dataset, world)
            done = world.first_says(member.result if world.first and member.finished else None)
            results.append(done or _finetune(member, dataset, one, model, source, device, world, log))
        result = over_seeds(run, results)
        if world.first:
            run.write("result.json", result)
    return result


def over_seeds(run: Run, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means (and sample standard deviations) of several seeds' results."""
    splits = results[0]["metrics"]

    def gather(statistic: Any) -> dict[str, dict[str, float]]:
        return {s: {m: statistic([r["metrics"][s][m] for r in results]) for m in splits[s]} for s in splits}

    return {
        **results[0],
        "run": run.id,
        "best_epoch": mean(r["best_epoch"] for r in results),
        "epochs": mean(r["epochs"] for r in results),
        "seconds": sum(r["seconds"] for r in results),
        "metrics": gather(mean),
        "metrics_sd": gather(stdev),
        "seeds": [r["seeds"][0] for r in results],
        "runs": [r["run"] for r in results],
    }


def _with_seed(settings: Settings, seed: int) -> Settings:
    return settings.model_copy(update={"runtime": settings.runtime.model_copy(update={"seed": seed})})


def _finetune(
    run: Run,
    dataset: Dataset,
    settings: Settings,
    model: str,
    source: Source | None,
    device: torch.device,
    world: World,
    reporter: Reporter,
) -> dict[str, Any]:
    plan, max_len = settings.finetune, settings.model.max_len
    sequences = placed(dataset.sequences, device, reporter)
    split = dataset.sequences.split(settings.data.split, settings.data.split_share).to(sequences.items_N.device)
    targets = split.train
    ranking = Ranking(
        ties=settings.evaluate.ties,
        padding_candidate=settings.model.padding_candidate,
        batch_size=settings.evaluate.batch_size,
        precision=settings.runtime.precision,
    )
    held_out = {name: split.targets(name) for name in ("valid", "test")}
    cutoffs = {*settings.evaluate.k, *([int(plan.metric.split("@")[1])] if "@" in plan.metric else [])}
    with training_in(run, reporter, world) as log:
        places = float(sequences.lengths(targets, max_len).double().mean())
        log.note(
            f"fine-tune on {dataset.name}: {dataset.n_users:,} users, {dataset.n_items:,} items, "
            f"{len(targets):,} targets, windows of {places:.1f} places on average; seed {settings.runtime.seed}; "
            f"run {run.short_id}"
        )
        torch.manual_seed(settings.runtime.seed)
        network = build_model(model, settings.model, dataset.model_features(settings.features.missing))
        if network.remark:
            log.note(network.remark)
        if plan.loss == "sampled" and not network.item_rows:
            raise UsageError(
                f"finetune.loss = sampled: {model} computes its whole catalogue in every step",
                hint="use --set finetune.loss=in_batch or full, or --model mmm4rec",
            )
        if source is not None:
            transfer(network, source, log, plan.transfer)
        network.to(device)

        def validate() -> dict[str, float]:
            valid = held_out["valid"]
            order = torch.randperm(len(valid)) if plan.shuffle_validation else None
            ranked = rank_split(network, sequences, valid, "valid", max_len, ranking, order=order, world=world)
            return summary(ranked.rank0_U, cutoffs)

        task = Task(
            "finetune",
            plan,
            targets=targets,
            in_batch=plan.loss == "in_batch",
            negatives=plan.negatives if plan.loss == "sampled" else 0,
            validate=validate,
            metric=plan.metric,
            patience=plan.patience,
            frozen=() if source is None else frozen_parameters(network),
            frozen_epochs=plan.frozen_epochs,
        )
        progress = fit(
            network,
            sequences,
            task,
            run,
            max_len=max_len,
            runtime=settings.runtime,
            reporter=log,
            world=world,
        )
        world.first_says(None)  # the first process has written the weights
        load_weights(network, read_weights(run.weights), run.weights)
        ranked = {
            name: rank_split(network, sequences, positions, name, max_len, ranking, world=world)
            for name, positions in held_out.items()
        }
        result: dict[str, Any] = {}
        if world.first:
            write_ranks(run.path / "ranks.parquet", ranked.values())
            result = _result(run, dataset, settings, model, source, ranked, split)
            result |= {"best_epoch": progress.best_epoch, "epochs": progress.epoch, "seconds": progress.seconds}
            result |= machine(device, world)
            run.write("result.json", result)
            shutil.rmtree(run.path / "state", ignore_errors=True)
    said: dict[str, Any] = world.first_says(result)
    return said


def _result(
    run: Run,
    dataset: Dataset,
    settings: Settings,
    model: str,
    source: Source | None,
    ranked: dict[str, RankedSplit],
    split: Split,
) -> dict[str, Any]:
    cutoffs, ties = settings.evaluate.k, settings.evaluate.ties
    sequences, split = dataset.sequences, split.to(torch.device("cpu"))
    yardsticks: dict[str, dict[str, dict[str, float]]] = {"popularity": {}, "repeat last": {}}
    for name in ranked:
        targets = split.targets(name)
        popular = rank_by_popularity(sequences, split.known_N, targets, name, dataset.n_items, ties)
        repeated = rank_by_repeating(sequences, targets, name, dataset.n_items, ties)
        yardsticks["popularity"][name] = summary(popular.rank0_U, cutoffs)
        yardsticks["repeat last"][name] = summary(repeated.rank0_U, cutoffs)
    tests = split.test
    return {
        "run": run.id,
        "domain": dataset.name,
        "model": model,
        "best_epoch": 0,
        "epochs": 0,
        "seconds": 0.0,
        "pretrained": None if source is None else source.label,
        "metrics": {name: summary(r.rank0_U, cutoffs) for name, r in ranked.items()},
        "yardsticks": yardsticks,
        "seeds": [settings.runtime.seed],
        "ties": ties,
        "split": split.kind,
        "n_users": len(tests),
        "n_items": dataset.n_items,
        "repeated_targets": float(sequences.repeated(tests).double().mean()),
        "tied_targets": float(sequences.tied(tests).double().mean()),
        "encoder": dataset.encoder,
        "encoder_fingerprint": dataset.features.fingerprint,
        "data_fingerprint": dataset.fingerprint,
    }
