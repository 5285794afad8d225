"""`mmm4rec download`."""

from pathlib import Path
from typing import Annotated

import typer

from mmm4rec_cli.commands.invocation import Invocation, Result, command


@command(
    "mmm4rec download",
    "mmm4rec download --mix fhckm",
    "mmm4rec download --domain pantry --mirror https://example.org/amazon_v2",
    "mmm4rec download --domain pantry --from-dir ~/Downloads",
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
        typer.Option(help="ratings or metadata (repeatable)", metavar="KIND", show_default="ratings and metadata"),
    ] = None,
    mirror: Annotated[
        list[str] | None,
        typer.Option(
            help="address that serves categoryFilesSmall/ and metaFiles2/, tried first (repeatable)",
            metavar="URL",
            show_default="none",
        ),
    ] = None,
    from_dir: Annotated[
        Path | None,
        typer.Option(help="folder with files fetched by hand", metavar="DIR", show_default="none: from the network"),
    ] = None,
) -> Result:
    """Fetch ratings and metadata of Amazon Review 2018; what is there already is kept."""
    from mmm4rec_cli.data.domains import DOWNSTREAM
    from mmm4rec_cli.data.domains import mix as members_of
    from mmm4rec_cli.data.download import KINDS
    from mmm4rec_cli.data.download import download as fetch
    from mmm4rec_cli.data.tables import command as command_line

    workspace = invocation.workspace
    invocation.settings()
    names = [*(domain or []), *(name for one in mix or [] for name in members_of(one))]
    files = fetch(
        workspace,
        dict.fromkeys(names or DOWNSTREAM),
        kinds=kind or list(KINDS),
        mirrors=mirror or (),
        from_dir=from_dir,
        reporter=invocation.reporter,
    )
    document = {"files": [{"path": str(path), "bytes": path.stat().st_size} for path in files]}
    return Result(document, *map(str, files), next=command_line(workspace, "preprocess"))
