"""Runs: what one training left in the workspace, and how a model is brought back from it.

A run's folder holds `run.json` (what it is), `settings.json`, `model.safetensors` (best weights), `catalogue.parquet`,
`metrics.jsonl`, TensorBoard events, `output.log`, `state/` while it can be resumed, and, once finished, `result.json`.
A run over several seeds holds one such folder a seed (`seed-<n>/`) and a `result.json` with their means.

Listing runs reads JSON alone: torch and pyarrow are loaded by what reads or writes tensors and tables.
"""

import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmm4rec_cli.data import columns
from mmm4rec_cli.errors import RunError
from mmm4rec_cli.files import write_json, written_whole
from mmm4rec_cli.settings.schema import Settings
from mmm4rec_cli.workspace import Workspace

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmm4rec_cli.data.dataset import Dataset
    from mmm4rec_cli.models.interface import SequenceModel


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    path: Path

    @property
    def id(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def short_id(self) -> str:
        """The id's last part, enough to name the run."""
        return self.id.rsplit("-", 1)[-1]

    @property
    def weights(self) -> Path:
        """Best weights, safetensors."""
        return self.path / "model.safetensors"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "result.json").is_file()

    @property
    def about(self) -> dict[str, Any]:
        """What the run is: command, domain, domains, model, seed, encoder and data fingerprints, start."""
        return self._read("run.json")

    @property
    def result(self) -> dict[str, Any]:
        """`result.json` of a finished run."""
        return self._read("result.json")

    @property
    def settings(self) -> Settings:
        """The resolved settings it was trained with."""
        return Settings.model_validate(self.settings_document)

    @property
    def settings_document(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return self._read("settings.json")

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`, one an epoch; none where nothing was trained yet (or in a run over seeds)."""
        path = self.path / "metrics.jsonl"
        try:
            text = path.read_text(encoding="utf-8")
            # Behind the last end of line an epoch may just be being written.
            rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise RunError(f"{path} is damaged: {error}", hint="train again, or choose another run") from None
        if not all(isinstance(row, dict) and {"epoch", "loss"} <= row.keys() for row in rows):
            raise RunError(f"{path} is damaged: epochs were expected", hint="train again, or choose another run")
        return rows

    @property
    def members(self) -> list["Run"]:
        """The run itself, or one run a seed."""
        seeds = sorted(self.path.glob("seed-*/run.json"), key=lambda p: int(p.parent.name.removeprefix("seed-")))
        return [Run(p.parent) for p in seeds] or [self]

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"run {self.id} has no {name}", hint="see `mmm4rec runs` for finished runs") from None
        except ValueError as error:
            raise RunError(f"{path} is damaged: {error}", hint="train again, or choose another run") from None
        if not isinstance(document, dict):
            raise RunError(f"{path} is damaged: an object was expected", hint="train again, or choose another run")
        return document

    def write(self, name: str, document: Any) -> None:
        """Write one of the run's JSON files, whole."""
        write_json(self.path / name, document)


def new_run(workspace: Workspace, command: str, domain: str) -> Run:
    """A new run's folder: `runs/<command>/<domain>/<UTC time>-<six hex digits>`; ids sort by time.

    The first four digits are the fraction of the second, the last two are random.
    """
    now = time.time()
    second = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    path = workspace.runs / command / domain / f"{second}-{int(now % 1 * 65536):04x}{secrets.token_hex(1)}"
    path.mkdir(parents=True)
    return Run(path)


def all_runs(workspace: Workspace, command: str | None = None, domain: str | None = None) -> Iterator[Run]:
    """Every run of the workspace, newest first."""
    found = workspace.runs.glob(f"{command or '*'}/{domain or '*'}/*/run.json")
    for path in sorted(found, key=lambda p: p.parent.name, reverse=True):
        yield Run(path.parent)


def find_run(workspace: Workspace, reference: str) -> Run:
    """The run that a user named by its folder, its id, or the id's last part.

    Raises:
        RunError: none, or more than one.
    """
    for folder in (Path(reference), workspace.root / reference):
        if (folder / "run.json").is_file():
            return Run(folder.resolve())
    found = [run for run in all_runs(workspace) if reference in (run.id, run.short_id)]
    if len(found) == 1:
        return found[0]
    problem = "is not a run of this workspace" if not found else f"names {len(found)} runs"
    raise RunError(f"{reference!r} {problem}", hint="see `mmm4rec runs`; give a run's folder or its short id")


def newest_run(
    workspace: Workspace, command: str, domain: str | None = None, fits: Callable[[Run], bool] = lambda run: True
) -> Run | None:
    """The newest finished run that fits, or None."""
    return next((run for run in all_runs(workspace, command, domain) if run.finished and fits(run)), None)


def run_or_newest(workspace: Workspace, reference: str | None, domain: str | None = None) -> Run:
    """The run that the user named, or the newest finished fine-tuning run (of the domain).

    Raises:
        RunError: there is none.
    """
    run = find_run(workspace, reference) if reference is not None else newest_run(workspace, "finetune", domain)
    if run is None:
        raise RunError(
            f"no finished fine-tuning run in {workspace.runs}",
            hint=f"make one with: mmm4rec finetune --domain {domain or 'scientific'}",
        )
    return run


def save_weights(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as part:
        save_file(plain, part, metadata)


def read_weights(path: Path) -> "dict[str, Tensor]":
    """Read safetensors onto the CPU.

    Raises:
        RunError: missing, truncated, or of another format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise RunError(f"{path} is not there", hint="the run did not get far enough; train again") from None
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} cannot be read: {error}", hint="the file is damaged; train again") from None


def save_catalogue(path: Path, raw_item_ids: list[str]) -> None:
    """Store which item each row of the item tables stands for."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            columns.ITEM_ID: pa.array(range(1, len(raw_item_ids) + 1), pa.int32()),
            columns.RAW_ITEM_ID: pa.array(raw_item_ids, pa.string()),
        }
    )
    with written_whole(path) as part:
        pq.write_table(table, part)


def read_catalogue(path: Path) -> list[str]:
    """Raw item ids in the order of the run's item ids.

    Raises:
        RunError: missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        raw: list[str] = pq.read_table(path)[columns.RAW_ITEM_ID].to_pylist()
    except (OSError, KeyError, pa.ArrowException) as error:
        raise RunError(f"{path} cannot be read: {error}", hint="the run is damaged; train again") from None
    return raw


@dataclass(frozen=True)
class Moved:
    """How a run's catalogue and the present one compare."""

    kept: int
    new: int
    gone: int


PER_ITEM = ("text.item_bias", "image.item_bias", "items.weight", "text.features", "image.features")
"""Item biases of MMM4Rec; of baselines the id table and, where they are noise (Q25), the feature tables."""


def follow_raw_ids(
    weights: "dict[str, Tensor]", old_ids: list[str], new_ids: list[str], per_item: tuple[str, ...]
) -> "tuple[dict[str, Tensor], Moved]":
    """Move per-item rows to where their raw ids are now; rows of new items are zero, the padding row stays.

    Args:
        weights: a state dict.
        old_ids: raw item ids of the run.
        new_ids: raw item ids of the present tables.
        per_item: names of the tensors with one row an item.
    """
    import torch

    place = {raw: i + 1 for i, raw in enumerate(old_ids)}
    source = torch.tensor([0, *(place.get(raw, -1) for raw in new_ids)])
    known = source >= 0
    moved = dict(weights)
    for name in per_item:
        if name in weights:
            rows = weights[name][source.clamp(min=0)]
            rows[~known] = 0
            moved[name] = rows
    kept = int(known.sum()) - 1
    return moved, Moved(kept=kept, new=len(new_ids) - kept, gone=len(old_ids) - kept)


def load_model(run: Run, dataset: "Dataset", device: "torch.device") -> "tuple[SequenceModel, Moved]":
    """Build the run's model on the present tables and load its best weights.

    Raises:
        RunError: the run is damaged or of another encoder or width.
    """
    from mmm4rec_cli.models.registry import build_model

    about, settings = run.about, run.settings
    if about["encoder_fingerprint"] != dataset.features.fingerprint:
        raise RunError(
            f"run {run.id} was trained on vectors of another encoder ({about['encoder']}, "
            f"{about['encoder_fingerprint'][:8]}) than {dataset.name} has now ({dataset.features.fingerprint[:8]})",
            hint="run `mmm4rec preprocess` with the run's encoder, or train again",
        )
    features = dataset.model_features(settings.features.missing)
    model = build_model(about["model"], settings.model, features)
    old_ids = read_catalogue(run.path / "catalogue.parquet")
    per_item = (*PER_ITEM, *(["fusion_weight"] if settings.model.fusion == "instance" else []))
    weights, moved = follow_raw_ids(read_weights(run.weights), old_ids, dataset.raw_item_ids, per_item)
    load_weights(model, weights, run.weights)
    return model.to(device), moved


def load_weights(model: "SequenceModel", weights: "dict[str, Tensor]", path: Path) -> None:
    """Load a whole state dict.

    Raises:
        RunError: names or shapes that do not fit, each on its line.
    """
    own = model.state_dict()
    problems = [f"{path.name} lacks {name}" for name in sorted(own.keys() - weights.keys())]
    problems += [f"{path.name} holds {name}, unknown here" for name in sorted(weights.keys() - own.keys())]
    problems += [
        f"{name}: {path.name} holds {[*weights[name].shape]}, the model takes {[*own[name].shape]}"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    if problems:
        raise RunError(*problems[:5], hint="the checkpoint belongs to other settings, features or data")
    model.load_state_dict(weights)
