"""Fetching the raw files of Amazon Review 2018: ratings and metadata, from the first mirror that has them whole.

No checksum of these files is published. So the SHA-256 of each file is written down when it is first seen
(`data/raw/<domain>/download.json`), and later copies must agree with it.
"""

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from mmm4rec_cli.data.domains import category, members
from mmm4rec_cli.errors import DataError, NetworkError, UsageError
from mmm4rec_cli.files import sha256, write_json, written_whole
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.workspace import Workspace

MIRRORS = ("https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2",)
LANDING_PAGE = "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/"
KINDS = {"ratings": "categoryFilesSmall/{}.csv", "metadata": "metaFiles2/meta_{}.json.gz"}
"""What can be fetched, with its place below a mirror's address."""

_ATTEMPTS = 4
_TIMEOUT = httpx.Timeout(60, connect=20)


class _Refused(Exception):
    """This mirror does not give this file; the text is its answer."""


class _Interrupted(Exception):
    """Worth another attempt at the same address."""

    def __init__(self, answer: str, wait: float = 0) -> None:
        super().__init__(answer)
        self.wait = wait


def download(
    workspace: Workspace,
    domains: Iterable[str],
    kinds: Iterable[str] = ("ratings", "metadata"),
    mirrors: Sequence[str] = (),
    from_dir: Path | None = None,
    reporter: Reporter | None = None,
) -> list[Path]:
    """Fetch the raw files of some domains into `data/raw/<domain>/`; those that are there are kept.

    An interrupted file is continued where it stopped, if the server says that it is still the same. Files of one
    domain do not wait for another's failure: what can be had is fetched, then the error is raised.

    Args:
        workspace: where to.
        domains: short names of Amazon categories, or mixes (which stand for their domains).
        kinds: `ratings`, `metadata`.
        mirrors: addresses tried before the known ones; each serves `categoryFilesSmall/<Category>.csv` and
            `metaFiles2/meta_<Category>.json.gz`.
        from_dir: a folder with files fetched by hand, flat or ordered as on a mirror; nothing is then asked of the net.
        reporter: hears of progress.

    Returns:
        The files, whether fetched now or there before.

    Raises:
        UsageError: an unknown domain or kind.
        DataError: `from_dir` lacks a file, or has another content than the one first seen.
        NetworkError: a file could not be had; every address is named with its answer.
    """
    reporter = reporter or SilentReporter()
    kinds = list(dict.fromkeys(kinds))
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UsageError(f"unknown kind {unknown[0]!r}", hint=f"kinds: {', '.join(KINDS)}")
    names = dict.fromkeys(member for domain in domains for member in members(domain))
    wanted = [(workspace.raw(name), KINDS[kind].format(category(name))) for name in names for kind in kinds]
    bases = [base.rstrip("/") for base in (*mirrors, *MIRRORS)]
    problems: list[str] = []
    dead: dict[str, str] = {}
    with httpx.Client(timeout=_TIMEOUT, follow_redirects=True, headers={"Accept-Encoding": "identity"}) as client:
        for folder, place in wanted:
            path = folder / Path(place).name
            if path.is_file():
                reporter.note(f"{path} is there already")
                if path.name not in _seen(folder):
                    _record(path, sha256(path), "found in place")
            elif from_dir is not None:
                problems += _copy(from_dir, place, path, reporter)
            else:
                problems += _fetch(client, bases, dead, place, path, reporter)
    if problems and from_dir is not None:
        raise DataError(*problems, hint=f"fetch the files by hand from {LANDING_PAGE} into {from_dir}")
    if problems:
        raise NetworkError(
            *problems,
            hint=f"name a --mirror URL, or fetch the files by hand from {LANDING_PAGE} and use --from-dir DIR",
        )
    return [folder / Path(place).name for folder, place in wanted]


def _seen(folder: Path) -> dict[str, Any]:
    """What is written down about a domain's files: name -> size, sha256, source, first_seen."""
    try:
        seen = json.loads((folder / "download.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        seen = None
    if not isinstance(seen, dict):
        raise DataError(f"{folder / 'download.json'}: not a record of downloads", hint="delete the file")
    return seen


def _record(path: Path, digest: str, source: str) -> None:
    seen = _seen(path.parent)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"size": path.stat().st_size, "sha256": digest, "source": source, "first_seen": now}
    write_json(path.parent / "download.json", seen | {path.name: entry})


def _changed(path: Path, digest: str) -> str | None:
    """A complaint if the file called `path` was seen with another content before."""
    first = _seen(path.parent).get(path.name, {}).get("sha256", digest)
    return (
        None if first == digest else f"sha256 {digest[:12]}, but the file first seen had {first[:12]} (download.json)"
    )


def _copy(from_dir: Path, place: str, path: Path, reporter: Reporter) -> list[str]:
    """Copy a file fetched by hand; gives what is wrong."""
    found = next((file for file in (from_dir / path.name, from_dir / place) if file.is_file()), None)
    if found is None:
        return [f"{from_dir}: no {path.name} there"]
    with written_whole(path) as part:
        shutil.copyfile(found, part)
        digest, wrong = sha256(part), _not_the_file(part)
        complaint = wrong or _changed(path, digest)
        if complaint:
            raise DataError(f"{found}: {complaint}", hint="fetch the file again")
    if path.name not in _seen(path.parent):
        _record(path, digest, str(found))
    reporter.note(f"{path} copied from {found}")
    return []


def _fetch(
    client: httpx.Client, bases: Sequence[str], dead: dict[str, str], place: str, path: Path, reporter: Reporter
) -> list[str]:
    """Fetch a file from the first mirror that has it; else gives each mirror's answer."""
    answers: list[str] = []
    for base in bases:
        url = f"{base}/{place}"
        if base in dead:
            answers.append(f"{url}: not asked, for the host gave no connection before ({dead[base]})")
            continue
        try:
            digest = _from_mirror(client, url, path, reporter)
        except _Refused as error:
            answers.append(f"{url}: {error}")
            if isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout):
                dead[base] = str(error)
            continue
        if path.name not in _seen(path.parent):
            _record(path, digest, url)
        reporter.note(f"{path}: {path.stat().st_size} bytes from {url}")
        return []
    return answers


