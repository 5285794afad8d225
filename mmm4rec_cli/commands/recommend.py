"""`mmm4rec recommend`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmm4rec_cli.commands.invocation import Invocation, Result, command

if TYPE_CHECKING:
    from mmm4rec_cli.features.new_items import NewItems
    from mmm4rec_cli.runs import Run
    from mmm4rec_cli.settings import Settings


@command(
    "mmm4rec recommend --user A1B2C3",
    "mmm4rec recommend --history B0001,B0002 --k 5",
    "mmm4rec recommend --users users.csv --out recommendations.parquet",
    "mmm4rec recommend --similar B0001",
)
def recommend(
    invocation: Invocation,
    run: Annotated[
        str | None,
        typer.Option(help="whose model answers", metavar="RUN", show_default="the newest finished fine-tuning run"),
    ] = None,
    user: Annotated[str | None, typer.Option(help="a user of the data", metavar="RAW_ID", show_default="none")] = None,
    history: Annotated[
        str | None,
        typer.Option(help="raw item ids, oldest first", metavar="RAW,RAW,…", show_default="none"),
    ] = None,
    times: Annotated[
        str | None,
        typer.Option(help="times of --history, Unix seconds", metavar="T,T,…", show_default="not known"),
    ] = None,
    users: Annotated[
        Path | None,
        typer.Option(
            help=".csv, .parquet or .jsonl with `user`, or `history` and optionally `times`",
            metavar="FILE",
            show_default="none",
        ),
    ] = None,
    similar: Annotated[
        str | None,
        typer.Option(help="neighbours of this item in the learned space", metavar="RAW_ID", show_default="none"),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(help="moment of asking: Unix seconds or an ISO date", metavar="TIME", show_default="now"),
    ] = None,
    k: Annotated[int, typer.Option(help="items a user")] = 10,
    include_seen: Annotated[
        bool, typer.Option("--include-seen", help="items of the history may be recommended again")
    ] = False,
    candidates: Annotated[
        Path | None,
        typer.Option(help="the only items that may be recommended", metavar="FILE", show_default="all items"),
    ] = None,
    exclude: Annotated[
        Path | None, typer.Option(help="items that may not be recommended", metavar="FILE", show_default="none")
    ] = None,
    new_items: Annotated[
        Path | None,
        typer.Option(
            help="items never trained on (item_id, title or text, image): ranked with the known ones",
            metavar="FILE",
            show_default="none",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="write .parquet, .csv or .jsonl instead", metavar="FILE", show_default="the terminal"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N", show_default="runtime.device = auto")
    ] = None,
) -> Result:
    """Recommend items to a user, to a bare history, to a file of either, or list an item's neighbours."""
    from mmm4rec_cli.errors import UsageError
    from mmm4rec_cli.evaluation.recommend import Asked, load_recommender, parse_moment
    from mmm4rec_cli.evaluation.recommend_files import check_suffix, read_asked, read_ids, recommendation_file
    from mmm4rec_cli.runs import run_or_newest
    from mmm4rec_cli.settings import for_run

    workspace, reporter = invocation.workspace, invocation.reporter
    given = {"--user": user, "--history": history, "--users": users, "--similar": similar}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        found = f"{' and '.join(named)} exclude one another" if named else "nobody to recommend to"
        raise UsageError(found, hint=f"give one of {', '.join(given)}")
    if times is not None and history is None:
        raise UsageError("--times belongs to --history", hint="leave it out")
    if k < 1:
        raise UsageError(f"--k {k}: at least 1", hint="ask for one item or more")
    if out is not None:
        check_suffix(out)
    moment = None if at is None else parse_moment(at)
    stamps = None if times is None else [parse_moment(part.strip()) for part in times.split(",") if part.strip()]
    found_run = run_or_newest(workspace, run)
    resolved = invocation.resolved(options={"runtime.device": device})
    settings = for_run(found_run.settings_document, resolved, run=found_run.id, reporter=reporter)
    recommender = load_recommender(
        workspace,
        found_run,
        settings,
        new_items=None if new_items is None else _encoded(invocation, new_items, found_run, settings),
        candidates=None if candidates is None else read_ids(candidates),
        exclude=() if exclude is None else read_ids(exclude),
        reporter=reporter,
    )
    if similar is None and recommender.model.reads_target_time:
        reporter.note(
            "model.time = published: the moment of asking (--at, else now) stands where the label's stamp stood"
        )
    elif similar is None and moment is not None:
        reporter.note(f"--at changes nothing: model.time = {settings.model.time} never reads the moment of asking")
    if similar is not None:
        blocks = iter([recommender.similar(similar, k)])
    else:
        if users is not None:
            asked = read_asked(users)
        elif history is not None:
            items = [part.strip() for part in history.split(",") if part.strip()]
            asked = iter([Asked(None, items, stamps)])
        else:
            asked = iter([Asked(user)])
        blocks = recommender.recommend(asked, k, include_seen=include_seen, at=moment)
    about: dict[str, Any] = {"run": found_run.id, "domain": recommender.dataset.name}
    if similar is not None:
        about["similar"] = similar
    if out is not None:
        answered = rows = 0
        with recommendation_file(out) as write, reporter.stage("recommend", None, "users") as stage:
            for block in blocks:
                table = recommender.table(block)
                write(table)
                answered, rows = answered + len(block.users), rows + table.num_rows
                stage.advance(len(block.users))
        document = {**about, "out": str(out), "n_users": answered, "n_rows": rows}
        following = workspace.command("report", "--run", found_run.short_id)
        return Result(document, f"{out}: {rows:,} recommendations, {answered:,} users", next=following)
    document = {**about, "users": [one for block in blocks for one in recommender.documents(block)]}
    words = _next(document)
    return Result(document, *_shown(document), next=None if words is None else workspace.command(*words))


def _encoded(invocation: Invocation, file: Path, run: "Run", settings: "Settings") -> "NewItems":
    from mmm4rec_cli.evaluation.evaluate_run import run_dataset
    from mmm4rec_cli.features.new_items import read_new_items

    metadata = run_dataset(invocation.workspace, run).features.metadata
    return read_new_items(
        invocation.workspace,
        file,
        metadata,
        settings.features,
        settings.data.columns,
        settings.runtime.device,
        invocation.reporter,
    )


def _next(document: dict[str, Any]) -> tuple[str, ...] | None:
    """Look closer at the first answer: at its neighbours, or at what would follow it."""
    first = next((one["items"][0]["raw_item_id"] for one in document["users"] if one["items"]), None)
    option = "--history" if "similar" in document else "--similar"
    return None if first is None else ("recommend", "--run", document["run"], option, first)


def _shown(document: dict[str, Any]) -> list[Any]:
    from mmm4rec_cli.console import table

    shown: list[Any] = []
    for one in document["users"]:
        who = f"for {one['user']}" if one["user"] is not None else "for this history"
        title = f"similar to {document['similar']}" if "similar" in document else who
        rows = [
            [place, item["raw_item_id"], item["title"], item["score"], item["text_score"], item["image_score"]]
            for place, item in enumerate(one["items"], 1)
        ]
        shown.append(table(f"{title}; run {document['run']}", ["", "item", "title", "score", "text", "image"], rows))
    return shown
