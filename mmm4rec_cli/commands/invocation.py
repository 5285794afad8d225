"""What all commands share: the options that each of them has, and how a result is shown."""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec

import typer

from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.workspace import Workspace

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mmm4rec_cli.runs import Run
    from mmm4rec_cli.settings import Resolved, Settings

COMMON = "Common options"
P = ParamSpec("P")


@dataclass(frozen=True)
class Invocation:
    """One call of a command: its common options.

    Attributes:
        workspace: the folder that everything is read from and written to.
        config: the settings file named with `--config`; None: the workspace's own.
        overrides: the texts of `--set`.
        json: print one JSON document and nothing else.
        reporter: takes progress, notes and warnings.
    """

    workspace: Workspace
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    json: bool = False
    reporter: Reporter = field(default_factory=SilentReporter)

    def resolved(
        self, *, domain: str | None = None, model: str | None = None, options: Mapping[str, Any] | None = None
    ) -> "Resolved":
        """The settings and where each came from; `options` maps a setting to the command's own option, None: not given.

        The presets of `domain` and `model` lie under all that is given.

        Raises:
            UsageError: as `mmm4rec_cli.settings.load`.
        """
        from mmm4rec_cli.settings import resolve

        return resolve(
            self.config, self.overrides, domain=domain, model=model, options=options, workspace=self.workspace
        )

    def settings(self, *, domain: str | None = None, options: Mapping[str, Any] | None = None) -> "Settings":
        """`resolved`, the settings alone."""
        return self.resolved(domain=domain, options=options).settings


class Result:
    """What a command hands back to be printed.

    Args:
        document: the JSON document of `--json`.
        *shown: what a person reads: texts and rich tables, printed one below the other.
        next: the command to type next.
    """

    def __init__(self, document: Any, *shown: "RenderableType", next: str | None = None) -> None:
        self.document = document
        self.shown = shown
        self.next = next


def curves_of(run: "Run") -> list[str]:
    """The learning curves of a run, as a person sees them in the terminal: one text a seed."""
    from mmm4rec_cli.console import learning_curves

    metric = run.settings_document.get("finetune", {}).get("metric")
    members = run.members
    labels = [f"seed {member.about['seeds'][0]}  " if len(members) > 1 else "" for member in members]
    made = (learning_curves(member.epochs, metric, label) for member, label in zip(members, labels, strict=True))
    return [one for one in made if one]


@dataclass(frozen=True)
class Command:
    """A command as the table in `mmm4rec_cli.app` takes it."""

    name: str
    run: Callable[..., None]
    examples: tuple[str, ...]


def _common(
    workspace: Annotated[
        Path,
        typer.Option(
            help="folder with the data and the runs",
            envvar="MMM4REC_WORKSPACE",
            metavar="DIR",
            rich_help_panel=COMMON,
        ),
    ] = Path(),
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with settings",
            metavar="FILE",
            show_default="mmm4rec.toml in the workspace, if there",
            rich_help_panel=COMMON,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="set any setting; the value is a TOML literal, else a text (repeatable)",
            metavar="SECTION.KEY=VALUE",
            show_default="nothing",
            rich_help_panel=COMMON,
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="print one JSON document, nothing else, on standard output", rich_help_panel=COMMON
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="no bars and no log on standard error", rich_help_panel=COMMON)
    ] = False,
) -> Invocation:
    """The options that every command has, written once."""
    from mmm4rec_cli.console import reporter

    return Invocation(
        Workspace(workspace), config, tuple(overrides or ()), json, SilentReporter() if quiet else reporter()
    )


def command(*examples: str) -> Callable[[Callable[Concatenate[Invocation, P], Result]], Command]:
    """Make a function of (invocation, own options) a command with the common options beside its own.

    Args:
        *examples: command lines for its help, the most usual first.
    """

    def made(function: Callable[Concatenate[Invocation, P], Result]) -> Command:
        common = inspect.signature(_common).parameters
        own = list(inspect.signature(function).parameters.values())[1:]

        @functools.wraps(function)
        def run(**given: Any) -> None:
            from mmm4rec_cli.console import print_json, show

            invocation = _common(**{name: given.pop(name) for name in common})
            # With --json a library that prints must not spoil the document.
            with contextlib.redirect_stdout(sys.stderr) if invocation.json else contextlib.nullcontext():
                result = function(invocation, **given)  # type: ignore[call-arg]
            if invocation.json:
                print_json(result.document)
            else:
                show(*result.shown, next_command=result.next)

        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *common.values())]
        vars(run)["__signature__"] = inspect.Signature(keyword)
        run.__annotations__ = {p.name: p.annotation for p in keyword}
        return Command(function.__name__.replace("_", "-"), run, examples)

    return made
