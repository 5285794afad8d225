"""Files that are either whole or not there."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmm4rec_cli.errors import DataError

_JOURNAL = ".renames.json"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it onto `path` if the block succeeds, else remove it.

    The temporary name starts with a dot and ends with `.part`, so that readers which list `*.parquet` never see it.
    """
    part = _part(path)
    try:
        yield part
        _settle(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def written_together(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Give temporary paths for the files of a folder; all of them get their names if the block succeeds, else none.

    What shall be renamed is written down, whole, before the first rename. A stop behind that leaves the renames to
    `finish_renames`, which whoever reads the folder calls first: there is always the old state or the new one.
    """
    finish_renames(folder)
    parts: dict[str, Path] = {}

    def part(name: str) -> Path:
        parts[name] = _part(folder / name)
        return parts[name]

    try:
        yield part
        for written in parts.values():
            _settle(written)
        write_json(folder / _JOURNAL, {name: written.name for name, written in parts.items()})
    except BaseException:
        if not (folder / _JOURNAL).exists():
            for written in parts.values():
                written.unlink(missing_ok=True)
        raise
    finish_renames(folder)


def finish_renames(folder: Path) -> None:
    """Do what is left of the renames that a stopped `written_together` wrote down."""
    journal = folder / _JOURNAL
    try:
        names = json.loads(journal.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    for name, part in names.items():
        with suppress(FileNotFoundError):
            (folder / part).replace(folder / name)
    journal.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    return Path(name)


def _settle(part: Path) -> None:
    """Give a written file the usual permissions, and wait until it is on the disk."""
    umask = os.umask(0)
    os.umask(umask)
    part.chmod(0o666 & ~umask)
    with part.open("rb") as written:
        os.fsync(written.fileno())


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Be the only process that writes into `folder`, which is made; sweep out what killed ones left half written.

    The lock is on the folder itself and leaves no file. Where the system has no such locks, nothing is locked or swept.

    Raises:
        DataError: another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{folder}: another mmm4rec is writing there", hint="wait until it has ended") from None
        for left in folder.glob(".*.part"):
            with contextlib.suppress(IsADirectoryError, PermissionError):
                left.unlink()
        yield
    finally:
        os.close(handle)


def write_json(path: Path, document: Any) -> None:
    """Write `document` as indented JSON, whole or not at all; NaN and infinity are refused (ValueError)."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    with written_whole(path) as part:
        part.write_text(text + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
