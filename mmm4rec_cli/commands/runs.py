"""`mmm4rec runs`."""

from typing import Annotated

import typer

from mmm4rec_cli.commands.invocation import Invocation, Result, command


@command("mmm4rec runs", "mmm4rec runs --domain scientific")
def runs(
    invocation: Invocation,
    domain: Annotated[
        str | None, typer.Option(help="only the runs of this domain or mix", metavar="NAME", show_default="every domain")
    ] = None,
) -> Result:
    """Show the workspace's runs with their main metric."""
    from mmm4rec_cli.console import table
    from mmm4rec_cli.runs import list_runs

    found = list_runs(invocation.workspace, domain=domain)
    columns = ("run", "command", "domain", "model", "state", "metric", "valid", "test", "best epoch", "seconds")
    rows = [
        (r.id, r.command, r.domain, r.model, r.state, r.metric, r.valid, r.test, r.best_epoch, r.seconds) for r in found
    ]
    shown = table("", columns, rows) if rows else f"no runs in {invocation.workspace.runs}"
    newest = next((r for r in found if r.command == "finetune" and r.state == "finished"), None)
    return Result(
        {"runs": [run.document() for run in found]},
        shown,
        next=f"mmm4rec evaluate --run {newest.id}" if newest else "mmm4rec finetune --domain scientific",
    )
