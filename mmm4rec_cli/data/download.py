"""Fetching files into the workspace: raw ratings and metadata, the published processed data, the published weights.

No checksum of Amazon's files is published. So the SHA-256 of each file is written down when it is first seen
(`download.json` in its folder), and later copies must agree with it; where a publisher names size and MD5, the file is
held to them too. `check_downloads` reads everything again.
"""

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mmm4rec_cli.data import amazon_2023, archives
from mmm4rec_cli.data.domains import CATEGORIES, category, members
from mmm4rec_cli.data.fetch import (
    Fetcher,
    Part,
    Unavailable,
    Wanted,
    client,
    not_the_file,
    require_space,
    run_async,
)
from mmm4rec_cli.data.share import PAGE, SHARE, shared_files
from mmm4rec_cli.errors import DataError, NetworkError, UsageError
from mmm4rec_cli.files import only_writer, sha256, write_json, written_whole
from mmm4rec_cli.reporter import Progress, Reporter, SilentReporter
from mmm4rec_cli.settings.schema import DataSettings
from mmm4rec_cli.workspace import Workspace

Source = Literal["amazon-2018", "amazon-2023"]

MIRRORS = ("https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2",)
MIRRORS_2023 = (amazon_2023.MIRROR,)
LANDING_PAGE = "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/"
KINDS = {"ratings": "categoryFilesSmall/{}.csv", "metadata": "metaFiles2/meta_{}.json.gz"}
"""Raw files of Amazon Review 2018, with their places below a mirror's address."""

WEIGHTS = "pre_weights/pretrained_weight.ckpt"
"""The published weights, with their place below a mirror's address and in their repository."""

WEIGHTS_REPOSITORY = "https://github.com/AlwaysFHao/MMM4Rec/raw/HEAD"
ALL_KINDS = (*KINDS, "images", "processed", "weights")
RECORD = "download.json"


@dataclass(frozen=True)
class Place:
    """A raw file as the registry knows it.

    Attributes:
        domain: short name of the category.
        kind: ratings or metadata.
        below: its place below a mirror's address.
        path: where it lies in the workspace.
    """

    domain: str
    kind: str
    below: str
    path: Path


def places(
    workspace: Workspace, domains: Iterable[str], kinds: Iterable[str], source: Source = "amazon-2018"
) -> list[Place]:
    """The raw files of some domains or mixes.

    Raises:
        UsageError: an unknown domain, kind or source, or a domain that the source does not have.
    """
    layout = {"amazon-2018": (KINDS, category), "amazon-2023": (amazon_2023.KINDS, amazon_2023.category)}
    if source not in layout:
        raise UsageError(f"unknown source {source!r}", hint=f"sources: {', '.join(layout)}")
    below, name_of = layout[source]
    found = []
    for name in dict.fromkeys(member for domain in domains for member in members(domain)):
        for kind in kinds:
            place = below[kind].format(name_of(name))
            found.append(Place(name, kind, place, workspace.raw(name) / Path(place).name))
    return found


def download(
    workspace: Workspace,
    domains: Iterable[str],
    kinds: Iterable[str] = ("ratings", "metadata"),
    mirrors: Sequence[str] = (),
    from_dir: Path | None = None,
    reporter: Reporter | None = None,
    *,
    source: Source = "amazon-2018",
    settings: DataSettings | None = None,
) -> list[Path]:
    """Fetch files into the workspace; those that are there are kept.

    An interrupted file is continued where it stopped, if the server says that it is still the same. No file waits for
    another's failure: what can be had is fetched, then the error is raised.

    Args:
        workspace: where to.
        domains: short names of Amazon categories, or mixes (which stand for their domains).
        kinds: `ratings` and `metadata` of the domains; `processed` (to data/published/, unpacked) and `weights` (to
            data/weights/), which belong to no domain.
        mirrors: addresses tried first; each serves `categoryFilesSmall/<Category>.csv`,
            `metaFiles2/meta_<Category>.json.gz` and `pre_weights/pretrained_weight.ckpt`, or the layout of 2023.
            Behind them come the settings' `mirrors`, then the known addresses.
        from_dir: a folder with files fetched by hand, flat or ordered as on a mirror; nothing is then asked of the net.
        reporter: hears of progress.
        source: which edition of the Amazon data.
        settings: `mirrors` and `download_*`.

    Returns:
        The files, whether fetched now or there before.

    Raises:
        UsageError: an unknown domain, kind or source.
        DataError: `from_dir` lacks a file, a file has another content than the one first seen, the folder holds the
            other edition, an archive is unsafe, the disk is full, or another process writes there.
        NetworkError: a file could not be had; every address is named with its answer.
    """
    reporter = reporter or SilentReporter()
    settings = settings or DataSettings()
    kinds = list(dict.fromkeys(kinds))
    fetchable = (*KINDS, "processed", "weights")
    unknown = [kind for kind in kinds if kind not in fetchable]
    if unknown:
        raise UsageError(f"unknown kind {unknown[0]!r}", hint=f"kinds: {', '.join(ALL_KINDS)}")
    raw = places(workspace, domains, [kind for kind in kinds if kind in KINDS], source)
    for place in raw:
        _require_one_edition(place, source)
    if source == "amazon-2023" and raw:
        reporter.note(amazon_2023.NOTE)
    own = [base.rstrip("/") for base in (*mirrors, *settings.mirrors)]
    known = MIRRORS if source == "amazon-2018" else MIRRORS_2023
    wanted = [Wanted(one.path, tuple(f"{base}/{one.below}" for base in (*own, *known))) for one in raw]
    if "weights" in kinds:
        addresses = tuple(f"{base}/{WEIGHTS}" for base in (*own, WEIGHTS_REPOSITORY))
        wanted.append(Wanted(workspace.weights / Path(WEIGHTS).name, addresses))
    folders = dict.fromkeys([one.path.parent for one in wanted])
    if "processed" in kinds:
        folders[workspace.published] = None
    with ExitStack() as held:
        for folder in folders:
            held.enter_context(only_writer(folder))
        if from_dir is not None:
            return _adopted(workspace, wanted, raw, from_dir, "processed" in kinds, reporter)
        task = _Fetching(workspace, settings, reporter)
        return run_async(task.all(wanted, with_processed="processed" in kinds))


def fetch_files(
    wanted: Sequence[Wanted],
    settings: DataSettings,
    reporter: Reporter | None = None,
    workspace: Workspace | None = None,
) -> list[Path]:
    """Fetch any files from any addresses, several at once, each written down in its folder's record.

    Raises:
        DataError, NetworkError: as `download`.
    """
    with ExitStack() as held:
        for folder in dict.fromkeys(one.path.parent for one in wanted):
            held.enter_context(only_writer(folder))
        task = _Fetching(workspace or Workspace(Path()), settings, reporter or SilentReporter())
        return run_async(task.all(list(wanted), with_processed=False))


def check_downloads(workspace: Workspace, domains: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Read every file that was written down as downloaded, and compare its size and SHA-256.

    Args:
        workspace: where.
        domains: domains or mixes whose raw files are looked at; None: everything.

    Returns:
        A document a file: path, bytes, sha256, source, first_seen.

    Raises:
        UsageError: an unknown domain.
        DataError: a file differs or is gone; each is named. Or there is nothing to be checked.
    """
    if domains is None:
        raw = workspace.raw("any").parent
        folders = [*sorted(raw.glob("*/")), workspace.published, workspace.weights]
    else:
        folders = [workspace.raw(name) for domain in domains for name in members(domain)]
    found: list[dict[str, Any]] = []
    problems: list[str] = []
    for folder in folders:
        for name, entry in sorted(_seen(folder).items()):
            path = folder / name
            if not path.is_file():
                problems.append(f"{path}: written down in {RECORD}, but gone")
                continue
            size, digest = path.stat().st_size, sha256(path)
            if (size, digest) != (entry.get("size"), entry.get("sha256")):
                problems.append(
                    f"{path}: {size} bytes, sha256 {digest[:12]}; when first seen it had {entry.get('size')} bytes, "
                    f"sha256 {str(entry.get('sha256'))[:12]}"
                )
            found.append({"path": str(path), "bytes": size, "sha256": digest} | _about(entry))
    if problems:
        raise DataError(*problems, hint="delete the files that are named and type the same download command again")
    if not found:
        raise DataError("nothing is written down as downloaded", hint="mmm4rec download fetches and writes down")
    return found


def _about(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry.get(key) for key in ("source", "first_seen", "published")}


def _require_one_edition(place: Place, source: Source) -> None:
    """A domain's folder holds one edition of the Amazon data, so that nobody mixes them without a word."""
    other: Source = "amazon-2018" if source == "amazon-2023" else "amazon-2023"
    if other == "amazon-2018":
        there = place.path.parent / f"{CATEGORIES[place.domain]}.csv"
    else:
        there = place.path.parent / f"{amazon_2023.CATEGORIES_2023.get(place.domain, '-')}.csv.gz"
    if there.is_file():
        raise DataError(
            f"{there.parent} holds the ratings of {other}",
            hint=f"keep {source} in another --workspace, or remove {there.parent} first",
        )


def _seen(folder: Path) -> dict[str, Any]:
    """What is written down about a folder's files: name -> size, sha256, source, first_seen, published."""
    try:
        seen = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        seen = None
    if not isinstance(seen, dict) or not all(isinstance(entry, dict) for entry in seen.values()):
        raise DataError(f"{folder / RECORD}: not a record of downloads", hint="delete the file")
    return seen


def _record(path: Path, size: int, digest: str, source: str, published: str = "") -> None:
    seen = _seen(path.parent)
    if path.name in seen:
        return
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {
        "size": size,
        "sha256": digest,
        "source": source,
        "first_seen": now,
        "published": published or "no checksum is published: the sha256 is of the file first seen",
    }
    write_json(path.parent / RECORD, seen | {path.name: entry})


def _changed(path: Path, digest: str) -> str | None:
    """A complaint if the file called `path` was seen with another content before."""
    first = _seen(path.parent).get(path.name, {}).get("sha256", digest)
    return None if first == digest else f"sha256 {digest[:12]}, but the file first seen had {first[:12]} ({RECORD})"


def _there(path: Path, reporter: Reporter) -> bool:
    """Whether a file is there already; one put there by hand is written down."""
    if not path.is_file():
        return False
    reporter.note(f"{path} is there already")
    if path.name not in _seen(path.parent):
        _record(path, path.stat().st_size, sha256(path), "found in place")
    return True


class _Fetching:
    """One command's files on their way."""

    def __init__(self, workspace: Workspace, settings: DataSettings, reporter: Reporter) -> None:
        self._workspace = workspace
        self._settings = settings
        self._reporter = reporter
        self._progress: Progress | None = None
        self._begun = time.monotonic()
        self._came = self._done = self._files = 0

    async def all(self, wanted: list[Wanted], *, with_processed: bool) -> list[Path]:
        async with client(self._settings, self._settings.download_workers) as made:
            fetcher = Fetcher(made, self._settings, self._advance)
            problems: dict[Path, list[str]] = {}
            if with_processed:
                try:
                    wanted = [*wanted, *await self._processed(fetcher)]
                except Unavailable as error:
                    problems[self._workspace.published] = error.answers
            missing = [one for one in wanted if not _there(one.path, self._reporter)]
            if missing:
                await self._fetch_all(fetcher, missing, problems)
        if problems:
            order = [*(one.path for one in wanted), self._workspace.published]
            raise NetworkError(
                *(answer for path in order for answer in problems.get(path, ())),
                hint=f"name a --mirror URL, or fetch the files by hand from {LANDING_PAGE} (published files: "
                f"{PAGE.format(share=SHARE)}) and use --from-dir DIR",
            )
        for one in wanted:
            if one.path.parent == self._workspace.published:
                _unpack(one.path, self._reporter)
        return [one.path for one in wanted]

    async def _processed(self, fetcher: Fetcher) -> list[Wanted]:
        """The published files; what is there from before needs no question if it is written down and whole."""
        folder = self._workspace.published
        before = [folder / name for name in _seen(folder)]
        if before and all(path.is_file() for path in before):
            return [Wanted(path, ()) for path in before]
        files = await shared_files(fetcher)
        return [Wanted(folder / one.name, (one.url,), one.size, one.md5) for one in files]

    async def _fetch_all(self, fetcher: Fetcher, wanted: list[Wanted], problems: dict[Path, list[str]]) -> None:
        lengths = await asyncio.gather(*(self._length(fetcher, one) for one in wanted))
        have = sum(Part(one.path).size for one in wanted)
        require_space(wanted[0].path.parent, sum(length or 0 for length in lengths) - have)
        total = sum(length for length in lengths if length is not None) if None not in lengths else None
        places = asyncio.Semaphore(self._settings.download_workers)
        self._files = len(wanted)

        async def one_file(one: Wanted) -> None:
            async with places:
                try:
                    await self._fetched(fetcher, one)
                except Unavailable as error:
                    problems[one.path] = error.answers
                self._done += 1

        with self._reporter.stage("download", total, "bytes") as self._progress:
            self._progress.advance(have)
            self._begun = time.monotonic()
            try:
                async with asyncio.TaskGroup() as group:
                    for one in wanted:
                        group.create_task(one_file(one))
            except ExceptionGroup as several:
                raise several.exceptions[0] from None

    async def _length(self, fetcher: Fetcher, one: Wanted) -> int | None:
        return one.size if one.size is not None else await fetcher.length(one.addresses[0])

    async def _fetched(self, fetcher: Fetcher, one: Wanted) -> None:
        def complaint(_: Path, digest: str) -> str | None:
            return _changed(one.path, digest)

        try:
            fetched = await fetcher.fetch(one, complaint)
        except Unavailable as error:
            if one.path.parent != self._workspace.weights:
                raise
            fetched = await self._weights_of_the_share(fetcher, one, error, complaint)
        size = fetched.part.stat().st_size
        published = "size and md5 are published and agree" if one.md5 else ""
        # Written down first: a command that is killed here finds the file whole, and holds it to this.
        _record(one.path, size, fetched.sha256, fetched.url, published)
        Part(one.path).moved_to(one.path)
        self._reporter.note(
            f"{one.path}: {size:,} bytes from {fetched.url}, sha256 {fetched.sha256[:12]} "
            f"({'published' if one.md5 else 'first seen'})"
        )

    async def _weights_of_the_share(
        self, fetcher: Fetcher, one: Wanted, before: Unavailable, complaint: Callable[[Path, str], str | None]
    ) -> Any:
        try:
            files = await shared_files(fetcher)
            checkpoints = [file for file in files if file.name.endswith(".ckpt")]
            if not checkpoints:
                raise Unavailable([f"{PAGE.format(share=SHARE)}: no .ckpt among {', '.join(f.name for f in files)}"])
            best = checkpoints[0]
            return await fetcher.fetch(Wanted(one.path, (best.url,), best.size, best.md5), complaint)
        except Unavailable as error:
            raise Unavailable([*before.answers, *error.answers]) from error

    def _advance(self, n: int) -> None:
        if self._progress is None:
            return
        self._came += max(n, 0)
        rate = self._came / max(time.monotonic() - self._begun, 1e-3) / 1e6
        self._progress.advance(n, f"{self._done} of {self._files} files, {rate:.1f} MB/s")


def _unpack(path: Path, reporter: Reporter) -> None:
    """Unpack a published archive, unless that is done."""
    if not archives.is_archive(path) or archives.folder_of(path).is_dir():
        return
    archives.sweep(path.parent)
    files = archives.unpack(path, archives.folder_of(path))
    reporter.note(f"{archives.folder_of(path)}: {len(files)} files unpacked")


def _adopted(
    workspace: Workspace, wanted: list[Wanted], raw: list[Place], from_dir: Path, processed: bool, reporter: Reporter
) -> list[Path]:
    """Take files that were fetched by hand."""
    below = {place.path: place.below for place in raw}
    problems: list[str] = []
    taken = []
    for one in wanted:
        taken.append(one.path)
        if _there(one.path, reporter):
            continue
        names = (one.path.name, below.get(one.path, WEIGHTS))
        found = next((from_dir / name for name in names if (from_dir / name).is_file()), None)
        if found is None:
            problems.append(f"{from_dir}: no {one.path.name} there")
            continue
        _copy(found, one.path, reporter)
    if processed:
        found_archives = sorted(path for path in from_dir.glob("*") if path.is_file() and archives.is_archive(path))
        if not found_archives:
            problems.append(f"{from_dir}: no archive there ({', '.join(archives.ENDINGS)})")
        for path in found_archives:
            target = workspace.published / path.name
            if not _there(target, reporter):
                _copy(path, target, reporter)
            _unpack(target, reporter)
            taken.append(target)
    if problems:
        raise DataError(*problems, hint=f"fetch the files by hand from {LANDING_PAGE} into {from_dir}")
    return taken


def _copy(found: Path, path: Path, reporter: Reporter) -> None:
    require_space(path.parent, found.stat().st_size)
    with written_whole(path) as part:
        shutil.copyfile(found, part)
        digest = sha256(part)
        complaint = not_the_file(part, path.name) or _changed(path, digest)
        if complaint:
            raise DataError(f"{found}: {complaint}", hint="fetch the file again")
        _record(path, part.stat().st_size, digest, str(found))
    reporter.note(f"{path} copied from {found}")
