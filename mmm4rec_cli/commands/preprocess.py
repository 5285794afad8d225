"""`mmm4rec preprocess`."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmm4rec_cli.commands.invocation import Invocation, Result, command
from mmm4rec_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mmm4rec_cli.workspace import Workspace


class Engine(StrEnum):
    """What encodes."""

    local = "local"
    ray = "ray"


OWN_ENCODER = "own"
"""Name of the features file of `--features` where `--encoder` gives none."""


@command(
    "mmm4rec preprocess",
    "mmm4rec preprocess --domain magazine --no-images",
    "mmm4rec preprocess --domain my-shop --interactions orders.csv --items products.parquet",
    "mmm4rec preprocess --domain my-shop --features vectors.parquet",
    "mmm4rec preprocess --domain my-shop --append new-orders.csv --items new-products.jsonl",
    "mmm4rec preprocess --stats scientific",
    "mmm4rec preprocess --domain arts --shard 1/4",
)
def preprocess(
    invocation: Invocation,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="domains or mixes, as with --domain",
            metavar="DOMAIN",
            show_default="all whose raw files are there",
        ),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            help="domain to preprocess (repeatable)", metavar="NAME", show_default="all whose raw files are there"
        ),
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="mix of domains to preprocess as one (repeatable)",
            metavar="NAME",
            show_default="all whose raw files are there",
        ),
    ] = None,
    interactions: Annotated[
        Path | None,
        typer.Option(
            help="your own interactions, csv, parquet or jsonl: user_id, item_id, timestamp",
            metavar="FILE",
            show_default="the domain's raw files",
        ),
    ] = None,
    items: Annotated[
        Path | None,
        typer.Option(
            help="your own items, csv, parquet or jsonl: item_id, text (or title, brand, description), image",
            metavar="FILE",
            show_default="the domain's raw files",
        ),
    ] = None,
    append: Annotated[
        Path | None,
        typer.Option(
            help="interactions to add to the domain's tables; ids stay, --items FILE brings new items",
            metavar="FILE",
            show_default="none",
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help="your own vectors, parquet or jsonl: item_id, text, image", metavar="FILE", show_default="an encoder's"
        ),
    ] = None,
    processed: Annotated[
        Path | None,
        typer.Option(
            "--import-processed",
            help="folder in the published layout: *_seq.jsonl, item2id.jsonl, user2id.jsonl, *_feat.pth",
            metavar="DIR",
            show_default="the domain's raw files",
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="siglip, siglip2, clip, blip, blip2, fashion-siglip, siglip+roberta, clip+bert, sketch (no weights, "
            "not for research), an id or a folder; with --features its name",
            metavar="NAME",
            show_default="features.encoder = siglip",
        ),
    ] = None,
    text_model: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face id or folder of a text model of its own",
            metavar="ID|DIR",
            show_default="the encoder's",
        ),
    ] = None,
    image_model: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face id or folder of an image model of its own",
            metavar="ID|DIR",
            show_default="the encoder's",
        ),
    ] = None,
    skip_features: Annotated[
        bool, typer.Option("--skip-features", help="end behind the tables and the pictures")
    ] = False,
    no_images: Annotated[bool, typer.Option("--no-images", help="fetch no pictures and use none")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="fetch no pictures, use those that are there")] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="make nothing: describe the tables that are there, beside published counts")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            help="encode the I-th of N shares, one a machine; then --merge", metavar="I/N", show_default="all"
        ),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="encode nothing, join what all shards made")] = False,
    engine: Annotated[
        Engine, typer.Option(help="where encoding runs: this process and its workers, or Ray (extra [ray])")
    ] = Engine.local,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or cuda:N", show_default="runtime.device = auto")
    ] = None,
) -> Result:
    """Make the tables, fetch the pictures of the items that were kept, and encode texts and pictures."""
    from mmm4rec_cli.data.growth import append_to_tables
    from mmm4rec_cli.data.images import LEFT_OUT, fetch_images, leave_images_out
    from mmm4rec_cli.data.preprocess import build_tables
    from mmm4rec_cli.data.tables import command as command_line
    from mmm4rec_cli.device import resolve_device
    from mmm4rec_cli.features.encoders import model_sources
    from mmm4rec_cli.features.extract import extract_features, import_features
    from mmm4rec_cli.features.parts import read_shard

    workspace, reporter = invocation.workspace, invocation.reporter
    wanted = _domains(workspace, [*(names or []), *(domain or [])], mix or [])
    if stats:
        return _described(workspace, wanted)
    if no_images and offline:
        raise UsageError("--no-images and --offline exclude one another", hint="--offline uses the pictures on disk")
    if features is not None and skip_features:
        raise UsageError("--features and --skip-features exclude one another", hint="leave one of them out")
    if append is not None and interactions is not None:
        raise UsageError(
            "--append and --interactions exclude one another",
            hint="--interactions makes a domain anew, --append adds to it",
        )
    share = None if shard is None else read_shard(shard)
    if share is not None and merge:
        raise UsageError("--shard and --merge exclude one another", hint="--merge comes when every shard is done")
    if (share is not None or merge or engine != Engine.local) and (features is not None or skip_features):
        raise UsageError(
            "--shard, --merge and --engine are about encoding, and --features and --skip-features encode nothing",
            hint="leave one side out",
        )
    if len(wanted) != 1 and any(file is not None for file in (interactions, items, features, append)):
        raise UsageError(
            "own files belong to one domain, and none or several are named",
            hint="name it with --domain NAME: letters, digits, - and _",
        )
    if processed is not None:
        if len(wanted) != 1 or any(one is not None for one in (interactions, items, features)):
            raise UsageError(
                "--import-processed takes one domain and no other files",
                hint="name it with --domain NAME or --mix NAME",
            )
        return _imported(invocation, wanted[0], processed, encoder)
    options = {
        "features.encoder": encoder,
        "features.text_model": text_model,
        "features.image_model": image_model,
        "runtime.device": device,
    }
    # What is wrong with a setting is said before the first domain, not halfway.
    resolved = {name: invocation.resolved(domain=name, options=options) for name in wanted or _complete(workspace)}
    if features is None and not skip_features:
        for one in resolved.values():
            model_sources(one.settings.features)
            resolve_device(one.settings.runtime.device)
    manifests = []
    for name, one in resolved.items():
        settings = one.settings
        if append is not None:
            manifest = append_to_tables(workspace, name, settings.data, append, items=items, reporter=reporter)
        else:
            manifest = build_tables(
                workspace, name, settings.data, interactions=interactions, items=items, reporter=reporter
            )
        if no_images or (append is not None and manifest.get("images") == LEFT_OUT):
            manifest = leave_images_out(workspace, name)
        elif features is None:
            manifest = fetch_images(workspace, name, settings.data, offline=offline, reporter=reporter)
        path = None
        if features is not None:
            own = settings.features.encoder if one.is_set("features.encoder") else OWN_ENCODER
            path = import_features(workspace, name, features, own, reporter)
        elif not skip_features:
            path = extract_features(
                workspace,
                name,
                settings.features,
                settings.runtime.device,
                reporter,
                engine=engine.value,
                shard=share,
                merge=merge,
            )
        manifests.append(manifest | {"features": None if path is None else str(path)})
    document = manifests[0] if len(manifests) == 1 else {"domains": manifests}
    shown = [part for manifest in manifests for part in _shown(manifest)]
    if share is not None:
        words = [word for name in resolved for word in ("--mix" if name in (mix or []) else "--domain", name)]
        words += [word for option, value in _named(encoder, text_model, image_model) for word in (option, value)]
        return Result(document, *shown, next=command_line(workspace, "preprocess", *words, "--merge"))
    return Result(document, *shown, next=_next(workspace, list(resolved)))


def _named(encoder: str | None, text_model: str | None, image_model: str | None) -> list[tuple[str, str]]:
    """The options that choose the encoder, those that were given."""
    options = (("--encoder", encoder), ("--text-model", text_model), ("--image-model", image_model))
    return [(option, value) for option, value in options if value is not None]


def _imported(invocation: Invocation, name: str, folder: Path, encoder: str | None) -> Result:
    """Take a folder in the published layout."""
    from mmm4rec_cli.data.import_processed import import_processed
    from mmm4rec_cli.features.store import encoder_name

    workspace = invocation.workspace
    settings = invocation.settings(domain=name, options={"features.encoder": encoder})
    file = encoder_name(settings.features)
    manifest = import_processed(workspace, name, folder, file, invocation.reporter)
    path = workspace.features(name, file)
    manifest |= {"features": str(path) if path.is_file() else None}
    return Result(manifest, *_shown(manifest), next=_next(workspace, [name]))


def _domains(workspace: "Workspace", domains: Sequence[str], mixes: Sequence[str]) -> list[str]:
    """The domains and mixes that were named, each once."""
    from mmm4rec_cli.data.domains import mix as known_mix

    for mix in mixes:
        known_mix(mix)
    return list(dict.fromkeys((*domains, *mixes)))


def _complete(workspace: "Workspace") -> list[str]:
    """The domains and mixes whose raw files are there; a mix stands for its domains.

    Raises:
        DataError: there is none.
    """
    from mmm4rec_cli.data.domains import MIXES
    from mmm4rec_cli.data.preprocess import domains_at_hand
    from mmm4rec_cli.data.tables import command as command_line

    there = domains_at_hand(workspace)
    mixes = [mix for mix, members in MIXES.items() if set(members) <= set(there)]
    covered = {member for mix in mixes for member in MIXES[mix]}
    names = [*mixes, *(name for name in there if name not in covered)]
    if not names:
        raise DataError(
            f"no domain has its raw files in {workspace.raw('any').parent}",
            hint=f"{command_line(workspace, 'download')}, then {command_line(workspace, 'preprocess')}; "
            "for your own data --interactions FILE --items FILE --domain NAME",
        )
    return names


def _shown(manifest: dict[str, Any]) -> list["RenderableType"]:
    from mmm4rec_cli.console import table

    counts = manifest["counts"]
    if "appended" in manifest:
        counts = [*counts, manifest | {"step": "with what was appended"}]
    steps = [(one["step"], one["users"], one["items"], one["rows"]) for one in counts]
    shares = ("tied_share", "tied in time"), ("text_share", "items with text"), ("image_share", "items with image")
    said = ", ".join(f"{words} {manifest[key]:.1%}" for key, words in shares)
    return [
        table(manifest["domain"], ("step", "users", "items", "interactions"), steps),
        f"{said}; features: {manifest['features'] or 'none'}",
    ]


def _described(workspace: "Workspace", names: Sequence[str]) -> Result:
    """What the tables of some domains, or of all that have tables, hold."""
    from mmm4rec_cli.data.domains import check_domain
    from mmm4rec_cli.data.statistics import describe, domains_with_tables
    from mmm4rec_cli.data.tables import command as command_line

    found = [check_domain(workspace, name) for name in names] or domains_with_tables(workspace)
    if not found:
        raise DataError(
            f"no domain has tables in {workspace.processed('any').parent}", hint=command_line(workspace, "preprocess")
        )
    documents = [describe(workspace, name) for name in found]
    shown = [part for document in documents for part in _shown_statistics(document)]
    return Result(documents[0] if len(documents) == 1 else {"domains": documents}, *shown)


def _shown_statistics(document: dict[str, Any]) -> list["RenderableType"]:
    from mmm4rec_cli.console import table

    published = document["published"] or {}
    sizes = [
        (name, document[name], published.get(name), document[name] - published[name] if name in published else None)
        for name in ("users", "items", "interactions")
    ]
    lengths = [(f"per {of}", *document["per"][of].values()) for of in ("user", "item")]
    most = max(row["users"] for row in document["histogram"])
    bars = [(row["length"], row["users"], "█" * round(30 * row["users"] / most)) for row in document["histogram"]]
    shares = (
        ("tied_share", "tied in time"),
        ("repeated_share", "repeated items"),
        ("text_share", "items with text"),
        ("image_share", "items with image"),
        ("image_url_share", "items with an image's address"),
    )
    said = ", ".join(f"{words} {document[key]:.1%}" for key, words in shares)
    return [
        table(document["domain"], ("", "here", "published", "difference"), sizes),
        table("interactions", ("", *document["per"]["user"]), lengths),
        table("history lengths", ("length", "users", ""), bars),
        f"from {document['first']} to {document['last']}; {said}",
    ]


def _next(workspace: "Workspace", names: Sequence[str]) -> str:
    from mmm4rec_cli.data.domains import MIXES
    from mmm4rec_cli.data.tables import command as command_line

    mix = next((name for name in names if name in MIXES), None)
    if mix is not None:
        return command_line(workspace, "pretrain", "--mix", mix)
    return command_line(workspace, "finetune", "--domain", "scientific" if "scientific" in names else names[0])
