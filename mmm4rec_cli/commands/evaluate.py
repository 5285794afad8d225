"""`mmm4rec evaluate`."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmm4rec_cli.commands.invocation import Invocation, Result, command, curves_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mmm4rec_cli.runs import Run
    from mmm4rec_cli.settings import Settings


class Split(StrEnum):
    """Which held-out elements are ranked."""

    valid = "valid"
    test = "test"


@command(
    "mmm4rec evaluate", "mmm4rec evaluate --split valid --k 1,5 --mask-seen", "mmm4rec evaluate --by length,popularity"
)
def evaluate(
    invocation: Invocation,
    run: Annotated[
        str | None,
        typer.Option(
            help="fine-tuning run, or a published checkpoint with --domain",
            metavar="RUN|FILE",
            show_default="the newest finished run",
        ),
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(help="what a published checkpoint was trained on", metavar="NAME", show_default="the run's"),
    ] = None,
    split: Annotated[Split, typer.Option(help="which held-out elements are ranked")] = Split.test,
    k: Annotated[
        str | None, typer.Option(help="cut-offs, comma-separated", show_default="evaluate.k = 10,20,50")
    ] = None,
    mask_seen: Annotated[
        bool, typer.Option("--mask-seen", help="hide the items of the history (never the target)")
    ] = False,
    compare: Annotated[
        str | None,
        typer.Option(
            help="another run of the domain: paired bootstrap over users, 95 % interval",
            metavar="RUN",
            show_default="none",
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(help="segments, of length,popularity,modality,novelty", metavar="LIST", show_default="none"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N", show_default="runtime.device = auto")
    ] = None,
) -> Result:
    """Rank the whole catalogue for every user and measure where the target stands."""
    from mmm4rec_cli.errors import UsageError
    from mmm4rec_cli.evaluation.evaluate_run import evaluate_run
    from mmm4rec_cli.evaluation.segments import kinds_of
    from mmm4rec_cli.runs import find_run, run_or_newest
    from mmm4rec_cli.settings import for_run

    workspace, reporter = invocation.workspace, invocation.reporter
    kinds = kinds_of(by or "")
    options = {"evaluate.k": k, "runtime.device": device}
    if run is not None and Path(run).is_file():
        found, settings = _adopted(invocation, Path(run), domain, options)
    else:
        found = run_or_newest(workspace, run, domain)
        if domain is not None and domain != found.about["domain"]:
            raise UsageError(
                f"--domain {domain}: run {found.id} is of {found.about['domain']}", hint="leave --domain out"
            )
        resolved = invocation.resolved(options=options)
        settings = for_run(found.settings_document, resolved, run=found.id, reporter=reporter)
    document = evaluate_run(
        workspace,
        found,
        settings,
        split=split.value,
        mask_seen=mask_seen,
        segments=kinds,
        compare=None if compare is None else find_run(workspace, compare),
        reporter=reporter,
    )
    following = workspace.command("report", "--run", found.short_id) if found.finished else None
    return Result(document, *_shown(document), *curves_of(found), next=following)


def _shown(document: dict[str, Any]) -> "list[RenderableType]":
    from mmm4rec_cli.console import metric_table, table

    masked = document["mask_seen"]
    first = f"{document['model']}, seen items hidden" if masked else document["model"]
    rows = {first: (document["metrics"], document.get("metrics_sd"))}
    if masked:
        rows[f"{document['model']}, all items"] = (document["metrics_unmasked"], document.get("metrics_unmasked_sd"))
    hidden = ", seen items hidden" if masked else ""
    rows |= {f"{name}{hidden}": (values, None) for name, values in document["yardsticks"].items()}
    shown: list[RenderableType] = [
        metric_table(f"{document['domain']}, {document['split']}; run {document['run']}", rows)
    ]
    if "compare" in document:
        names = list(document["compare"])
        found = [document["compare"][name] for name in names]
        lines = [
            ["difference", *(f"{one['difference']:+.4f}" for one in found)],
            ["95 % interval", *(f"{one['low']:+.4f} … {one['high']:+.4f}" for one in found)],
        ]
        shown.append(table(f"minus run {document['compared_with']}", ["", *names], lines))
    for kind, groups in document["segments"].items():
        names = list(next(iter(groups.values())))
        cells = [
            [group, int(values["n_users"]), *(values[name] for name in names[1:])] for group, values in groups.items()
        ]
        shown.append(table(f"by {kind}", ["", "users", *names[1:]], cells))
    shown.append(
        f"{document['n_users']:,} users, {document['n_items']:,} items, {document['data_split']}, "
        f"ties {document['ties']}; {document['repeated_targets']:.1%} of the targets repeat an item of the history, "
        f"{document['tied_targets']:.1%} share their time stamp with the event before"
    )
    if document["trained_on_later"]:
        shown.append(
            f"leakage: on average {document['trained_on_later']:.1%} of what was trained on happened after the target; "
            "--set data.split=temporal when fine-tuning trains on the past alone"
        )
    return shown


def _adopted(
    invocation: Invocation, file: Path, domain: str | None, options: Mapping[str, Any]
) -> "tuple[Run, Settings]":
    from mmm4rec_cli.data.dataset import encoder_at_hand, load_dataset
    from mmm4rec_cli.data.domains import check_domain
    from mmm4rec_cli.errors import UsageError
    from mmm4rec_cli.evaluation.adopt import adopt_checkpoint, published_settings
    from mmm4rec_cli.features.store import encoder_name

    if domain is None:
        raise UsageError(f"--run {file}: a checkpoint needs --domain", hint="name what it was trained on")
    workspace = invocation.workspace
    check_domain(workspace, domain)
    resolved = invocation.resolved(domain=domain, options=options)
    settings = published_settings(file, resolved.settings)
    if not resolved.is_set("features.encoder"):
        features = encoder_at_hand(workspace, [domain], settings.features)
        settings = settings.model_copy(update={"features": features})
    dataset = load_dataset(workspace, [domain], encoder_name(settings.features))
    return adopt_checkpoint(workspace, file, dataset, settings), settings
