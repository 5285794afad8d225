"""One file from the first of several addresses that has it, through whatever the network does.

A file grows as `.<name>.download`, with a note beside it of the address and version that it comes from, so that it can
go on where it stopped: in the next attempt, or in the next command. It gets its name when it is whole and checked.
"""

import asyncio
import contextlib
import gzip
import hashlib
import json
import os
import random
import shutil
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from mmm4rec_cli.errors import DataError
from mmm4rec_cli.files import sha256, write_json
from mmm4rec_cli.settings.schema import DataSettings

LONGEST_WAIT = 60.0
"""Seconds that are waited at most between two attempts, whatever the server asks for."""

_BUSY = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524}
_SPARE = 64 * 2**20
"""Bytes of the disk that stay free."""

_PAGE_STARTS = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")
_T = TypeVar("_T")


class Refused(Exception):
    """This address does not give this file; the text is its answer."""


class Stumbled(Exception):
    """Worth another attempt at the same address.

    Args:
        answer: what the server did.
        wait: seconds that it asked to wait.
        vain: the attempt counts as one that brought nothing, whatever it brought.
    """

    def __init__(self, answer: str, wait: float = 0, *, vain: bool = False) -> None:
        super().__init__(answer)
        self.wait = wait
        self.vain = vain


class Unavailable(Exception):
    """No address gave the file; `answers` has a line on each of them."""

    def __init__(self, answers: list[str]) -> None:
        super().__init__("\n".join(answers))
        self.answers = answers


@dataclass(frozen=True)
class Wanted:
    """A file to be had.

    Attributes:
        path: where it shall lie.
        addresses: where it may be had, the first one first.
        size: bytes, where its publisher says so.
        md5: hexadecimal MD5, where its publisher says so.
    """

    path: Path
    addresses: tuple[str, ...]
    size: int | None = None
    md5: str | None = None


@dataclass(frozen=True)
class Fetched:
    """A file that is whole, not yet under its name."""

    part: Path
    url: str
    sha256: str


