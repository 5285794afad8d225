"""`mmm4rec finetune`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmm4rec_cli.commands.invocation import Invocation, Result, command, curves_of

if TYPE_CHECKING:
    from rich.console import RenderableType


@command(
    "mmm4rec finetune --domain scientific",
    "mmm4rec finetune --domain scientific --model sasrec",
    "mmm4rec finetune --domain my-shop --pretrained none --seed 1 --seed 2 --seed 3",
)
def finetune(
    invocation: Invocation,
    domain: Annotated[str, typer.Option(help="domain to train and test on")] = "scientific",
    pretrained: Annotated[
        str | None,
        typer.Option(
            help="pre-training run, published checkpoint file, or none",
            metavar="RUN|FILE|none",
            show_default="the newest run that fits, else published weights, else none",
        ),
    ] = None,
    item_bias: Annotated[
        bool | None,
        typer.Option(
            "--item-bias/--no-item-bias",
            help='a trained vector an item and modality (the paper\'s "with ID")',
            show_default="model.item_bias = true",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="mmm4rec or a baseline: gru4rec, sasrec, sasrec-t, bsarec, mamba4rec, mamba4rec-t, tim4rec, "
            "tim4rec-t, m3rec, hm4sr, athwe, unisrec",
            metavar="NAME",
        ),
    ] = "mmm4rec",
    encoder: Annotated[
        str | None, typer.Option(help="encoder of the item vectors", show_default="features.encoder = siglip")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="passes over the data, at most", show_default="finetune.epochs = 100")
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="seed (repeatable: mean and deviation)", show_default="runtime.seed = 2020"),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="unfinished run to go on with", metavar="RUN", show_default="none")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N", show_default="runtime.device = auto")
    ] = None,
) -> Result:
    """Train on one domain with early stopping and test once with the best weights."""
    from mmm4rec_cli.data.dataset import encoder_at_hand
    from mmm4rec_cli.data.domains import check_domain
    from mmm4rec_cli.runs import find_run
    from mmm4rec_cli.settings import for_run
    from mmm4rec_cli.training.finetune import finetune as train

    workspace, reporter = invocation.workspace, invocation.reporter
    run = None if resume is None else find_run(workspace, resume)
    if run is not None:
        domain, model = run.about["domain"], run.about["model"]
    domain = check_domain(workspace, domain)
    options = {
        "model.item_bias": item_bias,
        "features.encoder": encoder,
        "finetune.epochs": epochs,
        "runtime.seed": seed[0] if seed else None,
        "runtime.device": device,
    }
    resolved = invocation.resolved(domain=domain, model=model, options=options)
    settings = resolved.settings
    if run is not None:
        settings = for_run(run.settings_document, resolved, run=run.id, reporter=reporter)
    elif not resolved.is_set("features.encoder"):
        features = encoder_at_hand(workspace, [domain], settings.features)
        settings = settings.model_copy(update={"features": features})
    result = train(
        workspace,
        domain,
        settings,
        model=model,
        pretrained=pretrained,
        seeds=seed or (),
        time_is_set=run is not None or resolved.is_set("model.time"),
        resume=run,
        reporter=reporter,
    )
    trained = find_run(workspace, result["run"])
    following = workspace.command("evaluate", "--run", trained.short_id)
    return Result(result, *_shown(result), *curves_of(trained), next=following)


def _shown(result: dict[str, Any]) -> "list[RenderableType]":
    from mmm4rec_cli.console import metric_table

    deviations = result.get("metrics_sd", {})
    rows = {split: (values, deviations.get(split)) for split, values in result["metrics"].items()}
    rows |= {f"{name}, test": (values["test"], None) for name, values in result["yardsticks"].items()}
    start = f"from {result['pretrained']}" if result["pretrained"] else "from scratch"
    return [
        metric_table(f"{result['model']} on {result['domain']}, {start}", rows),
        f"best epoch {result['best_epoch']:g} of {result['epochs']:g}, {result['seconds']:.1f} s; run {result['run']}",
    ]
