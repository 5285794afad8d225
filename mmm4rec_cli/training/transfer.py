"""From a pre-trained model to a new domain: what is taken over, what is dropped (spec 9)."""

from dataclasses import dataclass
from pathlib import Path

from mmm4rec_cli.errors import RunError, UsageError
from mmm4rec_cli.models.interface import SequenceModel
from mmm4rec_cli.models.mmm4rec import MMM4Rec
from mmm4rec_cli.models.published import read_checkpoint
from mmm4rec_cli.reporter import Reporter
from mmm4rec_cli.runs import PER_ITEM, Run, find_run, newest_run, read_weights
from mmm4rec_cli.settings.schema import ModelSettings
from mmm4rec_cli.workspace import Workspace

_DROPPED = (*PER_ITEM, "fusion_weight")
_DROPPED_PUBLISHED = (
    "text_item_embedding_bias",
    "vision_item_embedding_bias",
    "text_embedding",
    "vision_embedding",
    "fusion_factor",
)
_FREE = {  # fields of the model section in which pre-training and fine-tuning may differ
    "num_layers",
    "item_bias",
    "fusion",
    "temperature",
    "dropout",
    "embedding_dropout",
    "time_dropout",
    "padding_candidate",
    "mask_duplicate_labels",
}
_ADAPTERS = (
    *("text.adapter.", "image.adapter.", "text.norm.", "image.norm.", "text.shift", "image.shift", "text.scale"),
    *("image.scale", "text_adapter.", "vision_adapter.", "text_in_layer_norm.", "vision_in_layer_norm."),
)
"""Beginnings of the names, ours and the published ones, of what `transfer = adapters` takes over."""
_MISMATCH = "fine-tune with the pre-training's model settings and encoder, or with --pretrained none"


@dataclass(frozen=True)
class Source:
    """Where pre-trained weights come from."""

    label: str
    """The run's id or the file's name; kept in the result."""
    weights: Path
    published: bool
    """A checkpoint in the published format and names."""


def fits(run: Run, model: str, config: ModelSettings, encoder_fingerprint: str) -> bool:
    """Whether the weights of a pre-training run can be taken over by a model of these settings."""
    about = run.about
    if about["model"] != model or about["encoder_fingerprint"] != encoder_fingerprint:
        return False
    old, new = run.settings.model.model_dump(), config.model_dump()
    return all(old[name] == new[name] for name in new.keys() - _FREE)


def choose_source(
    workspace: Workspace,
    given: str | None,
    model: str,
    config: ModelSettings,
    encoder_fingerprint: str,
    widths: tuple[int, int],
) -> Source | None:
    """The source that the user named, or the newest pre-training run that fits, or published weights, or nothing.

    Args:
        workspace: where runs lie.
        given: a run, a published checkpoint file, `none`, or None for the default.
        model: name of the model that will take the weights.
        config: its settings.
        encoder_fingerprint: identity of the item vectors.
        widths: width of the text and of the image vectors.

    Raises:
        RunError: the run is not there or not finished.
        UsageError: the file is not there.
    """
    if given == "none":
        return None
    if given is None:
        run = newest_run(workspace, "pretrain", fits=lambda run: fits(run, model, config, encoder_fingerprint))
        if run is not None:
            return _of_run(run)
        files = sorted(workspace.weights.glob("*.ckpt")) if model == "mmm4rec" else []
        downloaded = (
            Source(path.name, path, published=True) for path in files if _fits_published(path, config, widths)
        )
        return next(downloaded, None)
    path = Path(given)
    if (workspace.weights / given).is_file():
        path = workspace.weights / given
    if path.suffix in (".ckpt", ".pth", ".pt"):
        if not path.is_file():
            raise UsageError(f"--pretrained {given}: no such file", hint="give a run, a checkpoint file or none")
        return Source(label=path.name, weights=path, published=True)
    run = find_run(workspace, given)
    if not run.finished:
        raise RunError(f"run {run.id} is not finished", hint="finish it with --resume, or choose another run")
    return _of_run(run)


def _fits_published(path: Path, config: ModelSettings, widths: tuple[int, int]) -> bool:
    weights = read_checkpoint(path)
    wanted = {
        "text_adapter.0.weight": [config.hidden_size, widths[0]],
        "vision_adapter.0.weight": [config.hidden_size, widths[1]],
        "layer_norm_time.weight": [config.max_len],
        "encoder_ssd_layers.0.ssd.A_log": [config.n_heads],
    }
    return all(name in weights and list(weights[name].shape) == shape for name, shape in wanted.items())


def _of_run(run: Run) -> Source:
    return Source(label=run.id, weights=run.weights, published=False)


def frozen_parameters(model: SequenceModel) -> list[str]:
    """The adapters, which `frozen_epochs` keeps as they were taken over."""
    return [name for name, _ in model.named_parameters() if name.startswith(("text.adapter.", "image.adapter."))]


def _wanted(name: str, what: str) -> bool:
    return what == "all" or name.startswith(_ADAPTERS) == (what == "adapters")


def transfer(model: SequenceModel, source: Source, reporter: Reporter, what: str = "all") -> None:
    """Take over the source's weights and say which names were kept, dropped and left at their start values.

    Item biases, per-item or shared fusion weights and feature tables stay behind; so do layers that the model does not
    have. Layers that the source does not have keep their random start.

    Args:
        model: takes the weights.
        source: where they lie.
        reporter: told the names.
        what: `all`, `adapters` (with their norms) or `blocks` (all but these).

    Raises:
        RunError: a tensor of another shape, or nothing to take over.
    """
    if source.published:
        kept, dropped, fresh = _transfer_published(model, source.weights, what)
    else:
        weights = read_weights(source.weights)
        own = model.state_dict()
        given = {name: tensor for name, tensor in weights.items() if name not in _DROPPED and _wanted(name, what)}
        taken = {name: tensor for name, tensor in given.items() if name in own}
        wrong = [
            f"{name}: {source.label} holds {[*tensor.shape]}, the model takes {[*own[name].shape]}"
            for name, tensor in taken.items()
            if tensor.shape != own[name].shape
        ]
        if wrong:
            raise RunError(*wrong[:5], hint=_MISMATCH)
        model.load_state_dict(taken, strict=False)
        kept, dropped, fresh = sorted(taken), sorted(weights.keys() - taken), sorted(own.keys() - taken)
    if not kept:
        raise RunError(f"nothing of {source.label} fits this model", hint=_MISMATCH)
    reporter.note(f"taken over from {source.label}: {len(kept)} tensors")
    for what, names in (("left behind", dropped), ("starting fresh", fresh)):
        if names:
            reporter.note(f"{what}: {', '.join(_shortened(names))}")


def _transfer_published(model: SequenceModel, path: Path, what: str) -> tuple[list[str], list[str], list[str]]:
    if not isinstance(model, MMM4Rec):
        raise RunError("published weights are MMM4Rec's", hint="use --model mmm4rec, or --pretrained none")
    weights = read_checkpoint(path)
    given = {n: tensor for n, tensor in weights.items() if n not in _DROPPED_PUBLISHED and _wanted(n, what)}
    try:
        report = model.load_published(given)
    except ValueError as error:
        raise RunError(*str(error).splitlines()[:5], hint=_MISMATCH) from None
    kept = sorted(given.keys() - set(report.unexpected))
    return kept, sorted(weights.keys() - set(kept)), list(report.missing)


def _shortened(names: list[str]) -> list[str]:
    """Fold the tensors of one layer into one name."""
    folded = dict.fromkeys(".".join([*name.split(".")[:2], "*"]) if "layers." in name else name for name in names)
    return list(folded)