def run_async(work: Coroutine[Any, Any, _T]) -> _T:
    """Run a coroutine to its end, also where an event loop is running already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    result: list[_T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(asyncio.run(work))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def said(error: BaseException) -> str:
    """An error in one short line."""
    return " ".join(f"{error}".split())[:300] or type(error).__name__


def asked_to_wait(answer: httpx.Response) -> float:
    """Seconds that the server asks to wait (Retry-After, as a number or a date), at most LONGEST_WAIT."""
    after = answer.headers.get("Retry-After", "").strip()
    seconds = 0.0
    if after.isdecimal():
        seconds = float(after)
    elif after:
        with contextlib.suppress(ValueError, TypeError):
            seconds = (parsedate_to_datetime(after) - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_WAIT)


def worth_another_attempt(error: BaseException) -> bool:
    """Whether a fault of the network may be gone when it is tried again."""
    return isinstance(error, Stumbled) or (
        isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)
    )


def patience(attempts: int, first_wait: float) -> AsyncRetrying:
    """Attempts with growing, jittered waits between them, or as long as the server asks for."""
    backing_off = wait_exponential(multiplier=first_wait, max=LONGEST_WAIT) + wait_random(0, first_wait)

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        return max(backing_off(state), error.wait if isinstance(error, Stumbled) else 0.0)

    return AsyncRetrying(
        retry=retry_if_exception(worth_another_attempt),
        stop=stop_after_attempt(attempts),
        wait=wait,
        sleep=pause,
        reraise=True,
    )


async def pause(seconds: float) -> None:
    """Wait between two attempts."""
    await asyncio.sleep(seconds)


def client(settings: DataSettings, connections: int) -> httpx.AsyncClient:
    """The one client of a command."""
    timeout = httpx.Timeout(settings.download_timeout, connect=min(20.0, settings.download_timeout), pool=None)
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    # Ranges count the bytes as they are sent, so nothing may be packed on the way.
    headers = {"Accept-Encoding": "identity", "User-Agent": "mmm4rec"}
    return httpx.AsyncClient(timeout=timeout, limits=limits, follow_redirects=True, headers=headers)


class Part:
    """What has come of a file so far."""

    def __init__(self, path: Path) -> None:
        self.file = path.with_name(f".{path.name}.download")
        self.promised: int | None = None
        """Bytes of the whole file, as the server said in this command."""
        self._origin = self.file.with_name(f"{self.file.name}.json")

    @property
    def size(self) -> int:
        """Bytes that are there."""
        return self.file.stat().st_size if self.file.is_file() else 0

    def version(self, url: str) -> str | None:
        """The version of the file at `url` that is being gathered; what is of another one is thrown away."""
        try:
            origin = json.loads(self._origin.read_text(encoding="utf-8"))
            if self.file.is_file() and origin["url"] == url and origin["version"]:
                return str(origin["version"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self.discard()
        return None

    def begin(self, url: str, version: str | None) -> None:
        """Start anew, with that version of the file at `url`."""
        self.discard()
        write_json(self._origin, {"url": url, "version": version})

    def discard(self) -> None:
        """Throw everything away."""
        self.file.unlink(missing_ok=True)
        self._origin.unlink(missing_ok=True)
        self.promised = None

    def moved_to(self, path: Path) -> None:
        """Give the file its name."""
        with self.file.open("rb") as written:
            os.fsync(written.fileno())
        self.file.replace(path)
        self._origin.unlink(missing_ok=True)


class Disk:
    """Free space, less what running downloads still need."""

    def __init__(self) -> None:
        self._promised: dict[Path, int] = {}

    def reserve(self, file: Path, needed: int) -> None:
        """Put `needed` bytes aside for a file.

        Raises:
            DataError: they are not there.
        """
        self.release(file)
        require_space(file.parent, needed + sum(self._promised.values()))
        self._promised[file] = needed

    def release(self, file: Path) -> None:
        """The file needs nothing more."""
        self._promised.pop(file, None)


def require_space(folder: Path, needed: int) -> None:
    """Raise DataError unless so many bytes are free on the disk of `folder` (with some to spare)."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    if needed + _SPARE > free:
        raise DataError(
            f"{folder}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free on that disk",
            hint="free some space, or choose a --workspace on another disk",
        )


