"""Pictures of items: fetched where they are missing, checked, and opened."""

import re
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import httpx
from PIL import Image

from mmm4rec_cli.data.columns import IMAGE, IMAGE_URL
from mmm4rec_cli.data.domains import MIXES
from mmm4rec_cli.data.tables import read_tables, write_images
from mmm4rec_cli.errors import NetworkError
from mmm4rec_cli.files import written_whole
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.settings.schema import DataSettings
from mmm4rec_cli.workspace import Workspace

FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp", "TIFF": ".tiff"}
"""Formats that are opened, with the suffix they are saved under. Others (PostScript among them) are never tried."""

LEFT_OUT = "left out"
"""In the manifest under `images`: no picture is used, by the user's wish."""

_ATTEMPTS = 3
_LARGEST = 64 * 2**20


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

    A picture that is there is never fetched again. Failures are counted and listed, with their reasons, in
    `data/raw/<domain>/images.log`.

    Args:
        workspace: where.
        domain: a domain or mix that has tables.
        settings: `image_workers` and `image_timeout` are looked at.
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
        with decoding(), reporter.stage(f"images of {domain}", len(wanted), "images") as progress:
            for one, result in _fetched(wanted, settings):
                if isinstance(result, Path):
                    paths[one.index] = str(result.absolute())
                else:
                    failures.append((one, result))
                progress.advance(1, f"{len(failures)} failed" if failures else "")
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


def _fetched(wanted: list[_Wanted], settings: DataSettings) -> Iterator[tuple[_Wanted, Path | str]]:
    """Fetch with several threads; gives the file or the reason of the failure, in the order of completion."""
    limits = httpx.Limits(max_connections=settings.image_workers)
    with (
        httpx.Client(timeout=settings.image_timeout, follow_redirects=True, limits=limits) as client,
        ThreadPoolExecutor(settings.image_workers) as pool,
    ):
        rest = iter(wanted)
        running: dict[Future[Path | str], _Wanted] = {}
        try:
            while True:
                for one in islice(rest, 2 * settings.image_workers - len(running)):
                    running[pool.submit(_fetch, client, one)] = one
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _fetch(client: httpx.Client, one: _Wanted) -> Path | str:
    why = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(0.2 * 2**attempt)
        try:
            content = _content(client, one.url)
        except UnreadableImage as error:
            return str(error)
        except (httpx.HTTPStatusError, httpx.TransportError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            if isinstance(error, httpx.HTTPStatusError):
                why = f"HTTP {error.response.status_code}"
                if error.response.status_code < 500 and error.response.status_code != 429:
                    return why
            elif isinstance(error, httpx.UnsupportedProtocol):
                return why
            continue
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return _saved(content, one.stem)
    return f"{why} ({_ATTEMPTS} attempts)"


def _content(client: httpx.Client, url: str) -> bytes:
    with client.stream("GET", url) as answer:
        answer.raise_for_status()
        content = bytearray()
        for piece in answer.iter_bytes():
            content += piece
            if len(content) > _LARGEST:
                raise UnreadableImage(f"more than {_LARGEST // 2**20} MiB")
        return bytes(content)


def _saved(content: bytes, stem: Path) -> Path | str:
    """Check a picture by decoding it, then put it in its place; else say why not."""
    try:
        open_image(BytesIO(content))
        with Image.open(BytesIO(content), formats=list(FORMATS)) as image:
            suffix = FORMATS.get(image.format or "", ".jpg")
    except UnreadableImage as error:
        return f"not a picture ({error})"
    path = stem.with_name(stem.name + suffix)
    with written_whole(path) as part:
        part.write_bytes(content)
    return path