def _from_mirror(client: httpx.Client, url: str, path: Path, reporter: Reporter) -> str:
    """Fetch one file from one address, with retries; gives its SHA-256."""
    part = path.with_name(f".{path.name}.download")
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = 0
    while True:
        before = _size(part)
        try:
            _stream(client, url, part, reporter)
            break
        except (_Interrupted, httpx.TransportError) as error:
            # an attempt that brought something new is none of those that count
            attempt = 1 if _size(part) > before else attempt + 1
            reason = " ".join(f"{error}".split()) or type(error).__name__
            if attempt >= _ATTEMPTS or isinstance(error, httpx.UnsupportedProtocol):
                raise _Refused(f"{reason} ({attempt} attempts)") from error
            time.sleep(max(2.0 ** (attempt - 1), getattr(error, "wait", 0)))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _Refused(" ".join(f"{error}".split())) from error
    digest = sha256(part)
    complaint = _not_the_file(part) or _changed(path, digest)
    if complaint:
        _discard(part)
        raise _Refused(complaint)
    part.replace(path)
    _origin(part).unlink(missing_ok=True)
    return digest


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _origin(part: Path) -> Path:
    """Where it is kept from which address, and which version of the file there, a part comes."""
    return part.with_name(part.name + ".json")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _origin(part).unlink(missing_ok=True)


def _version(answer: httpx.Response) -> str | None:
    """What tells one version of a file from another, good for If-Range."""
    etag = answer.headers.get("ETag", "")
    version: str | None = etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
    return version


def _resumable(part: Path, url: str) -> str | None:
    """The version that a part of this address belongs to; other parts are thrown away."""
    try:
        origin = json.loads(_origin(part).read_text(encoding="utf-8"))
        if part.is_file() and origin["url"] == url and origin["version"]:
            return str(origin["version"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    _discard(part)
    return None


def _stream(client: httpx.Client, url: str, part: Path, reporter: Reporter) -> None:
    """One request: begin the part, or go on with it."""
    version = _resumable(part, url)
    have = _size(part)
    headers = {"Range": f"bytes={have}-", "If-Range": version} if version and have else {}
    with client.stream("GET", url, headers=headers) as answer:
        status = answer.status_code
        if status == 429 or status >= 500 or status == 416:
            if status == 416:
                _discard(part)
            after = answer.headers.get("Retry-After", "")
            raise _Interrupted(f"HTTP {status}", min(float(after), 60) if after.isdecimal() else 0)
        if status not in (200, 206):
            raise _Refused(f"HTTP {status} {answer.reason_phrase}".strip())
        if "html" in answer.headers.get("Content-Type", ""):
            raise _Refused(f"HTTP {status}, but a web page and not the file")
        going_on = status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if status == 206 and not going_on:
            _discard(part)
            raise _Interrupted("HTTP 206 with another range than the one asked for")
        have = have if going_on else 0
        length = answer.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else None
        if not going_on:
            write_json(_origin(part), {"url": url, "version": _version(answer)})
        with (
            part.open("ab" if going_on else "wb") as file,
            reporter.stage(part.name[1:].removesuffix(".download"), total, "bytes") as progress,
        ):
            progress.advance(have)
            for piece in answer.iter_raw():
                file.write(piece)
                progress.advance(len(piece))
    if total is not None and _size(part) != total:
        raise _Interrupted(f"{_size(part)} of {total} bytes came")


def _not_the_file(path: Path) -> str | None:
    """A complaint if the first bytes are not those of the format that the name promises."""
    with path.open("rb") as file:
        start = file.read(512)
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page and not the file"
    if not start:
        return "an empty file"
    if (".json.gz" in path.name) != start.startswith(b"\x1f\x8b"):
        return "not a gzip file" if ".json.gz" in path.name else "a gzip file where text is expected"
    return None
