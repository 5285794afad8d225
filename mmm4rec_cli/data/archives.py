"""Archives unpacked without harm: nothing outside the folder, no links, no more bytes than a limit, all or nothing."""

import os
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mmm4rec_cli.data.fetch import require_space, said
from mmm4rec_cli.errors import DataError

ENDINGS = (".zip", ".tar.gz", ".tgz")
MOST_BYTES = 200 * 10**9
MOST_FILES = 2_000_000
_RATIO = 200
"""Unpacked bytes for a packed one: vectors and JSON pack far less well."""

_HINT = "do not trust this archive; fetch it again from its publisher"


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    open: Callable[[], IO[bytes]]


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive that can be unpacked."""
    return path.name.endswith(ENDINGS)


def folder_of(archive: Path) -> Path:
    """The folder that an archive is unpacked into: its name without the ending, beside it."""
    ending = next(ending for ending in ENDINGS if archive.name.endswith(ending))
    return archive.with_name(archive.name.removesuffix(ending))


def unpack(archive: Path, folder: Path, most: int = MOST_BYTES) -> list[Path]:
    """Unpack a zip or tar.gz archive into `folder`, which is there with everything in it, or not at all.

    Args:
        archive: the file.
        folder: what becomes its content; one that is there is replaced.
        most: bytes that may come out of it; also at most 200 for each packed one (and 64 MiB more).

    Returns:
        The files, sorted.

    Raises:
        DataError: damaged, or it holds an absolute path, a path that leaves the folder, a link or a device, a name
            twice, or too much; nothing is left of it.
    """
    most = min(most, _RATIO * archive.stat().st_size + 2**26)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".unpacking", dir=folder.parent))
    try:
        kind = _zip_members if archive.name.endswith(".zip") else _tar_members
        total, names = 0, set()
        for member in kind(archive):
            problem = _outside(member.name)
            if problem is None and member.name in names:
                problem = "is there twice"
            if problem is not None:
                raise DataError(f"{archive}: {member.name[:120]!r} {problem}", hint=_HINT)
            names.add(member.name)
            if total + member.size > most or len(names) > MOST_FILES:
                raise _too_much(archive, most)
            require_space(fresh, member.size)
            total += _copied(member, fresh / member.name, most - total, archive)
        _replace(fresh, folder)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, NotImplementedError) as error:
        raise DataError(f"{archive}: damaged or of an unknown kind ({said(error)})", hint=_HINT) from error
    except RuntimeError as error:  # zipfile's word for an encrypted member
        raise DataError(f"{archive}: {said(error)}", hint=_HINT) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sweep(folder: Path) -> None:
    """Remove what killed processes left half unpacked in a folder."""
    for left in folder.glob(".*.unpacking"):
        shutil.rmtree(left, ignore_errors=True)


def _too_much(archive: Path, most: int) -> DataError:
    return DataError(f"{archive}: more than {most / 1e9:.1f} GB or {MOST_FILES} files come out of it", hint=_HINT)


def _outside(name: str) -> str | None:
    """What makes a member's name unsafe, if anything."""
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        return "is an absolute path"
    parts = re.split(r"[/\\]", name)
    if ".." in parts:
        return "leaves the folder"
    if "\\" in name or "\0" in name or not any(parts) or any(len(os.fsencode(part)) > 255 for part in parts):
        return "is no name of a file"
    return None


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as opened:
        for info in opened.infolist():
            kind = info.external_attr >> 28
            if kind not in (0, 4, 8):
                raise DataError(f"{archive}: {info.filename[:120]!r} is a link or device", hint=_HINT)
            # ZipInfo mends names; the one that was written is judged.
            name = info.orig_filename
            if info.is_dir():
                _require_inside(archive, name)
                continue
            yield _Member(name, info.file_size, lambda info=info: opened.open(info))  # type: ignore[misc]


def _tar_members(archive: Path) -> Iterator[_Member]:
    with tarfile.open(archive, "r:gz") as opened:
        for info in opened:
            if info.isdir():
                _require_inside(archive, info.name)
                continue
            if not info.isreg():
                raise DataError(f"{archive}: {info.name[:120]!r} is a link or device", hint=_HINT)
            yield _Member(info.name, info.size, lambda info=info: opened.extractfile(info))  # type: ignore[misc,arg-type]


def _require_inside(archive: Path, name: str) -> None:
    problem = _outside(name)
    if problem is not None and name.strip("./"):
        raise DataError(f"{archive}: {name[:120]!r} {problem}", hint=_HINT)


def _copied(member: _Member, path: Path, most: int, archive: Path) -> int:
    """Write a member out, whatever size it says it has; gives the bytes."""
    written = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with member.open() as source, path.open("xb") as target:
            while piece := source.read(2**20):
                written += len(piece)
                if written > most:
                    raise _too_much(archive, most)
                target.write(piece)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise DataError(f"{archive}: {member.name[:120]!r} stands in another member's place", hint=_HINT) from None
    return written


def _replace(fresh: Path, folder: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    fresh.chmod(0o777 & ~umask)
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".unpacking", dir=folder.parent))
        folder.replace(old / folder.name)
        fresh.replace(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        fresh.replace(folder)
