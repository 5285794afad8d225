"""A run's item vectors and user encoder, for serving elsewhere.

Letters: B users, L = max_len places, V items without padding, D width.
"""

import copy
import io
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmm4rec_cli.errors import RunError, UsageError
from mmm4rec_cli.evaluation.evaluate_run import check_finished, run_dataset
from mmm4rec_cli.files import write_json, written_whole
from mmm4rec_cli.models.interface import SequenceModel
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.runs import Run, load_model, save_catalogue, save_weights
from mmm4rec_cli.settings.schema import Settings
from mmm4rec_cli.workspace import Workspace

FORMATS = ("safetensors", "faiss", "onnx", "torch")
INPUTS = ("items", "lengths", "timestamps")
"""int64 [B, L] item ids padded with 0 on the right, int64 [B] real places, int64 [B, L] Unix seconds."""

_NEEDS = {"faiss": ("faiss",), "onnx": ("onnx", "onnxscript")}
_PACKAGE = {"faiss": "faiss-cpu"}
_OPSET = 20
"""The exporter's own default, with the DFT operator that the time streams need."""
_ONNX_BYTES = 2_000_000_000
"""An ONNX file is one protobuf message: 2 GB at most."""


def check_format(name: str) -> None:
    """Raise UsageError unless this installation can write the format."""
    if name not in FORMATS:
        raise UsageError(f"--format {name} is not known", hint=f"choose of {', '.join(FORMATS)}")
    missing = [module for module in _NEEDS.get(name, ()) if find_spec(module) is None]
    if missing:
        packages = " ".join(_PACKAGE.get(module, module) for module in missing)
        raise UsageError(f"--format {name} needs {' and '.join(missing)}", hint=f"pip install {packages}")


