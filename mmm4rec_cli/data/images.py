"""Pictures of items: fetched where they are missing, checked, and opened."""

import asyncio
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmm4rec_cli.data.columns import IMAGE, IMAGE_URL
from mmm4rec_cli.data.domains import MIXES
from mmm4rec_cli.data.fetch import Refused, Stumbled, asked_to_wait, patience, run_async, said, worth_another_attempt
from mmm4rec_cli.data.tables import read_tables, write_images
from mmm4rec_cli.errors import NetworkError
from mmm4rec_cli.files import only_writer, written_whole
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.settings.schema import DataSettings
from mmm4rec_cli.workspace import Workspace

FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tiff"}
"""Formats that are opened, with the suffix they are saved under. Others (PostScript among them) are never tried."""

LEFT_OUT = "left out"
"""In the manifest under `images`: no picture is used, by the user's wish."""

OUTCOMES = "images.parquet"
"""Beside the pictures' folder: what became of each item's picture in the last command that looked for them."""

_ATTEMPTS = 3
_FIRST_WAIT = 0.5
_PATIENCE = 4
"""Times `image_timeout` that a picture may take as a whole."""
_LARGEST = 64 * 2**20
_SMALLEST = 60
"""Bytes; the invisible dots that shops send for a missing picture have 35 to 50."""
_NARROWEST = 4
"""Pixels."""


class UnreadableImage(Exception):
    """A picture that is missing, damaged, too large or not a picture; the text says which."""


def open_image(source: Path | BinaryIO) -> Image.Image:
    """Decode a picture as RGB; transparent places become white.

    Raises:
        UnreadableImage: whatever is wrong with it, a picture of more than 89 million pixels (a possible decompression
            bomb) among it.
    """
    try:
        with Image.open(source, formats=list(FORMATS)) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:
                raise UnreadableImage(f"{image.width} x {image.height} pixels, more than {limit}")
            image.load()
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
            return image.convert("RGB")
    except (UnreadableImage, MemoryError):
        raise
    except FileNotFoundError:
        raise UnreadableImage("no such file") from None
    except Exception as error:  # Pillow's decoders raise whatever they like on damaged data
        raise UnreadableImage(" ".join(f"{type(error).__name__}: {error}".split())[:200]) from None


@contextmanager
def decoding() -> Iterator[None]:
    """Around threads that open pictures: Pillow's remarks on odd files are not shown, its bomb warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def safe_name(raw_item_id: str) -> str:
    """A raw item id as a file name (without suffix).

    Ids of letters, digits, `_`, `-` and inner dots stay as they are. Others get their odd characters replaced by `_`
    and a piece of their SHA-256 behind, so that no two ids share a file and none leaves its folder.
    """
    if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", raw_item_id) and not raw_item_id.endswith("."):
        return raw_item_id
    legible = re.sub(r"[^A-Za-z0-9_-]+", "_", raw_item_id)[:60]
    return f"{legible or '_'}.{sha256(raw_item_id.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class _Wanted:
    """One picture to be had: for the item at `index`, from `url`, saved as `stem` with its format's suffix."""

    index: int
    url: str
    stem: Path


def image_stem(workspace: Workspace, domain: str, raw_item_id: str) -> Path:
    """Where an item's picture lies, without its suffix; pictures of a mix lie with their own domain's raw files."""
    for member in MIXES.get(domain, ()):
        if raw_item_id.startswith(f"{member}-"):
            return image_stem(workspace, member, raw_item_id.removeprefix(f"{member}-"))
    return workspace.raw(domain) / "images" / safe_name(raw_item_id)


def _present(stem: Path, names: Mapping[str, str]) -> Path | None:
    name = names.get(stem.name)
    return None if name is None else stem.with_name(name)


