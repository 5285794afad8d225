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
    rows, curves = [], []
    for run in all_runs(invocation.workspace, domain=domain):
        try:
            row = _row(run)
            curve = _curve(run, row["metric"])
        except RunError as error:
            for problem in error.problems:
                invocation.reporter.warn(problem)
            row, curve = _unreadable(run), None
        rows.append(row)
        curves.append(curve)
    if not rows and domain is not None:
        check_domain(invocation.workspace, domain)
    if not rows:
        following = invocation.workspace.command("finetune", *(["--domain", domain] if domain else []))
        return Result({"runs": []}, f"no runs in {invocation.workspace.runs}", next=following)
    names = [name.replace("_", " ") for name in rows[0]]
    shown = table("", [*names, "curve"], [[*row.values(), curve] for row, curve in zip(rows, curves, strict=True)])
    return Result({"runs": rows}, shown, next=invocation.workspace.command(*_next(rows)))


def _next(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """Evaluate the newest fine-tuning run, else finish or start one."""
    tunings = [row for row in rows if row["command"] == "finetune"]
    finished = next((row for row in tunings if row["state"] == "finished"), None)
    if finished is not None:
        return "evaluate", "--run", finished["run"]
    unfinished = next((row for row in tunings if row["state"] == "unfinished"), None)
    if unfinished is not None:
        return "finetune", "--domain", unfinished["domain"], "--resume", unfinished["run"]
    return ("finetune",)


def _curve(run: "Run", metric: str | None) -> str | None:
    """The validation metric (of the first seed) epoch by epoch, else the loss; None before the first epoch."""
    from mmm4rec_cli.console import sparkline

    epochs = run.members[0].epochs
    if metric is not None and all(metric in row.get("valid", {}) for row in epochs):
        return sparkline([row["valid"][metric] for row in epochs], 20) or None
    return sparkline([row["loss"] for row in epochs], 20) or None


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
