"""`mmm4rec runs`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmm4rec_cli.commands.invocation import Invocation, Result, command
from mmm4rec_cli.errors import RunError

if TYPE_CHECKING:
    from mmm4rec_cli.runs import Run


@command("mmm4rec runs", "mmm4rec runs --domain scientific")
def runs(
    invocation: Invocation,
    domain: Annotated[
        str | None,
        typer.Option(help="only the runs of this domain or mix", metavar="NAME", show_default="every domain"),
    ] = None,
) -> Result:
    """Show the workspace's runs, newest first, with their main metric."""
    from mmm4rec_cli.console import table
    from mmm4rec_cli.data.domains import check_domain
    from mmm4rec_cli.runs import all_runs

    invocation.settings()
    rows = []
    for run in all_runs(invocation.workspace, domain=domain):
        try:
            rows.append(_row(run))
        except RunError as error:
            for problem in error.problems:
                invocation.reporter.warn(problem)
            rows.append(_unreadable(run))
    if not rows and domain is not None:
        check_domain(invocation.workspace, domain)
    if not rows:
        return Result({"runs": []}, f"no runs in {invocation.workspace.runs}", next="mmm4rec finetune")
    shown = table("", [name.replace("_", " ") for name in rows[0]], [list(row.values()) for row in rows])
    newest = next((row for row in rows if row["command"] == "finetune" and row["state"] == "finished"), None)
    return Result({"runs": rows}, shown, next=f"mmm4rec evaluate --run {newest['run']}" if newest else None)


def _row(run: "Run") -> dict[str, Any]:
    about, settings = run.about, run.settings_document
    result = run.result if run.finished else {}
    metrics = result.get("metrics") or {}
    metric = settings.get("finetune", {}).get("metric") if about.get("command") == "finetune" else None
    return {
        **_unreadable(run),
        "model": about.get("model"),
        "state": "finished" if run.finished else "unfinished",
        "metric": metric,
        "valid": metrics.get("valid", {}).get(metric),
        "test": metrics.get("test", {}).get(metric),
        "best_epoch": result.get("best_epoch"),
        "seconds": result.get("seconds"),
    }


def _unreadable(run: "Run") -> dict[str, Any]:
    """What the run's folder alone tells."""
    unknown = dict.fromkeys(("model", "state", "metric", "valid", "test", "best_epoch", "seconds"))
    place = {"run": run.short_id, "command": run.path.parent.parent.name, "domain": run.path.parent.name}
    return {**place, **unknown, "state": "damaged"}
