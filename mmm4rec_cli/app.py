"""The command line: the table of commands, and the one place where errors become exit codes.

0 done · 1 a bug (with traceback) · 2 usage or settings · 3 data · 4 checkpoint or run · 5 backend or device ·
6 network · 130 interrupted.
"""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from mmm4rec_cli import __version__
from mmm4rec_cli.commands.demo import demo
from mmm4rec_cli.commands.doctor import doctor
from mmm4rec_cli.commands.download import download
from mmm4rec_cli.commands.evaluate import evaluate
from mmm4rec_cli.commands.export import export
from mmm4rec_cli.commands.finetune import finetune
from mmm4rec_cli.commands.invocation import Command
from mmm4rec_cli.commands.preprocess import preprocess
from mmm4rec_cli.commands.pretrain import pretrain
from mmm4rec_cli.commands.recommend import recommend
from mmm4rec_cli.commands.report import report
from mmm4rec_cli.commands.runs import runs
from mmm4rec_cli.console import print_json, show_error
from mmm4rec_cli.errors import DataError, DeviceError, UsageError, UserError
from mmm4rec_cli.world import leave

COMMANDS: tuple[tuple[str, Command], ...] = (
    ("Data", demo),
    ("Data", download),
    ("Data", preprocess),
    ("Training", pretrain),
    ("Training", finetune),
    ("Results", evaluate),
    ("Results", recommend),
    ("Results", export),
    ("Results", report),
    ("Results", runs),
    ("Machine", doctor),
)
"""Panel of the help page and command, in the order in which they are used."""

INTERRUPTED = 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"mmm4rec {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and end", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Multi-modal sequential recommendation: from raw logs, texts and pictures to full-ranking metrics."""


for _panel, _command in COMMANDS:
    app.command(
        _command.name,
        rich_help_panel=_panel,
        epilog="\n\n".join(("Examples:", *(f"  {example}" for example in _command.examples))),
    )(_command.run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and give back its exit code.

    Args:
        arguments: the words behind `mmm4rec`; None: those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words:
        app(args=["--help"], prog_name="mmm4rec", standalone_mode=False)
        return UsageError.code
    as_json = "--json" in words
    try:
        with _terminating_cleanly():
            code = app(args=words, prog_name="mmm4rec", standalone_mode=False)
            leave()
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        hint = "type the same command again: what was finished is kept"
        return _refuse(INTERRUPTED, ["interrupted"], hint, as_json)
    except BrokenPipeError:
        # The reader of our output went away (`| head`); a second failure while Python closes it must not show.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        known = _as_user_error(error, words)
        if known is not None:
            return _refuse(known.code, known.problems, known.hint, as_json)
        traceback.print_exc()
        return _refuse(
            1,
            [f"{type(error).__name__}: {error}"],
            "this is a bug of mmm4rec: please report it with the lines above",
            as_json,
        )


def _refuse(code: int, problems: Sequence[str], hint: str, as_json: bool) -> int:
    if as_json:
        print_json({"error": {"code": code, "message": "\n".join(problems), "hint": hint}})
    else:
        show_error(problems, hint)
    return code


def _as_user_error(error: Exception, words: Sequence[str]) -> UserError | None:
    """`error` as one that the user can mend; None where it is a bug of ours."""
    command = next((word for word in words if not word.startswith("-")), "")
    if isinstance(error, UserError):
        return error
    if isinstance(error, typer.TyperException):
        known = any(command == each.name for _, each in COMMANDS)
        return UsageError(
            " ".join(error.format_message().split()),
            hint=f"mmm4rec {command} --help shows every option" if known else "mmm4rec --help shows every command",
        )
    if _out_of_memory(error):
        return DeviceError(f"out of memory: {_first_line(error)}", hint=_less_memory(command))
    if _from_kernels(error):
        return DeviceError(_first_line(error), hint="mmm4rec doctor shows what this machine can run")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return DataError(
            f"{error.filename or 'a file'}: {error.strerror}",
            hint="mmm4rec doctor shows the disk space of the workspace",
        )
    return None


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    # On the CPU torch raises a plain RuntimeError, which only its text tells from others.
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def _less_memory(command: str) -> str:
    section = {"preprocess": "features", "pretrain": "pretrain", "finetune": "finetune"}.get(command, "evaluate")
    hint = f"lower --set {section}.batch_size=…"
    if section in ("pretrain", "finetune"):
        hint += f" and raise {section}.accumulation as much, or lower model.hidden_size"
    if section == "finetune":
        hint += "; for a large catalogue --set finetune.loss=sampled"
    return hint


def _from_kernels(error: Exception) -> bool:
    """Whether a kernel refused its input or its backend: it says so, or raised ValueError in its own code."""
    kernels = sys.modules.get("mmm4rec_kernels")
    if kernels is None:
        return False
    if isinstance(error, kernels.BackendUnavailable):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = str(frames[-1].f_globals.get("__name__", "")) if frames else ""
    return isinstance(error, ValueError) and raised_in.partition(".")[0] == "mmm4rec_kernels"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def _terminating_cleanly() -> Iterator[None]:
    """Let a polite end (SIGTERM) unwind the stack, so that no temporary file stays behind."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
