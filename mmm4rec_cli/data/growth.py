"""Growth: new interactions and items added to a domain's tables, every id that was given kept.

The rule: what is in the tables stays. A new row comes in if its user and its item are in the tables already or have,
with all rows of the tables and all new ones together, as many as the k-core asks for; rows that do not come in are kept
beside the tables and tried again the next time, and so are those that the filters left out of a user's own data when
the tables were made. Of a category's raw files the rows left out are not tried again, but its metadata are looked into
for items that come in now.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from mmm4rec_cli.data import domains
from mmm4rec_cli.data.columns import (
    CATEGORIES,
    IMAGE,
    IMAGE_URL,
    ITEM_ID,
    N_INTERACTIONS,
    RAW_ITEM_ID,
    RAW_USER_ID,
    TEXT,
    TIMESTAMP,
    TITLE,
    USER_ID,
)
from mmm4rec_cli.data.interactions import Log, drop_exact_duplicates, read_own_interactions
from mmm4rec_cli.data.items import read_metadata, read_own_items, with_texts
from mmm4rec_cli.data.preprocess import KNOWN_ITEMS, LEFT_OUT_ROWS, described, measured, raw_rows
from mmm4rec_cli.data.tables import Tables, preprocess_command, read_beside, read_tables, write_tables
from mmm4rec_cli.errors import UsageError
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.settings.schema import DataSettings
from mmm4rec_cli.workspace import Workspace

_ROW = (RAW_USER_ID, RAW_ITEM_ID, TIMESTAMP)
_ITEM = {**dict.fromkeys((RAW_ITEM_ID, TITLE, TEXT, IMAGE, IMAGE_URL), pl.String()), CATEGORIES: pl.List(pl.String())}
_RULES = ("min_user", "min_item", "require_text", "require_image")


def append_to_tables(
    workspace: Workspace,
    domain: str,
    settings: DataSettings,
    interactions: Path,
    *,
    items: Path | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Add a file of interactions, and one of items, to the tables of a domain; see the module for the rule.

    Existing users and items keep their ids and texts; new ones get the ids behind, by raw id. Rows that the tables hold
    already (same user, item and second) are left out, so that a file appended twice changes nothing. The old tables
    are there until the new ones are whole.

    Args:
        workspace: where.
        domain: a category or a domain of the user's own that has tables; no mix.
        settings: the data section: names of columns and unit of the times; the filters are those of the tables.
        interactions: the new interactions (csv, parquet or jsonl).
        items: the new items (csv, parquet or jsonl).
        reporter: told what was recognised and what came in.

    Returns:
        The new manifest; what came in stands last under `appended`.

    Raises:
        UsageError: the domain is a mix, or unknown.
        DataError: there are no tables, or a file is missing or broken.
    """
    start = time.perf_counter()
    reporter = reporter or SilentReporter()
    domains.check_domain(workspace, domain)
    if domain in domains.MIXES:
        raise UsageError(
            f"{domain!r} is a mix: nothing can be appended to it",
            hint=f"append to one of its domains, or make it anew: {preprocess_command(workspace, domain)}",
        )
    tables = read_tables(workspace, domain)
    recorded = tables.manifest.get("settings", {})
    settings = settings.model_copy(update={name: recorded[name] for name in _RULES if name in recorded})
    log, notes = read_own_interactions(interactions, settings.columns, settings.timestamp_unit)
    for note in notes:
        reporter.note(note)
    new = raw_rows(drop_exact_duplicates(log))
    waiting = _beside(workspace, tables, LEFT_OUT_ROWS, dict(zip(_ROW, (pl.String, pl.String, pl.Int64), strict=True)))
    # A file that holds a row twice with two ratings means it; one that was appended before does not.
    second = pl.col(TIMESTAMP) // 1000
    there = pl.concat([_rows(tables), waiting.with_columns(second)])
    new_keys = [pl.col(RAW_USER_ID), pl.col(RAW_ITEM_ID), second]
    fresh = new.join(there, left_on=new_keys, right_on=list(_ROW), how="anti", maintain_order="left")
    candidates = pl.concat([waiting, fresh])

    known = _known(workspace, tables, items, candidates[RAW_ITEM_ID].unique(), settings, reporter)
    usable = pl.lit(value=True)
    if settings.require_text:
        usable &= pl.col(TEXT).is_not_null()
    if settings.require_image:
        usable &= pl.col(IMAGE).is_not_null() | pl.col(IMAGE_URL).is_not_null()
    allowed = pl.concat([pl.Series(tables.raw_item_ids, dtype=pl.String), known.filter(usable)[RAW_ITEM_ID]])
    is_known = candidates[RAW_ITEM_ID].is_in(allowed.implode())
    users, user = _codes(tables.raw_user_ids, candidates[RAW_USER_ID])
    item_names, item = _codes(tables.raw_item_ids, candidates[RAW_ITEM_ID])
    comes_in = _core(tables, (user, len(users)), (item, len(item_names)), is_known.to_numpy(), settings)
    coming = candidates.filter(pl.Series(comes_in))
    frames, grown = _grown(tables, coming, known)

    before = {"users": tables.n_users, "items": tables.n_items, "rows": len(tables.user_id)}
    after = measured(grown, frames["items"])
    added = {name: after[name] - count for name, count in before.items()}
    entry = {
        "read": len(log),
        "already_there": new.height - fresh.height,
        "rows_of_unknown_items": int((~is_known).sum()),
        "added": added,
        "left_out": candidates.height - coming.height,
        "sources": [
            described(workspace, path, role, domain)
            for role, path in (("interactions", interactions), ("items", items))
            if path is not None
        ],
        "seconds": round(time.perf_counter() - start, 3),
    }
    reporter.note(
        f"{domain}: {added['rows']} interactions, {added['users']} users and {added['items']} items came in; "
        f"{entry['already_there']} interactions were there already, {entry['left_out']} wait for more of their user or "
        f"item ({entry['rows_of_unknown_items']} of them name an item that nothing is known of)"
    )
    still_known = known.filter(~pl.col(RAW_ITEM_ID).is_in(coming[RAW_ITEM_ID].unique().implode()))
    return write_tables(
        workspace,
        domain,
        **frames,
        manifest=tables.manifest | after | {"appended": [*tables.manifest.get("appended", []), entry]},
        beside={
            LEFT_OUT_ROWS: candidates.filter(pl.Series(~comes_in)).to_arrow(),
            KNOWN_ITEMS: still_known.to_arrow(),
        },
    )


