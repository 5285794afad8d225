"""`mmm4rec download`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmm4rec_cli.commands.invocation import Invocation, Result, command
from mmm4rec_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from mmm4rec_cli.workspace import Workspace


@command(
    "mmm4rec download",
    "mmm4rec download --mix fhckm",
    "mmm4rec download --domain pantry --mirror https://example.org/amazon_v2",
    "mmm4rec download --domain pantry --from-dir ~/Downloads",
    "mmm4rec download --kind weights --kind processed",
    "mmm4rec download --check",
)
def download(
    invocation: Invocation,
    domain: Annotated[
        list[str] | None,
        typer.Option(help="Amazon category, short name (repeatable)", metavar="NAME", show_default="the paper's five"),
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(help="mix, which stands for its domains (repeatable)", metavar="NAME", show_default="none"),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="ratings, metadata, images (of domains with tables), processed or weights (published) (repeatable)",
            metavar="KIND",
            show_default="ratings and metadata",
        ),
    ] = None,
    mirror: Annotated[
        list[str] | None,
        typer.Option(
            help="address that serves categoryFilesSmall/ and metaFiles2/, tried first (repeatable)",
            metavar="URL",
            show_default="those of data.mirrors",
        ),
    ] = None,
    from_dir: Annotated[
        Path | None,
        typer.Option(help="folder with files fetched by hand", metavar="DIR", show_default="none: from the network"),
    ] = None,
    source: Annotated[
        str, typer.Option(help="edition of the Amazon data: amazon-2018 or amazon-2023", metavar="NAME")
    ] = "amazon-2018",
    show_list: Annotated[
        bool, typer.Option("--list", help="show what there is to be had and what is there, and fetch nothing")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="read what was downloaded again and compare it with what was first seen")
    ] = False,
) -> Result:
    """Fetch ratings and metadata of the Amazon reviews, pictures, and what the paper's authors published."""
    from mmm4rec_cli.data.domains import CATEGORIES, DOWNSTREAM, members
    from mmm4rec_cli.data.domains import mix as known_mix
    from mmm4rec_cli.data.download import ALL_KINDS, KINDS
    from mmm4rec_cli.data.download import download as fetch
    from mmm4rec_cli.data.tables import command as command_line

    workspace, reporter = invocation.workspace, invocation.reporter
    settings = invocation.settings().data
    for one in mix or []:
        known_mix(one)
    named = list(dict.fromkeys([*(domain or []), *(mix or [])]))
    kinds = list(dict.fromkeys(kind or KINDS))
    for one in kinds:
        if one not in ALL_KINDS:
            raise UsageError(f"unknown kind {one!r}", hint=f"kinds: {', '.join(ALL_KINDS)}")
    if check:
        return _checked(workspace, named)
    if show_list:
        return _listed(workspace, named or list(CATEGORIES), source)
    raw = [one for one in kinds if one in KINDS]
    fetched = [one for one in kinds if one != "images"]
    files: list[Path] = []
    if fetched:
        names = [member for one in named for member in members(one)] if raw else []
        files = fetch(
            workspace,
            (names or DOWNSTREAM) if raw else (),
            kinds=fetched,
            mirrors=mirror or (),
            from_dir=from_dir,
            reporter=reporter,
            source=source,  # type: ignore[arg-type]  # a wrong one is refused there
            settings=settings,
        )
    document: dict[str, Any] = {"files": [{"path": str(path), "bytes": path.stat().st_size} for path in files]}
    shown = [str(path) for path in files]
    if "images" in kinds:
        counts = _images(invocation, named)
        document["images"] = counts
        shown += [
            f"{name}: {', '.join(f'{key} {value}' for key, value in one.items())}" for name, one in counts.items()
        ]
    following = command_line(workspace, "preprocess")
    if "weights" in kinds and not raw:
        following = command_line(workspace, "finetune", "--domain", "scientific")
    elif "processed" in kinds and not raw:
        place = str(workspace.published / "…")
        following = command_line(workspace, "preprocess", "--import-processed", place, "--domain", "scientific")
    return Result(document, *shown, next=following)


def _images(invocation: Invocation, named: Sequence[str]) -> dict[str, Any]:
    """Fetch the pictures of the named domains, or of all that have tables; gives the counts of each."""
    from mmm4rec_cli.data.domains import check_domain
    from mmm4rec_cli.data.images import fetch_images
    from mmm4rec_cli.data.tables import command as command_line

    workspace = invocation.workspace
    processed = workspace.processed("any").parent
    names = list(named) or sorted(path.parent.name for path in processed.glob("*/manifest.json"))
    if not names:
        raise DataError(
            f"no domain has tables in {processed}, and pictures are fetched for the items that the filters keep",
            hint=f"{command_line(workspace, 'download')}, then {command_line(workspace, 'preprocess')}",
        )
    counts = {}
    for name in names:
        check_domain(workspace, name)
        settings = invocation.settings(domain=name).data
        counts[name] = fetch_images(workspace, name, settings, reporter=invocation.reporter)["images"]
    return counts


def _checked(workspace: "Workspace", named: Sequence[str]) -> Result:
    from mmm4rec_cli.console import table
    from mmm4rec_cli.data.download import check_downloads

    found = check_downloads(workspace, named or None)
    rows = [(one["path"], one["bytes"], one["sha256"][:12], one["published"]) for one in found]
    shown = table("", ("file", "bytes", "sha256", "held to"), rows)
    return Result({"files": found}, shown, f"{len(found)} files are as they were first seen")


def _listed(workspace: "Workspace", names: Sequence[str], source: str) -> Result:
    from mmm4rec_cli.console import table
    from mmm4rec_cli.data import amazon_2023
    from mmm4rec_cli.data.domains import members
    from mmm4rec_cli.data.download import KINDS, places

    flat = [member for name in names for member in members(name)]
    if source == "amazon-2023":
        flat = [name for name in flat if name in amazon_2023.CATEGORIES_2023]
    found = places(workspace, flat, KINDS, source)  # type: ignore[arg-type]  # a wrong one is refused there
    document = [
        {
            "domain": one.domain,
            "kind": one.kind,
            "file": one.below,
            "path": str(one.path),
            "bytes": one.path.stat().st_size if one.path.is_file() else None,
        }
        for one in found
    ]
    rows = [(one["domain"], one["kind"], one["file"], one["bytes"]) for one in document]
    shown = table(f"{source}: below a mirror's address", ("domain", "kind", "file", "bytes here"), rows)
    return Result({"source": source, "files": document}, shown)
