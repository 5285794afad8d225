"""Raw files to tables: interactions, items, users and the manifest of how they came about."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from mmm4rec_cli import __version__
from mmm4rec_cli.data import amazon_2023, domains
from mmm4rec_cli.data.columns import (
    IMAGE,
    IMAGE_URL,
    ITEM_ID,
    N_INTERACTIONS,
    RAW_ITEM_ID,
    RAW_USER_ID,
    TEXT,
    TIMESTAMP,
    USER_ID,
)
from mmm4rec_cli.data.images import LEFT_OUT
from mmm4rec_cli.data.interactions import (
    Log,
    concatenated,
    drop_exact_duplicates,
    in_order,
    k_core,
    keep_items,
    read_own_interactions,
    read_ratings,
    repeated_pairs,
    tied_rows,
    with_prefix,
    without_idle_names,
)
from mmm4rec_cli.data.items import Metadata, OwnItems, metadata_of_own, read_metadata, read_own_items
from mmm4rec_cli.data.tables import command, preprocess_command, read_manifest, read_tables, write_tables
from mmm4rec_cli.errors import DataError, UsageError
from mmm4rec_cli.files import sha256
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.settings.schema import DataSettings
from mmm4rec_cli.workspace import Workspace

RULES = 2
"""Version of the rules in this package: raised when the same sources and settings would give other tables."""

ROLES = ("interactions", "items")

LEFT_OUT_ROWS = "left_out.parquet"
"""Beside the tables of a user's own data: the rows that the filters left out, for when the domain grows.

`raw_user_id`, `raw_item_id`, `timestamp` (milliseconds); exact duplicates are gone.
"""

KNOWN_ITEMS = "known_items.parquet"
"""Beside the tables of a user's own data: the items known without being in the catalogue.

`raw_item_id`, `title`, `text`, `image`, `image_url`.
"""

_IRRELEVANT = {
    *("split", "image_timeout", "image_workers", "image_per_host", "mirrors"),
    *(name for name in DataSettings.model_fields if name.startswith("download_")),
}

Counts = dict[str, dict[str, int]]
"""Step -> users, items and rows behind it."""


@dataclass(frozen=True)
class _Source:
    """One category's raw files, or a user's two tables."""

    domain: str
    interactions: Path
    items: Path
    own: bool

    @property
    def files(self) -> tuple[Path, Path]:
        return self.interactions, self.items


@dataclass(frozen=True)
class _Part:
    """What the filters left of one source; of a user's own, also the rows and items that they left out."""

    log: Log
    metadata: Metadata
    counts: Counts
    rounds: int
    tied_when_read: int
    left_out: Log | None = None
    known: pl.DataFrame | None = None


def build_tables(
    workspace: Workspace,
    domain: str,
    settings: DataSettings,
    *,
    interactions: Path | None = None,
    items: Path | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Make a domain's tables from its raw files, or from a user's own two tables.

    The filters, in the published order (spec 7): exact duplicate rows go; items that the metadata do not know go;
    if set, items without text or image go; k-core in rounds. Rows of a user that share their time stand in the order
    of the raw file. Ids follow the raw ids sorted by code point; a mix prefixes raw ids with "<domain>-". Nothing is
    done if the tables that are there came from the same sources, settings and rules.

    Args:
        workspace: where.
        domain: a category, a mix, or the name of the user's own domain.
        settings: the data section.
        interactions: the user's own interactions (csv, parquet or jsonl).
        items: the user's own items (csv, parquet or jsonl). Without both files, an own domain is made anew from the
            files that its manifest remembers.
        reporter: told what was recognised, and what was kept.

    Returns:
        The manifest.

    Raises:
        UsageError: an unknown domain, or one of the two own tables without the other.
        DataError: a file is missing or broken, or nothing is left after the filters.
    """
    start = time.perf_counter()
    reporter = reporter or SilentReporter()
    sources = _sources(workspace, domain, interactions, items)
    identity: dict[str, Any] = {
        "domain": domain,
        "rules": RULES,
        "sources": [
            described(workspace, path, role, source.domain)
            for source in sources
            for role, path in zip(ROLES, source.files, strict=True)
        ],
        "settings": settings.model_dump(mode="json", exclude=_IRRELEVANT),
    }
    own_items = None
    if sources[0].own:
        own_items = read_own_items(sources[0].items, settings.columns, workspace)
        if own_items.missing:
            reporter.warn(f"{sources[0].items}: {own_items.missing} of {own_items.named} pictures are not there")
        # Pictures may come and go without any change to the table that names them.
        listed = "\n".join(entry or "" for entry in own_items.frame[IMAGE])
        identity["pictures"] = {
            "named": own_items.named,
            "missing": own_items.missing,
            "sha256": hashlib.sha256(listed.encode()).hexdigest(),
        }
    kept = _kept(workspace, domain, identity)
    if kept is not None:
        reporter.note(f"{domain}: same sources, settings and rules as before; the tables were kept")
        return kept
    _warn_of_appended(workspace, domain, reporter)

    parts = []
    with reporter.stage(f"tables of {domain}", total=len(sources), unit="source") as progress:
        for source in sources:
            parts.append(_filtered(source, settings, workspace, own_items, reporter))
            progress.advance(status=source.domain)
    # Domains of a mix share no user and no item, so that the k-core of all is the k-cores of each.
    counts = _summed([part.counts for part in parts])
    if len(parts) > 1:
        parts = [_prefixed(part, f"{source.domain}-") for part, source in zip(parts, sources, strict=True)]
    parts = [part for part in parts if len(part.log)]
    if not parts:
        raise _empty(domain, settings, counts)
    log = in_order(concatenated([part.log for part in parts]))
    frames = _frames(log, [part.metadata.frame for part in parts])
    manifest = (
        identity
        | {
            "mmm4rec": __version__,
            "counts": [{"step": step} | count for step, count in counts.items()],
            "rounds": max(part.rounds for part in parts),
            "tied_share_read": sum(part.tied_when_read for part in parts) / counts["read"]["rows"],
            "metadata_rows": sum(part.metadata.lines for part in parts),
            "metadata_repeated": sum(part.metadata.repeated for part in parts),
            "seconds": round(time.perf_counter() - start, 3),
        }
        | measured(log, frames["items"])
    )
    beside = {}
    for part in parts:
        if part.left_out is not None and part.known is not None:
            beside = {LEFT_OUT_ROWS: raw_rows(part.left_out).to_arrow(), KNOWN_ITEMS: part.known.to_arrow()}
    return write_tables(workspace, domain, **frames, manifest=manifest, beside=beside)


def raw_rows(log: Log) -> pl.DataFrame:
    """The rows of a log in its order: raw ids, seconds, and the time in milliseconds that orders them."""
    return pl.DataFrame(
        {
            RAW_USER_ID: log.users.gather(log.user),
            RAW_ITEM_ID: log.items.gather(log.item),
            TIMESTAMP: log.time * (1000 // log.ticks),
        }
    )


def domains_at_hand(workspace: Workspace) -> list[str]:
    """The categories whose raw files are both there, in the registry's order."""
    sources = (_raw(workspace, name) for name in domains.CATEGORIES)
    return [source.domain for source in sources if all(path.is_file() for path in source.files)]


def _sources(workspace: Workspace, domain: str, log: Path | None, items: Path | None) -> list[_Source]:
    """The files that a domain is made of; they are there."""
    if (log is None) != (items is None):
        given, lacking = ("--interactions", "--items") if items is None else ("--items", "--interactions")
        raise UsageError(f"{given} was given without {lacking}", hint="own data are two tables: give both")
    if log is not None and items is not None:
        sources = [_Source(domains.own_domain(domain), log, items, own=True)]
        hint = "give the tables with --interactions FILE and --items FILE"
    elif domain in domains.own_domains(workspace):
        remembered = read_manifest(workspace, domain).get("sources", [])
        paths = {entry["role"]: workspace.root / entry["path"] for entry in remembered}
        if set(paths) != set(ROLES):
            raise DataError(
                f"domain {domain!r} does not say what it was made of", hint=preprocess_command(workspace, domain)
            )
        sources = [_Source(domain, paths["interactions"], paths["items"], own=True)]
        hint = preprocess_command(workspace, domain)
    else:
        domains.check_domain(workspace, domain)
        sources = [_raw(workspace, member) for member in domains.members(domain)]
        which = ("--mix", domain) if domain in domains.MIXES else ("--domain", domain)
        hint = command(workspace, "download", *which)
    missing = [
        f"{path} is {'not a file' if path.exists() else 'missing'}"
        for source in sources
        for path in source.files
        if not path.is_file()
    ]
    if missing:
        raise DataError(*missing, hint=hint)
    return sources


def _raw(workspace: Workspace, domain: str) -> _Source:
    folder, category = workspace.raw(domain), domains.category(domain)
    newer = amazon_2023.files(folder, domain)
    if newer is not None and not (folder / f"{category}.csv").is_file():
        return _Source(domain, *newer, own=False)
    packed, plain = folder / f"meta_{category}.json.gz", folder / f"meta_{category}.json"
    metadata = plain if plain.is_file() and not packed.is_file() else packed
    return _Source(domain, folder / f"{category}.csv", metadata, own=False)


def described(workspace: Workspace, path: Path, role: str, domain: str) -> dict[str, Any]:
    """A source as the manifest names it: by a path from the workspace if it lies inside it."""
    root = workspace.root.resolve()
    absolute = path.resolve()
    named = absolute.relative_to(root).as_posix() if absolute.is_relative_to(root) else str(absolute)
    return {
        "role": role,
        "domain": domain,
        "path": named,
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
    }


def measured(log: Log, items: pa.Table) -> dict[str, Any]:
    """What the manifest says of finished tables: sizes, ties, repeats, and how many items have what."""
    n_items = items.num_rows
    return {
        "users": len(log.users),
        "items": n_items,
        "rows": len(log),
        "tied_share": tied_rows(log) / len(log),
        "repeated_pairs": repeated_pairs(log),
        "text_share": 1 - items[TEXT].null_count / n_items,
        "image_share": 1 - items[IMAGE].null_count / n_items,
        "image_url_share": 1 - items[IMAGE_URL].null_count / n_items,
    }


def _kept(workspace: Workspace, domain: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the tables that are there, if they came about in the same way and are whole."""
    try:
        manifest = read_manifest(workspace, domain)
        if any(manifest.get(key) != value for key, value in identity.items()):
            return None
        if "pictures" in identity and manifest.get("images") == LEFT_OUT:
            return None  # only the user's table still knows where the pictures are
        return read_tables(workspace, domain).manifest
    except DataError:
        return None


def _warn_of_appended(workspace: Workspace, domain: str, reporter: Reporter) -> None:
    """Say what goes with tables that are made anew, where files were appended to them."""
    try:
        appended = read_manifest(workspace, domain).get("appended", [])
    except DataError:
        return
    if appended:
        paths = [source["path"] for entry in appended for source in entry["sources"]]
        reporter.warn(
            f"{domain}: made anew, since sources or settings changed; ids change, and what was appended is left out: "
            f"append it again ({', '.join(paths)})"
        )


def _filtered(
    source: _Source, settings: DataSettings, workspace: Workspace, own_items: OwnItems | None, reporter: Reporter
) -> _Part:
    """Read one source and apply the filters in the published order."""
    if own_items is not None:
        log, notes = read_own_interactions(source.interactions, settings.columns, settings.timestamp_unit)
        for note in notes:
            reporter.note(note)
    elif source.interactions.name.endswith(".csv.gz"):
        reporter.note(amazon_2023.NOTE)
        hint = command(workspace, "download", "--domain", source.domain, "--source", "amazon-2023")
        log = amazon_2023.read_ratings(source.interactions, hint)
    else:
        log = read_ratings(source.interactions, command(workspace, "download", "--domain", source.domain))
    counts = {"read": log.counts()}
    tied = tied_rows(log)
    log = drop_exact_duplicates(log)
    counts["exact duplicates dropped"] = log.counts()

    read = log
    rated = log.item_names()
    # A core of fewer rows lies inside the core of more: what is outside now needs no text.
    everything = settings.require_text or settings.require_image
    if own_items is not None:
        metadata = metadata_of_own(own_items, rated)
    else:
        wanted = rated if everything else k_core(log, settings.min_user, settings.min_item)[0].item_names()
        if source.items.name.endswith(".jsonl.gz"):
            hint = command(workspace, "download", "--domain", source.domain, "--source", "amazon-2023")
            metadata = amazon_2023.read_metadata(source.items, rated, wanted, hint)
        else:
            hint = command(workspace, "download", "--domain", source.domain)
            metadata = read_metadata(source.items, rated, wanted, hint)
    log = keep_items(log, metadata.known)
    counts["items in metadata"] = log.counts()
    if settings.require_text:
        log = keep_items(log, metadata.frame.filter(pl.col(TEXT).is_not_null())[RAW_ITEM_ID])
        counts["items with text"] = log.counts()
    if settings.require_image:
        pictured = pl.col(IMAGE).is_not_null() | pl.col(IMAGE_URL).is_not_null()
        log = keep_items(log, metadata.frame.filter(pictured)[RAW_ITEM_ID])
        counts["items with image"] = log.counts()
    log, rounds = k_core(log, settings.min_user, settings.min_item)
    counts["k-core"] = log.counts()
    left_out = known = None
    kept = pl.col(RAW_ITEM_ID).is_in(log.item_names().implode())
    if own_items is not None:
        # Of a user and an item that stay, every row stays.
        users = np.bincount(log.user, minlength=len(log.users)) > 0
        items = np.bincount(log.item, minlength=len(log.items)) > 0
        left_out = read.rows(~(users[read.user] & items[read.item]))
        known = metadata.frame.filter(~kept)
    metadata = replace(metadata, frame=metadata.frame.filter(kept))
    return _Part(without_idle_names(log), metadata, counts, rounds, tied, left_out, known)


def _prefixed(part: _Part, prefix: str) -> _Part:
    frame = part.metadata.frame.with_columns((prefix + pl.col(RAW_ITEM_ID)).alias(RAW_ITEM_ID))
    return replace(part, log=with_prefix(part.log, prefix), metadata=replace(part.metadata, frame=frame))


def _summed(parts: Sequence[Counts]) -> Counts:
    return {step: {unit: sum(part[step][unit] for part in parts) for unit in count} for step, count in parts[0].items()}


def _empty(domain: str, settings: DataSettings, counts: Counts) -> DataError:
    """The error for a domain of which nothing is left; it names the step that took the last row."""
    steps = "; ".join(
        f"{step}: {count['users']} users, {count['items']} items, {count['rows']} rows"
        for step, count in counts.items()
    )
    last = next(step for step, count in counts.items() if not count["rows"])
    hints = {
        "items in metadata": "no item of the interactions is known to the metadata: compare the item ids of both files",
        "items with text": "no item has usable text: --set data.require_text=false keeps them",
        "items with image": "no item names an image: --set data.require_image=false keeps them",
        "k-core": f"lower data.min_user (now {settings.min_user}) or data.min_item (now {settings.min_item}), "
        "for example --set data.min_user=3 --set data.min_item=1",
    }
    return DataError(f"domain {domain!r} is empty: no row is left ({steps})", hint=hints[last])


def _frames(log: Log, metadata: list[pl.DataFrame]) -> dict[str, pa.Table]:
    """The three tables of a log in order."""
    per_item = np.bincount(log.item, minlength=len(log.items)).astype(np.int32)
    per_user = np.bincount(log.user, minlength=len(log.users)).astype(np.int32)
    ids = pl.DataFrame(
        {
            ITEM_ID: np.arange(1, len(log.items) + 1, dtype=np.int32),
            RAW_ITEM_ID: log.items,
            N_INTERACTIONS: per_item,
        }
    )
    users = pl.DataFrame(
        {USER_ID: np.arange(len(log.users), dtype=np.int32), RAW_USER_ID: log.users, N_INTERACTIONS: per_user}
    )
    columns = [log.user.astype(np.int32), log.item.astype(np.int32) + np.int32(1), log.time // log.ticks]
    return {
        "interactions": pa.table(dict(zip((USER_ID, ITEM_ID, TIMESTAMP), map(pa.array, columns), strict=True))),
        "items": ids.join(pl.concat(metadata), on=RAW_ITEM_ID, how="left", maintain_order="left").to_arrow(),
        "users": users.to_arrow(),
    }