def _rows(tables: Tables) -> pl.DataFrame:
    """The rows of the tables with raw ids, times in seconds."""
    return pl.DataFrame(
        {
            RAW_USER_ID: pl.Series(tables.raw_user_ids, dtype=pl.String).gather(tables.user_id),
            RAW_ITEM_ID: pl.Series(tables.raw_item_ids, dtype=pl.String).gather(tables.item_id - 1),
            TIMESTAMP: tables.timestamp,
        }
    )


def _beside(workspace: Workspace, tables: Tables, name: str, schema: Mapping[str, Any]) -> pl.DataFrame:
    found = read_beside(workspace, tables.domain, tables.manifest, name)
    if found is None:
        return pl.DataFrame(schema=dict(schema))
    frame = pl.from_arrow(found)
    assert isinstance(frame, pl.DataFrame)
    return _with(frame, schema)


def _with(frame: pl.DataFrame, schema: Mapping[str, pl.DataType]) -> pl.DataFrame:
    """The columns of the schema; null where the frame lacks one, as older tables lack categories."""
    there = {name: pl.col(name) if name in frame.columns else pl.lit(None) for name in schema}
    return frame.select(there[name].cast(kind).alias(name) for name, kind in schema.items())


def _known(
    workspace: Workspace,
    tables: Tables,
    items: Path | None,
    named: pl.Series,
    settings: DataSettings,
    reporter: Reporter,
) -> pl.DataFrame:
    """The items that are known without being in the catalogue: of the new file, kept beside, of the raw metadata."""
    found = [pl.DataFrame(schema=_ITEM)]
    if items is not None:
        own = read_own_items(items, settings.columns, workspace)
        if own.missing:
            reporter.warn(f"{items}: {own.missing} of {own.named} pictures are not there")
        found.append(_with(with_texts(own.frame), _ITEM))
        again = int(found[-1][RAW_ITEM_ID].is_in(pl.Series(tables.raw_item_ids).implode()).sum())
        if again:
            reporter.note(f"{items}: {again} items are in the catalogue already; they keep their text and picture")
    found.append(_beside(workspace, tables, KNOWN_ITEMS, _ITEM))
    if domains.is_registered(tables.domain):
        for source in tables.manifest.get("sources", []):
            path = workspace.root / source["path"]
            if source["role"] == "items" and path.is_file():
                hint = preprocess_command(workspace, tables.domain)
                found.append(_with(read_metadata(path, named, named, hint).frame, _ITEM))
    together = pl.concat(found).unique(subset=RAW_ITEM_ID, keep="first", maintain_order=True)
    return together.filter(~pl.col(RAW_ITEM_ID).is_in(pl.Series(tables.raw_item_ids, dtype=pl.String).implode()))


