"""`mmm4rec report`."""

from pathlib import Path
from typing import Annotated

import typer

from mmm4rec_cli.commands.invocation import Invocation, Result, command, curves_of


@command("mmm4rec report", "mmm4rec report --run 51f9bc --run 68334f --by length,popularity --out both.html")
def report(
    invocation: Invocation,
    run: Annotated[
        list[str] | None,
        typer.Option(
            help="fine-tuning run; several are shown side by side (repeatable)",
            metavar="RUN",
            show_default="the newest finished run",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="the page's file", metavar="FILE", show_default="report.html in the first run's folder"),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="segments that are shown, of length,popularity,modality,novelty",
            metavar="LIST",
            show_default="all of them",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N", show_default="runtime.device = auto")
    ] = None,
) -> Result:
    """Write one self-contained HTML page on one run or several."""
    from mmm4rec_cli.evaluation.segments import SEGMENTS, kinds_of
    from mmm4rec_cli.report.page import write_report
    from mmm4rec_cli.runs import run_or_newest

    workspace = invocation.workspace
    runtime = invocation.settings(options={"runtime.device": device}).runtime
    references: list[str | None] = [*run] if run else [None]
    found = [run_or_newest(workspace, reference) for reference in references]
    path = out or found[0].path / "report.html"
    kinds = SEGMENTS if by is None else kinds_of(by)
    facts = write_report(workspace, found, path, runtime, segments=kinds, reporter=invocation.reporter)
    user = facts[0].cases[0].raw_user_id
    return Result(
        {"report": str(path), "runs": [one.id for one in found]},
        *(text for one in found for text in (f"run {one.short_id}", *curves_of(one))),
        f"report: {path}",
        next=workspace.command("recommend", "--run", found[0].short_id, "--user", user),
    )