def fetch_images(
    workspace: Workspace,
    domain: str,
    settings: DataSettings,
    *,
    offline: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Fetch the pictures that the kept items name and that are not there yet; then set `image` in items.parquet.

    A picture that is there is never fetched again. Wrong types, placeholders, damaged and oversized ones are rejected.
    Failures are counted and listed, with their reasons, in `data/raw/<domain>/images.log`; what became of each item's
    picture is in `data/raw/<domain>/images.parquet`.

    Args:
        workspace: where.
        domain: a domain or mix that has tables.
        settings: `image_workers`, `image_per_host` and `image_timeout` are looked at.
        offline: fetch nothing, take what is there.
        reporter: hears of progress and failures.

    Returns:
        The manifest of the tables, with the counts under `images`: with_address, already_there (with or without an
        address), fetched, failed.

    Raises:
        DataError: the domain has no tables.
        NetworkError: there are addresses, and not one picture could be had.
    """
    reporter = reporter or SilentReporter()
    tables = read_tables(workspace, domain)
    urls = tables.items[IMAGE_URL].to_pylist()
    paths: list[str | None] = tables.items[IMAGE].to_pylist()
    listings: dict[Path, dict[str, str]] = {}
    wanted: list[_Wanted] = []
    there = 0
    for index, (url, raw_item_id) in enumerate(zip(urls, tables.raw_item_ids, strict=True)):
        if url is None and paths[index] is not None:
            continue  # a picture of the user's own
        stem = image_stem(workspace, domain, raw_item_id)
        if stem.parent not in listings:
            listings[stem.parent] = _listing(stem.parent)
        present = _present(stem, listings[stem.parent])
        if present is not None:
            paths[index] = str(present.absolute())
            there += 1
        elif url is not None:
            paths[index] = None
            wanted.append(_Wanted(index, url, stem))
    failures: list[tuple[_Wanted, str]] = []
    if wanted and not offline:
        with ExitStack() as held:
            for folder in dict.fromkeys(one.stem.parent for one in wanted):
                held.enter_context(only_writer(folder))
            held.enter_context(decoding())
            progress = held.enter_context(reporter.stage(f"images of {domain}", len(wanted), "images"))

            def tell(one: _Wanted, result: Path | str) -> None:
                if isinstance(result, Path):
                    paths[one.index] = str(result.absolute())
                else:
                    failures.append((one, result))
                progress.advance(1, f"{len(failures)} failed" if failures else "")

            run_async(_fetch_all(wanted, settings, tell))
    _write_outcomes(workspace, domain, tables.raw_item_ids, urls, paths, wanted, failures)
    log = workspace.raw(domain) / "images.log"
    if failures:
        lines = [f"{tables.raw_item_ids[one.index]}\t{one.url}\t{why}\n" for one, why in failures]
        with written_whole(log) as part:
            part.write_text("".join(lines), encoding="utf-8")
    else:
        log.unlink(missing_ok=True)
    if failures and len(failures) == len(wanted) and not there:
        first, why = failures[0]
        raise NetworkError(
            f"domain {domain}: {len(failures)} items name a picture and not one could be had; {first.url}: {why} "
            f"(all in {log})",
            hint="try again later, or run again with --no-images (no pictures) or --offline (those that are there)",
        )
    if wanted and not offline:
        rejected = sum(why.startswith(("not a picture", "a placeholder", "more than")) for _, why in failures)
        reporter.note(
            f"images of {domain}: {there} there before, {len(wanted) - len(failures)} fetched, {rejected} rejected, "
            f"{len(failures) - rejected} failed; each in {log.with_name(OUTCOMES)}"
        )
    if failures:
        reporter.warn(f"{len(failures)} of {len(wanted)} pictures could not be had; reasons are in {log}")
    if offline and wanted:
        reporter.note(f"offline: {len(wanted)} pictures are not there and were not fetched")
    counts = {
        "with_address": len(urls) - urls.count(None),
        "already_there": there,
        "fetched": 0 if offline else len(wanted) - len(failures),
        "failed": len(failures),
    }
    return write_images(workspace, domain, paths, {"images": counts})


def _write_outcomes(
    workspace: Workspace,
    domain: str,
    raw_item_ids: list[str],
    urls: list[str | None],
    paths: list[str | None],
    wanted: list[_Wanted],
    failures: list[tuple[_Wanted, str]],
) -> None:
    """Write one row an item: raw_item_id, url, outcome, reason (of a failure), bytes."""
    sought = {one.index for one in wanted}
    reasons = {one.index: why for one, why in failures}
    rows: dict[str, list[Any]] = {"raw_item_id": raw_item_ids, "url": urls, "outcome": [], "reason": [], "bytes": []}
    for index, (url, path) in enumerate(zip(urls, paths, strict=True)):
        why = reasons.get(index)
        if why is not None:
            outcome = "rejected" if why.startswith(("not a picture", "a placeholder", "more than")) else "failed"
        elif path is not None:
            outcome = "fetched" if index in sought else "there"
        else:
            outcome = "no address" if url is None else "not fetched"
        rows["outcome"].append(outcome)
        rows["reason"].append(why)
        rows["bytes"].append(_bytes(workspace.root.absolute() / path) if path is not None else None)
    kinds = [pa.string(), pa.string(), pa.string(), pa.string(), pa.int64()]
    with written_whole(workspace.raw(domain) / OUTCOMES) as part:
        pq.write_table(pa.table(rows, schema=pa.schema(list(zip(rows, kinds, strict=True)))), part)


def _bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def leave_images_out(workspace: Workspace, domain: str) -> dict[str, Any]:
    """Set every item's `image` to null, whatever lies on the disk; the next `fetch_images` finds the pictures again.

    Returns:
        The manifest of the tables.

    Raises:
        DataError: the domain has no tables.
    """
    return write_images(workspace, domain, [None] * read_tables(workspace, domain).n_items, {"images": LEFT_OUT})


def _listing(folder: Path) -> dict[str, str]:
    """The pictures of a folder: name without suffix -> name."""
    if not folder.is_dir():
        return {}
    return {path.stem: path.name for path in folder.iterdir() if path.suffix in FORMATS.values()}


async def _fetch_all(
    wanted: list[_Wanted], settings: DataSettings, tell: Callable[[_Wanted, Path | str], None]
) -> None:
    """Fetch with a bounded number of tasks, few at a time from one host; tells the file or why there is none."""
    places: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(settings.image_per_host))
    limits = httpx.Limits(max_connections=settings.image_workers, max_keepalive_connections=settings.image_workers)
    timeout = httpx.Timeout(settings.image_timeout, pool=None)
    headers = {"User-Agent": "mmm4rec"}
    rest = iter(wanted)
    async with httpx.AsyncClient(timeout=timeout, limits=limits, headers=headers, follow_redirects=True) as client:

        async def work() -> None:
            for one in rest:
                try:
                    host = httpx.URL(one.url).host
                except httpx.InvalidURL as error:
                    tell(one, said(error))
                    continue
                async with places[host]:
                    result = await _fetch(client, one, settings.image_timeout)
                tell(one, result)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(settings.image_workers, len(wanted))):
                group.create_task(work())


async def _fetch(client: httpx.AsyncClient, one: _Wanted, seconds: float) -> Path | str:
    async def once() -> bytes:
        try:
            # A server that drips never runs into the limit between two pieces.
            async with asyncio.timeout(_PATIENCE * seconds):
                return await _content(client, one.url)
        except TimeoutError:
            raise Stumbled(f"Timeout: not whole within {_PATIENCE * seconds:g} s") from None

    try:
        content: bytes = await patience(_ATTEMPTS, _FIRST_WAIT)(once)
    except (UnreadableImage, Refused) as error:
        return said(error)
    except (Stumbled, httpx.HTTPError, httpx.InvalidURL) as error:
        why = said(error) if isinstance(error, Stumbled) else f"{type(error).__name__}: {said(error)}"
        return f"{why} ({_ATTEMPTS} attempts)" if worth_another_attempt(error) else why
    return await asyncio.to_thread(_saved, content, one.stem)


async def _content(client: httpx.AsyncClient, url: str) -> bytes:
    async with client.stream("GET", url) as answer:
        if answer.status_code == 429 or answer.status_code >= 500:
            raise Stumbled(f"HTTP {answer.status_code}", asked_to_wait(answer))
        if answer.status_code != 200:
            raise Refused(f"HTTP {answer.status_code}")
        content = bytearray()
        async for piece in answer.aiter_bytes():
            content += piece
            if len(content) > _LARGEST:
                raise UnreadableImage(f"more than {_LARGEST // 2**20} MiB")
        return bytes(content)


def _saved(content: bytes, stem: Path) -> Path | str:
    """Check a picture by decoding it, then put it in its place; else say why not."""
    try:
        picture = open_image(BytesIO(content))
        if min(picture.size) < _NARROWEST or len(content) < _SMALLEST:
            return f"a placeholder ({picture.width} x {picture.height} pixels)"
        with Image.open(BytesIO(content), formats=list(FORMATS)) as image:
            suffix = FORMATS.get(image.format or "", ".jpg")
    except UnreadableImage as error:
        return f"not a picture ({error})"
    path = stem.with_name(stem.name + suffix)
    with written_whole(path) as part:
        part.write_bytes(content)
    return path
