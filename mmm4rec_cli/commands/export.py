"""`mmm4rec export`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mmm4rec_cli.commands.invocation import Invocation, Result, command


class Format(StrEnum):
    """What is written."""

    safetensors = "safetensors"
    faiss = "faiss"
    onnx = "onnx"
    torch = "torch"


@command("mmm4rec export", "mmm4rec export --format torch --out serving")
def export(
    invocation: Invocation,
    run: Annotated[
        str | None, typer.Option(metavar="RUN", help="whose model", show_default="the newest finished fine-tuning run")
    ] = None,
    format: Annotated[
        Format,
        typer.Option(help="item table and weights; search index; user encoder as ONNX; as torch.export program (.pt2)"),
    ] = Format.safetensors,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="where to", show_default="export/<format> in the run's folder")
    ] = None,
) -> Result:
    """Write item vectors and the user encoder for serving."""
    from mmm4rec_cli.evaluation.export import check_format, export_run
    from mmm4rec_cli.runs import run_or_newest
    from mmm4rec_cli.settings import for_run

    check_format(format.value)
    workspace = invocation.workspace
    found = run_or_newest(workspace, run)
    settings = for_run(found.settings_document, invocation.resolved(), run=found.id, reporter=invocation.reporter)
    folder = out or found.path / "export" / format.value
    document = export_run(workspace, found, settings, format.value, folder, invocation.reporter)
    lines = [f"{folder}: {document['n_items']:,} items, vectors of {document['width']}", *document["files"]]
    return Result(document, "\n  ".join(lines), next=workspace.command("runs"))
