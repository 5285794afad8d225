"""A bare published checkpoint as a run, so that everything that takes a run takes it."""

from pathlib import Path

from mmm4rec_cli.data.dataset import Dataset
from mmm4rec_cli.errors import RunError
from mmm4rec_cli.models.mmm4rec import MMM4Rec
from mmm4rec_cli.models.published import read_checkpoint, sizes
from mmm4rec_cli.runs import Run, new_run, save_catalogue, save_weights
from mmm4rec_cli.settings.schema import Settings
from mmm4rec_cli.workspace import Workspace


def published_settings(path: Path, settings: Settings) -> Settings:
    """`settings` with the sizes of a published checkpoint; its time streams are always the published ones.

    Raises:
        RunError: the file is truncated or no such checkpoint.
    """
    model = settings.model.model_dump() | sizes(read_checkpoint(path))
    return Settings.model_validate(settings.model_dump() | {"model": model})


def adopt_checkpoint(workspace: Workspace, path: Path, dataset: Dataset, settings: Settings) -> Run:
    """Make `runs/evaluate/<domain>/<run id>/` from a published fine-tuning checkpoint.

    Args:
        workspace: where runs lie.
        path: the checkpoint; its items are the data set's, in the same order (the published item ids are ours).
        dataset: what it was trained on.
        settings: see `published_settings`.

    Raises:
        RunError: sizes that do not fit the data set, or weights missing in the file.
    """
    features = dataset.model_features(settings.features.missing)
    model = MMM4Rec(settings.model, features.text, features.image)
    try:
        report = model.load_published(read_checkpoint(path))
    except ValueError as error:
        raise RunError(*str(error).splitlines()[:5], hint=f"is {dataset.name} what it was trained on?") from None
    if report.missing:
        raise RunError(f"{path} lacks {', '.join(report.missing[:5])}", hint="a fine-tuned checkpoint is needed")
    run = new_run(workspace, "evaluate", dataset.name)
    run.write("settings.json", settings.model_dump(mode="json"))
    save_catalogue(run.path / "catalogue.parquet", dataset.raw_item_ids)
    save_weights(run.weights, model.state_dict())
    about = {
        "command": "evaluate",
        "domain": dataset.name,
        "domains": list(dataset.domains),
        "model": "mmm4rec",
        "seeds": [settings.runtime.seed],
        "pretrained": path.name,
        "encoder": dataset.encoder,
        "encoder_fingerprint": dataset.features.fingerprint,
        "data_fingerprint": dataset.fingerprint,
    }
    run.write("run.json", about)
    return run
