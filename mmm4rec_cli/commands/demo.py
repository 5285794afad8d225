"""`mmm4rec demo`."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmm4rec_cli.commands.invocation import Invocation, Result, command
from mmm4rec_cli.errors import UsageError

if TYPE_CHECKING:
    from mmm4rec_cli.sample_shop import Shop
    from mmm4rec_cli.settings import Settings


@command("mmm4rec demo --workspace demo", "mmm4rec demo --workspace demo --seed 7")
def demo(
    invocation: Invocation,
    seed: Annotated[int, typer.Option(help="which sample shop is drawn", min=0)] = 1,
) -> Result:
    """Draw a sample shop and run the whole pipeline on it: with and without pre-training, beside popularity."""
    from mmm4rec_cli.console import table
    from mmm4rec_cli.evaluation.evaluate_run import evaluate_run
    from mmm4rec_cli.report.page import write_report
    from mmm4rec_cli.runs import find_run
    from mmm4rec_cli.training.finetune import finetune
    from mmm4rec_cli.training.pretrain import pretrain

    workspace, reporter = invocation.workspace, invocation.reporter
    begin = time.perf_counter()
    shop = _written(invocation, seed)
    settings = invocation.settings()
    _preprocessed(invocation, shop)
    sources, target = [domain.name for domain in shop.sources], shop.target.name
    before = _finished(invocation, "pretrain", sources, settings) or pretrain(
        workspace, sources, settings, reporter=reporter
    )
    scratch = _finished(invocation, "finetune", [target], settings) or finetune(
        workspace, target, settings, pretrained="none", reporter=reporter
    )
    tuned = _finished(invocation, "finetune", [target], settings, before["run"]) or finetune(
        workspace, target, settings, pretrained=before["run"], reporter=reporter
    )

    tested = {
        label: evaluate_run(workspace, find_run(workspace, result["run"]), settings, reporter=reporter)
        for label, result in (("from scratch", scratch), ("pre-trained", tuned))
    }
    rows = [
        _row("popularity", tested["from scratch"]["yardsticks"]["popularity"]),
        _row("from scratch", tested["from scratch"]["metrics"], scratch),
        _row("pre-trained", tested["pre-trained"]["metrics"], tuned),
    ]
    user, items = _recommended(invocation, tuned["run"], settings)
    page = workspace.root / "report.html"
    runs = [find_run(workspace, result["run"]) for result in (tuned, scratch)]
    write_report(workspace, runs, page, settings.runtime, reporter=reporter)
    seconds = time.perf_counter() - begin
    document = {
        "seed": seed,
        "domain": target,
        "rows": rows,
        "runs": {"pretrain": before["run"], "scratch": scratch["run"], "pretrained": tuned["run"]},
        "recommended": {"user": user, "items": items},
        "report": str(page),
        "seconds": seconds,
    }
    facts = (
        f"{scratch['n_users']:,} users and {scratch['n_items']:,} items of {target}, test split, the whole catalogue "
        f"ranked; pre-trained on {before['n_targets']:,} purchases of {len(shop.sources)} other domains in "
        f"{before['seconds']:.0f} s; everything in {seconds:.0f} s"
    )
    shown = table(f"sample shop {seed}", [name.replace("_", " ") for name in rows[0]], [list(r.values()) for r in rows])
    answer = table(
        f"for user {user}, from the pre-trained run",
        ["", "item", "title", "score", "text", "image"],
        [
            [place, one["raw_item_id"], one["title"], one["score"], one["text_score"], one["image_score"]]
            for place, one in enumerate(items, 1)
        ],
    )
    return Result(
        document,
        answer,
        shown,
        facts,
        f"report: {page}",
        next=workspace.command("evaluate", "--by", "length,popularity"),
    )


def _row(label: str, metrics: dict[str, float], training: dict[str, Any] | None = None) -> dict[str, Any]:
    """One line of the table."""
    return {
        "model": label,
        **{name: metrics[name] for name in ("Hit@10", "NDCG@10", "MRR")},
        "best_epoch": None if training is None else training["best_epoch"],
        "train_seconds": None if training is None else round(training["seconds"]),
    }


def _recommended(invocation: Invocation, run: str, settings: "Settings") -> tuple[str, list[dict[str, Any]]]:
    """The first user of the target domain and what the run would show them next, five items."""
    from mmm4rec_cli.evaluation.recommend import Asked, load_recommender
    from mmm4rec_cli.runs import find_run

    workspace = invocation.workspace
    recommender = load_recommender(workspace, find_run(workspace, run), settings, reporter=invocation.reporter)
    user = recommender.dataset.raw_user_ids[0]
    (answer,) = (one for block in recommender.recommend([Asked(user)], 5) for one in recommender.documents(block))
    return user, answer["items"]


def _finished(
    invocation: Invocation, command: str, domains: list[str], settings: "Settings", pretrained: str | None = None
) -> dict[str, Any] | None:
    """The result of an earlier demo's run on the same data with the same settings, or None."""
    from mmm4rec_cli.data.dataset import load_dataset
    from mmm4rec_cli.runs import newest_run
    from mmm4rec_cli.training.start import identity

    workspace = invocation.workspace
    dataset = load_dataset(workspace, domains, settings.features.encoder)
    about = identity(command, dataset, "mmm4rec", [settings.runtime.seed], pretrained)
    run = newest_run(workspace, command, dataset.name, fits=lambda run: run.about == about and run.settings == settings)
    if run is None:
        return None
    invocation.reporter.note(f"{command} on {dataset.name}: run {run.short_id} has the same data and settings, kept")
    return run.result


def _written(invocation: Invocation, seed: int) -> "Shop":
    """The shop's files and the settings that go with it, in the workspace.

    Raises:
        UsageError: the workspace holds settings of its own, which the demo would not overwrite.
    """
    from mmm4rec_cli.sample_shop import SHOP_SETTINGS, write_shop

    config = invocation.workspace.config
    if config.is_file() and config.read_text(encoding="utf-8") != SHOP_SETTINGS:
        raise UsageError(f"{config} is not the demo's", hint="name an empty folder: mmm4rec demo --workspace demo")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(SHOP_SETTINGS, encoding="utf-8")
    with invocation.reporter.stage("draw the sample shop"):
        return write_shop(invocation.workspace.raw("any").parent, seed)


def _preprocessed(invocation: Invocation, shop: "Shop") -> None:
    from mmm4rec_cli.data.images import fetch_images
    from mmm4rec_cli.data.preprocess import build_tables
    from mmm4rec_cli.features.extract import extract_features

    workspace, reporter = invocation.workspace, invocation.reporter
    for domain in shop.domains:
        settings = invocation.settings(domain=domain.name)
        build_tables(
            workspace,
            domain.name,
            settings.data,
            interactions=domain.interactions,
            items=domain.items,
            reporter=reporter,
        )
        fetch_images(workspace, domain.name, settings.data, offline=True, reporter=reporter)
        extract_features(workspace, domain.name, settings.features, settings.runtime.device, reporter)