def export_run(
    workspace: Workspace, run: Run, settings: Settings, form: str, out: Path, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Write a run's best weights (of several seeds the first's) on the present tables into a folder.

    Always `items.parquet` (item_id, raw_item_id) and, last, `export.json`, which says what lies there. Besides

    - `safetensors`: `item_table.safetensors` (`item_table` [V + 1, D], row = item id, row 0 padding) and
      `user_encoder.safetensors` (the model's weights and feature tables under its own names);
    - `faiss`: `items.faiss`, an IndexFlatIP of [V, D]; position i is item id i + 1;
    - `torch`: `item_table.safetensors` and `user_encoder.pt2` (torch.export), users [B, D] of `INPUTS`, any B;
    - `onnx`: `item_table.safetensors` and `user_encoder.onnx`, the same.

    The score of an item is the product of a user vector and its row. What was exported is run and compared with the
    model before it is written: `torch` always, `onnx` where onnxruntime is installed.

    Raises:
        UsageError: unknown format, a package missing, or a model too large for ONNX.
        RunError: the run is unfinished, damaged, of a removed domain, or the exported program disagrees with it.
    """
    check_format(form)
    check_finished(run)
    reporter = reporter or SilentReporter()
    dataset = run_dataset(workspace, run)
    member = run.members[0]
    model, _ = load_model(member, dataset, torch.device("cpu"))
    model.eval()
    with torch.no_grad():
        item_table = model.item_table().float()
    files = ["items.parquet"]
    save_catalogue(out / files[0], dataset.raw_item_ids)
    if form == "faiss":
        files.append("items.faiss")
        _write_faiss(out / files[-1], item_table[1:])
    else:
        files.append("item_table.safetensors")
        save_weights(out / files[-1], {"item_table": item_table})
    if form == "safetensors":
        files.append("user_encoder.safetensors")
        # The state dict leaves out the feature tables, which lie with the data; whoever serves has no such data.
        save_weights(out / files[-1], {**dict(model.named_buffers()), **model.state_dict()})
    if form in ("torch", "onnx"):
        files.append(f"user_encoder.{'pt2' if form == 'torch' else 'onnx'}")
        examples = example_windows(dataset.n_items, settings.model.max_len)
        write = write_torch if form == "torch" else write_onnx
        write(model, examples, out / files[-1], reporter)
    document = {
        "run": member.id,
        "domain": dataset.name,
        "model": run.about["model"],
        "format": form,
        "out": str(out),
        "n_items": dataset.n_items,
        "width": item_table.shape[1],
        "max_len": settings.model.max_len,
        "reads_moment_of_asking": model.reads_target_time,
        "encoder_fingerprint": dataset.features.fingerprint,
        "files": files,
        "inputs": {
            "items": "int64 [B, max_len]: item ids, oldest first, padded with 0 on the right",
            "lengths": "int64 [B]: real places, at least 1",
            "timestamps": "int64 [B, max_len]: Unix seconds, 0 behind the last"
            + ("; the moment of asking in the first padded place" if model.reads_target_time else ""),
        },
        "score": "user vector · row of the item table",
    }
    write_json(out / "settings.json", settings.model_dump(mode="json"))
    write_json(out / "export.json", document)
    return document


def example_windows(n_items: int, max_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three windows, full, short and of one place, as the exporters trace and compare them."""
    lengths = torch.tensor([max_len, max(1, max_len // 2), 1])
    place = torch.arange(max_len)
    real = place < lengths[:, None]
    items = 1 + (place + 3 * torch.arange(3)[:, None]) % n_items
    times = 1_500_000_000 + 70_000 * place * torch.arange(1, 4)[:, None]
    return torch.where(real, items, 0), lengths, torch.where(real, times, 0)


def exported_program(model: SequenceModel, examples: tuple[Tensor, Tensor, Tensor]) -> "torch.export.ExportedProgram":
    """The user encoder as a program for any number of users."""
    batch = torch.export.Dim("batch", min=1)
    # On a copy without gradients: what is exported is a function of its three inputs alone.
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return torch.export.export(frozen, examples, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))


def write_torch(
    model: SequenceModel, examples: tuple[Tensor, Tensor, Tensor], path: Path, reporter: Reporter | None = None
) -> None:
    """Write the user encoder by torch.export, after comparing it with the model.

    Raises:
        RunError: they disagree.
    """
    program = exported_program(model, examples)
    _compare(model, examples, program.module(), "the exported program")
    written = io.BytesIO()  # torch.export.save wants a name that ends in .pt2, which a temporary one does not
    torch.export.save(program, written)
    with written_whole(path) as part:
        part.write_bytes(written.getvalue())


def write_onnx(
    model: SequenceModel, examples: tuple[Tensor, Tensor, Tensor], path: Path, reporter: Reporter | None = None
) -> None:
    """Write the user encoder as ONNX (opset 20), after comparing it with the model where onnxruntime is installed.

    Raises:
        UsageError: its tables pass the 2 GB of an ONNX file.
        RunError: they disagree.
    """
    check_format("onnx")
    reporter = reporter or SilentReporter()
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if size > _ONNX_BYTES:
        raise UsageError(
            f"the user encoder with its tables has {size / 1e9:.1f} GB, an ONNX file at most 2 GB",
            hint="use --format torch",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself and about torchvision
        made = torch.onnx.export(
            exported_program(model, examples),
            dynamo=True,
            opset_version=_OPSET,
            input_names=INPUTS,
            output_names=["user"],
            verbose=False,
        )
    assert made is not None
    with written_whole(path) as part:
        made.save(part, external_data=False)
        if find_spec("onnxruntime") is None:
            reporter.warn("not compared with the model: that needs onnxruntime (pip install onnxruntime)")
            return
        import onnxruntime

        session = onnxruntime.InferenceSession(part.read_bytes(), providers=["CPUExecutionProvider"])

        def run(*windows: Tensor) -> Tensor:
            given = {name: window.numpy() for name, window in zip(INPUTS, windows, strict=True)}
            return torch.from_numpy(session.run(["user"], given)[0])

        _compare(model, examples, run, "the ONNX program")


def _compare(
    model: SequenceModel, examples: tuple[Tensor, Tensor, Tensor], exported: Callable[..., Tensor], what: str
) -> None:
    """Compare for one user and for several; float32 sums in another order are no difference."""
    for users in (1, 3):
        windows = [window[:users] for window in examples]
        with torch.no_grad():
            want, got = model(*windows), exported(*windows)
        worst = float((want - got).abs().max() / want.abs().max().clamp(min=1e-12))
        if not worst < 1e-3:
            raise RunError(
                f"{what} differs from the model by {worst:.1e} of its largest number",
                hint="use --format safetensors and report this",
            )


def _write_faiss(path: Path, item_VD: Tensor) -> None:
    import faiss

    index = faiss.IndexFlatIP(item_VD.shape[1])
    index.add(item_VD.contiguous().numpy())
    with written_whole(path) as part:
        faiss.write_index(index, str(part))