class Fetcher:
    """Fetches files, several at once.

    Args:
        client: makes the requests.
        settings: `download_*`.
        advance: called with the number of bytes that came (negative where some are thrown away).
    """

    def __init__(self, client: httpx.AsyncClient, settings: DataSettings, advance: Callable[[int], None]) -> None:
        self._client = client
        self._settings = settings
        self._advance = advance
        self._disk = Disk()
        self._dead: dict[str, str] = {}

    async def fetch(self, wanted: Wanted, complaint: Callable[[Path, str], str | None]) -> Fetched:
        """Fetch a file from the first address that has it.

        Args:
            wanted: the file.
            complaint: takes the file and its SHA-256, gives what is wrong with it, if anything.

        Returns:
            The file, whole and checked, still under its temporary name.

        Raises:
            Unavailable: no address has it.
            DataError: the disk is too small.
        """
        part = Part(wanted.path)
        answers: list[str] = []
        for url in wanted.addresses:
            host = httpx.URL(url).host if _is_url(url) else url
            if host in self._dead:
                answers.append(f"{url}: not asked, for the host gave no connection before ({self._dead[host]})")
                continue
            try:
                await self._from_address(url, part, wanted)
                digest = await asyncio.to_thread(sha256, part.file)
                wrong = complaint(part.file, digest)
                if wrong is not None:
                    part.discard()
                    raise Refused(wrong)
                return Fetched(part.file, url, digest)
            except Refused as error:
                answers.append(f"{url}: {said(error)}")
                if isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout):
                    self._dead[host] = said(error)
            finally:
                self._disk.release(part.file)
        raise Unavailable(answers)

    async def text(self, url: str) -> tuple[str, str]:
        """A page or document: its last address (behind redirects) and its text.

        Raises:
            Refused: it could not be had.
        """

        async def once() -> tuple[str, str]:
            answer = await self._client.get(url)
            _check_status(answer)
            return str(answer.url), answer.text

        try:
            return await patience(self._settings.download_attempts, self._settings.download_wait)(once)
        except (Stumbled, httpx.HTTPError, httpx.InvalidURL) as error:
            raise Refused(said(error)) from error

    async def length(self, url: str) -> int | None:
        """Bytes of the file at `url`, if the server says so when asked briefly."""
        with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL):
            answer = await self._client.head(url, timeout=5)
            length = answer.headers.get("Content-Length", "")
            page = "html" in answer.headers.get("Content-Type", "")
            if answer.status_code == 200 and length.isdecimal() and not page:
                return int(length)
        return None

    async def _from_address(self, url: str, part: Part, wanted: Wanted) -> None:
        """Fetch one file from one address, with retries, until it is whole."""
        retrying = patience(self._settings.download_attempts, self._settings.download_wait)
        try:
            # Where it got on, the attempts are counted anew.
            while not await retrying(self._brought, url, part, wanted):
                pass
        except (Stumbled, httpx.TransportError) as error:
            # The bytes that were promised are there; only the question whether more would follow has no answer.
            if part.promised is not None and part.promised == part.size and await self._sound(part, wanted) is None:
                return
            attempts = self._settings.download_attempts
            times = f" ({attempts} attempts)" if worth_another_attempt(error) else ""
            raise Refused(f"{said(error)}{times}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Refused(said(error)) from error

    async def _brought(self, url: str, part: Part, wanted: Wanted) -> bool:
        """One attempt; True if the file is whole, False if it broke off and yet got on."""
        version = part.version(url)
        before = part.size
        try:
            while not await self._request(url, part, wanted, version):
                version = part.version(url)
        except (Stumbled, httpx.TransportError) as error:
            gained = part.size - before if part.version(url) is not None else 0
            enough = max(1, min(2**20, (part.promised or 0) // 100))
            if gained >= enough and not getattr(error, "vain", False):
                await pause(random.uniform(0, self._settings.download_wait))  # noqa: S311
                return False
            raise
        wrong = await self._sound(part, wanted)
        if wrong is not None:
            self._discard(part)
            raise Stumbled(wrong)
        return True

    async def _request(self, url: str, part: Part, wanted: Wanted, version: str | None) -> bool:
        """One request; True if the file is whole, False if all came that was promised and there may be more."""
        have = part.size
        headers = {"Range": f"bytes={have}-", "If-Range": version} if version and have else {}
        async with self._client.stream("GET", url, headers=headers) as answer:
            if answer.status_code == 416:
                if headers and (_total(answer) or part.promised) == have:
                    return True
                self._discard(part)
                raise Stumbled("HTTP 416, though nothing beyond the file was asked for")
            _check_status(answer)
            if "html" in answer.headers.get("Content-Type", ""):
                raise Stumbled(f"HTTP {answer.status_code}, but a web page and not the file")
            going_on = answer.status_code == 206
            if going_on and not _goes_on(answer, have, version):
                self._discard(part)
                raise Stumbled("HTTP 206 with another range or version than the one asked for")
            if not going_on:
                offered = answer.headers.get("Content-Length")
                if have and part.promised == have and _version(answer) == version and offered == str(have):
                    return True  # whole before; the server knows no ranges
                self._advance(-have)
                part.begin(url, _version(answer))
                have = 0
            length = answer.headers.get("Content-Length", "")
            total = have + int(length) if length.isdecimal() else None
            if going_on and total == have:
                raise Stumbled("HTTP 206 without a byte")
            if total is not None and wanted.size is not None and total != wanted.size:
                raise Stumbled(f"{total} bytes are offered, {wanted.size} are published")
            part.promised = total
            self._disk.reserve(part.file, (total or wanted.size or have) - have)
            await self._written(answer, part, fresh=not going_on)
        self._disk.release(part.file)
        if total is not None and part.size != total:
            raise Stumbled(f"{part.size} of {total} bytes came")
        if wanted.size == part.size:
            return True
        # A server may have promised too little. One that knows ranges is asked until it says that this is all.
        ranges = going_on or answer.headers.get("Accept-Ranges") == "bytes"
        return not (ranges and _version(answer) is not None)

    async def _written(self, answer: httpx.Response, part: Part, *, fresh: bool) -> None:
        """Take the body in, as long as it comes quickly enough."""
        since, came = time.monotonic(), 0
        with part.file.open("wb" if fresh else "ab") as file:
            async for piece in answer.aiter_raw():
                if fresh and piece.lstrip()[:16].lower().startswith(_PAGE_STARTS):
                    raise Stumbled(f"HTTP {answer.status_code}, but a web page and not the file", vain=True)
                fresh = False
                file.write(piece)
                self._advance(len(piece))
                came += len(piece)
                seconds = time.monotonic() - since
                if seconds >= self._settings.download_timeout:
                    if came < self._settings.download_rate * seconds:
                        raise Stumbled(f"only {came / seconds:.0f} bytes a second came", vain=True)
                    since, came = time.monotonic(), 0

    def _discard(self, part: Part) -> None:
        self._advance(-part.size)
        part.discard()

    async def _sound(self, part: Part, wanted: Wanted) -> str | None:
        """What is wrong with the file that has come, if anything."""
        return await asyncio.to_thread(not_the_file, part.file, wanted.path.name, wanted.md5)


def _is_url(url: str) -> bool:
    try:
        return bool(httpx.URL(url).host)
    except httpx.InvalidURL:
        return False


def _check_status(answer: httpx.Response) -> None:
    status = answer.status_code
    if status in _BUSY:
        raise Stumbled(f"HTTP {status}", asked_to_wait(answer))
    if status not in (200, 206):
        raise Refused(f"HTTP {status} {answer.reason_phrase}".strip())


def _version(answer: httpx.Response) -> str | None:
    """What tells one version of a file from another, good for If-Range (RFC 9110, 13.1.5)."""
    etag = answer.headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        return str(etag)
    changed = answer.headers.get("Last-Modified", "")
    try:
        age = parsedate_to_datetime(answer.headers.get("Date", "")) - parsedate_to_datetime(changed)
    except (ValueError, TypeError):
        return None
    # A file may change twice within a second: only an older date names one version.
    return changed if age.total_seconds() >= 1 else None


def _total(answer: httpx.Response) -> int | None:
    total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdecimal() else None


def _goes_on(answer: httpx.Response, have: int, version: str | None) -> bool:
    """Whether a partial answer begins where the part ends, in the same version of the file."""
    now = _version(answer)
    return answer.headers.get("Content-Range", "").startswith(f"bytes {have}-") and now in (None, version)


def not_the_file(path: Path, name: str, md5: str | None = None) -> str | None:
    """A complaint if a file is not what its name promises, or not whole as far as its format can tell.

    Args:
        path: the file.
        name: the name that it shall have: `.gz`, `.zip`, `.ckpt` and `.pth` (zip files) are looked into, anything else
            is text or unknown.
        md5: hexadecimal MD5 that its publisher names.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if start.lstrip().lower().startswith(_PAGE_STARTS):
        return "a web page and not the file"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer and not the file"
    if not start:
        return "an empty file"
    if name.endswith((".gz", ".tgz")):
        if not start.startswith(b"\x1f\x8b"):
            return "not a gzip file"
        try:
            with gzip.open(path) as unpacked:
                while unpacked.read(2**20):
                    pass
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            return f"a damaged gzip file ({said(error)})"
    elif name.endswith((".zip", ".ckpt", ".pth", ".pt")):
        if not zipfile.is_zipfile(path):
            return "not a zip file, or not all of it"
    elif name.endswith(".csv"):
        if start.startswith(b"\x1f\x8b"):
            return "a gzip file where text is expected"
        if b"\0" in start:
            return "no text"
    if md5 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5.lower():
            return f"md5 {found}, but {md5} is published"
    return None
