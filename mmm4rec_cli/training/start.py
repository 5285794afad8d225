"""Open a run: a new one, the interrupted one that the same command left behind, or the one asked for."""

import fcntl
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from mmm4rec_cli import __version__
from mmm4rec_cli.data.dataset import Dataset
from mmm4rec_cli.errors import RunError
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.runs import Run, all_runs, new_run, save_catalogue
from mmm4rec_cli.settings.schema import Settings
from mmm4rec_cli.training.log import LoggedReporter
from mmm4rec_cli.workspace import Workspace
from mmm4rec_cli.world import World

TRAINED_WITH = ("protocol", "data", "features", "model", "pretrain", "finetune")
"""Sections that belong to a run; `evaluate` and `runtime` belong to the invocation."""


def identity(command: str, dataset: Dataset, model: str, seeds: list[int], pretrained: str | None) -> dict[str, Any]:
    """What makes two trainings the same one, besides their settings."""
    return {
        "command": command,
        "domain": dataset.name,
        "domains": list(dataset.domains),
        "model": model,
        "seeds": seeds,
        "pretrained": pretrained,
        "encoder": dataset.encoder,
        "encoder_fingerprint": dataset.features.fingerprint,
        "data_fingerprint": dataset.fingerprint,
    }


def open_run(
    workspace: Workspace,
    dataset: Dataset,
    settings: Settings,
    about: Mapping[str, Any],
    resume: Run | None,
    world: World | None = None,
) -> Run:
    """The run to train in; with several processes the first one opens it for all.

    Args:
        workspace: where runs lie.
        dataset: what is trained on.
        settings: resolved settings; with `resume` those of the run.
        about: see `identity`.
        resume: the run that was asked for, or None: an unfinished run of the same identity and settings that nobody
            trains in is gone on with, else a new one is made.
        world: the processes that train in it.

    Raises:
        RunError: the run is finished, or of other data, features or seeds.
    """
    world = world or World()
    opened = _open(workspace, dataset, settings, about, resume).path if world.first else None
    return Run(world.first_says(opened))


def _open(
    workspace: Workspace, dataset: Dataset, settings: Settings, about: Mapping[str, Any], resume: Run | None
) -> Run:
    document = settings.model_dump(mode="json")
    if resume is not None:
        _check_resumable(resume, about)
        return resume
    for run in all_runs(workspace, about["command"], dataset.name):
        if not run.finished and run.about == about and _same(run.settings_document, document) and _free(run):
            if _has_state(run):
                return run
            break
    run = new_run(workspace, about["command"], dataset.name)
    run.write("settings.json", document)
    save_catalogue(run.path / "catalogue.parquet", dataset.raw_item_ids)
    run.write("run.json", dict(about))
    return run


def seed_run(group: Run, seed: int, settings: Settings, dataset: Dataset, world: World) -> Run:
    """The folder of one seed in a run over several, as whole as any run's."""
    run = Run(group.path / f"seed-{seed}")
    if world.first and not (run.path / "run.json").is_file():
        run.path.mkdir(exist_ok=True)
        run.write("settings.json", settings.model_dump(mode="json"))
        save_catalogue(run.path / "catalogue.parquet", dataset.raw_item_ids)
        run.write("run.json", {**group.about, "seeds": [seed]})
    return run


def _same(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return all(old.get(name) == new[name] for name in TRAINED_WITH)


def _has_state(run: Run) -> bool:
    return any(run.path.glob("**/state/training.safetensors")) or any(run.path.glob("seed-*/result.json"))


def _check_resumable(run: Run, about: Mapping[str, Any]) -> None:
    if run.finished:
        raise RunError(f"run {run.id} is finished", hint="leave --resume away to train again")
    old = run.about
    names = {"data_fingerprint": "data", "encoder_fingerprint": "item vectors", "domain": "domain", "model": "model"}
    wrong = [what for key, what in names.items() if old.get(key) != about[key]]
    if wrong:
        raise RunError(
            f"run {run.id} was started on other {' and '.join(wrong)}",
            hint="resume on what it was started on, or start a new run without --resume",
        )


def _free(run: Run) -> bool:
    try:
        with _locked(run):
            return True
    except RunError:
        return False


@contextmanager
def _locked(run: Run) -> Iterator[None]:
    handle = os.open(run.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"run {run.id} is being trained by another process", hint="wait for it, or start a new run"
            ) from None
        yield
    finally:
        os.close(handle)


@contextmanager
def training_in(run: Run, reporter: Reporter, world: World) -> Iterator[Reporter]:
    """Hold the run's lock and log to its `output.log`; a run that fails before anything was saved leaves nothing.

    Raises:
        RunError: another training runs in it.
    """
    if not world.first:
        yield SilentReporter()
        return
    with _locked(run):
        try:
            yield LoggedReporter(reporter, run.path / "output.log")
        except BaseException:
            if not _has_state(run) and not any(f.stat().st_size for f in run.path.glob("**/metrics.jsonl")):
                shutil.rmtree(run.path)
            raise


def machine(device: torch.device, world: World) -> dict[str, Any]:
    """Hardware and versions for `result.json`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "hardware": {
            "device": device.type,
            "name": name,
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processes": world.size,
        },
        "versions": {
            "mmm4rec": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }
