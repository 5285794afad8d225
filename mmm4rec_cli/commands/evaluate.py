"""`mmm4rec evaluate`."""

from enum import StrEnum
from typing import Annotated

import typer

from mmm4rec_cli.commands.invocation import Invocation, Result, command


class Split(StrEnum):
    """Which held-out elements are ranked."""

    valid = "valid"
    test = "test"


@command("mmm4rec evaluate", "mmm4rec evaluate --run 3fa9c1 --split valid --k 1,5,10 --mask-seen")
def evaluate(
    invocation: Invocation,
    run: Annotated[
        str | None,
        typer.Option(help="fine-tuning run", metavar="RUN", show_default="the newest finished one"),
    ] = None,
    split: Annotated[Split, typer.Option(help="which held-out elements are ranked")] = Split.test,
    k: Annotated[
        str | None, typer.Option(help="cut-offs, comma-separated", show_default="evaluate.k = 10,20,50")
    ] = None,
    mask_seen: Annotated[
        bool, typer.Option("--mask-seen", help="hide the items of the history (never the target)")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N", show_default="runtime.device = auto")
    ] = None,
) -> Result:
    """Rank the whole catalogue for every user and measure where the target stands."""
    from mmm4rec_cli.console import metric_table
    from mmm4rec_cli.errors import RunError
    from mmm4rec_cli.evaluation.evaluate_run import evaluate_run
    from mmm4rec_cli.runs import find_run, newest_run
    from mmm4rec_cli.settings import for_run

    workspace, reporter = invocation.workspace, invocation.reporter
    found = find_run(workspace, run) if run is not None else newest_run(workspace, "finetune")
    if found is None:
        raise RunError(
            f"no finished fine-tuning run in {workspace.runs}", hint="make one with: mmm4rec finetune --domain scientific"
        )
    resolved = invocation.resolved(options={"evaluate.k": k, "runtime.device": device})
    settings = for_run(found.settings_document, resolved, run=found.id, reporter=reporter)
    document = evaluate_run(workspace, found, settings, split=split.value, mask_seen=mask_seen, reporter=reporter)
    rows = {"seen items hidden" if mask_seen else document["model"]: (document["metrics"], document.get("metrics_sd"))}
    if mask_seen:
        rows["all items"] = (document["metrics_unmasked"], None)
    rows |= {name: (values, None) for name, values in document["yardsticks"].items()}
    facts = (
        f"{document['n_users']:,} users, {document['n_items']:,} items, ties {document['ties']}; "
        f"{document['repeated_targets']:.1%} of the targets repeat an item of the history, "
        f"{document['tied_targets']:.1%} share their time stamp with the event before"
    )
    return Result(document, metric_table(f"{document['domain']}, {split.value}; run {found.id}", rows), facts)
