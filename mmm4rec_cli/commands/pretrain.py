"""`mmm4rec pretrain`."""

from typing import Annotated

import typer

from mmm4rec_cli.commands.invocation import Invocation, Result, command, curves_of

DEFAULT_MIX = "fhckm"


@command(
    "mmm4rec pretrain", "mmm4rec pretrain --domain shop-kitchen --domain shop-toys", "mmm4rec pretrain --epochs 40"
)
def pretrain(
    invocation: Invocation,
    mix: Annotated[str | None, typer.Option(help="mix of domains", metavar="NAME", show_default=DEFAULT_MIX)] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(help="domain to train on (repeatable: all of them together)", show_default="the mix"),
    ] = None,
    model: Annotated[str, typer.Option(help="mmm4rec or a baseline, such as unisrec", metavar="NAME")] = "mmm4rec",
    encoder: Annotated[
        str | None, typer.Option(help="encoder of the item vectors", show_default="features.encoder = siglip")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="passes over the data", show_default="pretrain.epochs = 100")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="seed of all randomness", show_default="runtime.seed = 2020")] = None,
    resume: Annotated[
        str | None, typer.Option(help="unfinished run to go on with", metavar="RUN", show_default="none")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N", show_default="runtime.device = auto")
    ] = None,
) -> Result:
    """Train on the next item of every user of many domains, without validation."""
    from mmm4rec_cli.data.dataset import encoder_at_hand
    from mmm4rec_cli.data.domains import check_domain
    from mmm4rec_cli.errors import UsageError
    from mmm4rec_cli.runs import find_run
    from mmm4rec_cli.settings import for_run
    from mmm4rec_cli.training.pretrain import pretrain as train

    if mix and domain:
        raise UsageError("--mix and --domain exclude one another", hint="name a mix, or one or more domains")
    workspace, reporter = invocation.workspace, invocation.reporter
    options = {
        "features.encoder": encoder,
        "pretrain.epochs": epochs,
        "runtime.seed": seed,
        "runtime.device": device,
    }
    run = None if resume is None else find_run(workspace, resume)
    if run is not None:
        model = run.about["model"]
    domains = run.about["domains"] if run is not None and not (mix or domain) else [*(domain or [mix or DEFAULT_MIX])]
    domains = [check_domain(workspace, name) for name in dict.fromkeys(domains)]
    resolved = invocation.resolved(domain=domains[0] if len(domains) == 1 else None, model=model, options=options)
    settings = resolved.settings
    if run is not None:
        settings = for_run(run.settings_document, resolved, run=run.id, reporter=reporter)
    elif not resolved.is_set("features.encoder"):
        features = encoder_at_hand(workspace, domains, settings.features)
        settings = settings.model_copy(update={"features": features})
    result = train(workspace, domains, settings, model=model, resume=run, reporter=reporter)
    shown = (
        f"pre-trained on {result['domain']}: {result['epochs']} epochs, loss {result['loss']:.4f}, "
        f"{result['seconds']:.1f} s; run {result['run']}"
    )
    target = ["--domain", "scientific" if mix or not domain else domains[-1]]
    following = workspace.command("finetune", *target, *([] if model == "mmm4rec" else ["--model", model]))
    return Result(result, shown, *curves_of(find_run(workspace, result["run"])), next=following)