def _codes(first: Sequence[str], names: pl.Series) -> tuple[pl.Series, npt.NDArray[np.uint32]]:
    """All names, those of `first` before the others, which are sorted; and the place of each of `names`."""
    known = pl.Series("name", first, pl.String)
    fresh = names.unique().alias("name")
    together = pl.concat([known, fresh.filter(~fresh.is_in(known.implode())).sort()])
    places = pl.DataFrame({"name": together, "place": np.arange(len(together), dtype=np.uint32)})
    codes = names.alias("name").to_frame().join(places, on="name", how="left", maintain_order="left")
    return together, codes["place"].to_numpy()


def _core(
    tables: Tables,
    users: tuple[npt.NDArray[Any], int],
    items: tuple[npt.NDArray[Any], int],
    keep: npt.NDArray[np.bool_],
    settings: DataSettings,
) -> npt.NDArray[np.bool_]:
    """Which candidates [n] come in: the k-core in rounds, from which what is in the tables never drops."""
    (user, n_users), (item, n_items) = users, items
    of_user = np.bincount(tables.user_id, minlength=n_users)
    of_item = np.bincount(tables.item_id - 1, minlength=n_items)
    while True:
        many_user = of_user + np.bincount(user[keep], minlength=n_users) >= settings.min_user
        many_item = of_item + np.bincount(item[keep], minlength=n_items) >= settings.min_item
        many_user[: tables.n_users] = True
        many_item[: tables.n_items] = True
        left: npt.NDArray[np.bool_] = keep & many_user[user] & many_item[item]
        if np.array_equal(left, keep):
            return left
        keep = left


def _grown(tables: Tables, coming: pl.DataFrame, known: pl.DataFrame) -> tuple[dict[str, pa.Table], Log]:
    """The three tables with the rows that come in, and their log; new ids lie behind the old ones."""
    # Within a second, what was there comes first, then what was earlier in finer time, then the file's order.
    coming = coming.sort(TIMESTAMP, maintain_order=True)
    users, user = _codes(tables.raw_user_ids, coming[RAW_USER_ID])
    items, item = _codes(tables.raw_item_ids, coming[RAW_ITEM_ID])
    user = np.concatenate([tables.user_id, user])
    item = np.concatenate([tables.item_id - 1, item])
    seconds = np.concatenate([tables.timestamp, (coming[TIMESTAMP] // 1000).to_numpy()])
    order = np.lexsort((seconds, user))
    log = Log(user[order].astype(np.uint32), item[order].astype(np.uint32), seconds[order], None, users, items)
    per_item = np.bincount(log.item, minlength=len(items)).astype(np.int32)
    per_user = np.bincount(log.user, minlength=len(users)).astype(np.int32)
    old = pl.from_arrow(tables.items)
    assert isinstance(old, pl.DataFrame)
    said = pl.concat([_with(old, _ITEM), known])
    catalogue = pl.DataFrame(
        {ITEM_ID: np.arange(1, len(items) + 1, dtype=np.int32), RAW_ITEM_ID: items, N_INTERACTIONS: per_item}
    ).join(said, on=RAW_ITEM_ID, how="left", maintain_order="left")
    if CATEGORIES not in old.columns and catalogue[CATEGORIES].null_count() == catalogue.height:
        catalogue = catalogue.drop(CATEGORIES)
    columns = {
        USER_ID: log.user.astype(np.int32),
        ITEM_ID: log.item.astype(np.int32) + np.int32(1),
        TIMESTAMP: log.time,
    }
    people = pl.DataFrame(
        {USER_ID: np.arange(len(users), dtype=np.int32), RAW_USER_ID: users, N_INTERACTIONS: per_user}
    )
    return {"interactions": pa.table(columns), "items": catalogue.to_arrow(), "users": people.to_arrow()}, log
