"""Pre-training on one mix or several domains over every element, no validation (spec 8)."""

import shutil
from collections.abc import Sequence
from typing import Any

import torch

from mmm4rec_cli.data.dataset import Dataset, load_dataset
from mmm4rec_cli.data.sequences import placed
from mmm4rec_cli.device import resolve_device
from mmm4rec_cli.errors import DataError
from mmm4rec_cli.features.store import encoder_name
from mmm4rec_cli.models.registry import build_model, check_model
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.runs import Run
from mmm4rec_cli.settings.schema import Settings
from mmm4rec_cli.training.loop import Task, fit
from mmm4rec_cli.training.start import identity, machine, open_run, training_in
from mmm4rec_cli.workspace import Workspace
from mmm4rec_cli.world import join


def pretrain(
    workspace: Workspace,
    domains: Sequence[str],
    settings: Settings,
    *,
    model: str = "mmm4rec",
    resume: Run | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Train on every next item of every user of all domains; returns the content of `result.json`.

    Raises:
        DataError: a domain is not preprocessed, or holds no sequence.
        RunError: the run to resume is of other data, or the loss stopped being finite.
    """
    check_model(model)
    dataset = load_dataset(workspace, domains, encoder_name(settings.features))
    return pretrain_on(workspace, dataset, settings, model=model, resume=resume, reporter=reporter)


def pretrain_on(
    workspace: Workspace,
    dataset: Dataset,
    settings: Settings,
    *,
    model: str = "mmm4rec",
    resume: Run | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """As `pretrain`, on a data set that is at hand; runs lie in the workspace all the same."""
    device = resolve_device(settings.runtime.device)
    targets = dataset.sequences.all_targets()
    if not len(targets):
        raise DataError(f"{dataset.name} holds no user with two interactions", hint="add data")
    plan, seed = settings.pretrain, settings.runtime.seed if resume is None else resume.about["seeds"][0]
    about = identity("pretrain", dataset, model, [seed], None)
    world = join(device)
    run = open_run(workspace, dataset, settings, about, resume, world)
    with training_in(run, reporter or SilentReporter(), world) as log:
        places = float(dataset.sequences.lengths(targets, settings.model.max_len).double().mean())
        log.note(
            f"pre-train on {dataset.name}: {dataset.n_users:,} users, {dataset.n_items:,} items, "
            f"{len(targets):,} targets, windows of {places:.1f} places on average; run {run.short_id}"
        )
        if plan.seeded:
            torch.manual_seed(seed)
        else:
            torch.manual_seed(world.first_says(torch.seed()))
        network = build_model(model, settings.model, dataset.model_features(settings.features.missing)).to(device)
        sequences = placed(dataset.sequences, device, log)
        targets = targets.to(sequences.items_N.device)
        in_batch = plan.loss == "in_batch"
        task = Task("pretrain", plan, targets=targets, in_batch=in_batch, save_every=plan.save_every)
        progress = fit(
            network,
            sequences,
            task,
            run,
            max_len=settings.model.max_len,
            runtime=settings.runtime,
            reporter=log,
            world=world,
        )
        result = {
            "run": run.id,
            "domain": dataset.name,
            "model": model,
            "best_epoch": progress.best_epoch,
            "epochs": progress.epoch,
            "seconds": progress.seconds,
            "pretrained": None,
            "loss": progress.history[-1]["loss"],
            "metrics": {},
            "seeds": [seed],
            "n_users": dataset.n_users,
            "n_items": dataset.n_items,
            "n_targets": len(targets),
            "encoder": dataset.encoder,
            "encoder_fingerprint": dataset.features.fingerprint,
            "data_fingerprint": dataset.fingerprint,
            **machine(device, world),
        }
        if world.first:
            run.write("result.json", result)
            shutil.rmtree(run.path / "state", ignore_errors=True)
    return result
