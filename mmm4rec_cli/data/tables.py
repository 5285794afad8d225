"""The tables that everything after preprocessing reads: interactions, items, users, and their manifest.

Needs pyarrow and numpy alone, so that training and evaluation run without polars. Shapes: n interactions, U users,
V items (without the padding row, item id 0).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

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
from mmm4rec_cli.data.domains import MIXES, is_registered, members
from mmm4rec_cli.errors import DataError
from mmm4rec_cli.files import finish_renames, sha256, write_json, written_together, written_whole
from mmm4rec_cli.workspace import Workspace

INTERACTIONS = "interactions.parquet"
ITEMS = "items.parquet"
USERS = "users.parquet"
MANIFEST = "manifest.json"

INTERACTIONS_SCHEMA = pa.schema(
    [
        pa.field(USER_ID, pa.int32(), nullable=False),
        pa.field(ITEM_ID, pa.int32(), nullable=False),
        pa.field(TIMESTAMP, pa.int64(), nullable=False),
    ]
)
"""One row an interaction: user from 0, item from 1, Unix seconds; by user, then time, then the raw file's order."""

ITEMS_SCHEMA = pa.schema(
    [
        pa.field(ITEM_ID, pa.int32(), nullable=False),
        pa.field(RAW_ITEM_ID, pa.string(), nullable=False),
        pa.field(TITLE, pa.string()),
        pa.field(TEXT, pa.string()),
        pa.field(IMAGE, pa.string()),
        pa.field(IMAGE_URL, pa.string()),
        pa.field(N_INTERACTIONS, pa.int32(), nullable=False),
    ]
)
"""One row an item, item ids 1..V in order; `image` is relative to the workspace where it lies inside it."""

CATEGORIES_FIELD = pa.field(CATEGORIES, pa.list_(pa.string()))
"""A further column of the items where their source names categories: names, the same one may occur again."""

USERS_SCHEMA = pa.schema(
    [
        pa.field(USER_ID, pa.int32(), nullable=False),
        pa.field(RAW_USER_ID, pa.string(), nullable=False),
        pa.field(N_INTERACTIONS, pa.int32(), nullable=False),
    ]
)
"""One row a user, user ids 0..U-1 in order."""


@dataclass(frozen=True)
class Tables:
    """The tables of one domain.

    Attributes:
        domain: its name.
        user_id: int32 [n], 0..U-1, ascending.
        item_id: int32 [n], 1..V.
        timestamp: int64 [n], Unix seconds, ascending within a user; ties stand in the raw file's order.
        raw_item_ids: [V], index i is item id i+1.
        raw_user_ids: [U], index i is user id i.
        items: [V] rows of ITEMS_SCHEMA.
        manifest: how the tables came about.
        fingerprint: identity of the data: ids, times, raw ids, titles, texts and image addresses. Where pictures lie
            on this machine is no part of it: they count through the features made of them.
        catalogue: identity of the raw item ids in their order.
    """

    domain: str
    user_id: npt.NDArray[np.int32]
    item_id: npt.NDArray[np.int32]
    timestamp: npt.NDArray[np.int64]
    raw_item_ids: list[str]
    raw_user_ids: list[str]
    items: pa.Table
    manifest: dict[str, Any]
    fingerprint: str
    catalogue: str

    @property
    def n_users(self) -> int:
        """U."""
        return len(self.raw_user_ids)

    @property
    def n_items(self) -> int:
        """V, without the padding row."""
        return len(self.raw_item_ids)

    @property
    def categories(self) -> list[list[str] | None] | None:
        """Names of each item's categories, or None where the table has no such column."""
        return self.items[CATEGORIES].to_pylist() if CATEGORIES in self.items.column_names else None


def command(workspace: Workspace, *words: str) -> str:
    """The command line that does `words` in this workspace, ready to be typed."""
    return workspace.command(*words)


def preprocess_command(workspace: Workspace, domain: str) -> str:
    """The command lines that make this domain's tables, the download included where its raw files are not there."""
    if is_registered(domain):
        option = "--mix" if domain in MIXES else "--domain"
        there = all(any(workspace.raw(member).glob("*.csv")) for member in members(domain))
        download = "" if there else command(workspace, "download", option, domain) + " && "
        return download + command(workspace, "preprocess", option, domain)
    return command(workspace, "preprocess", "--interactions", "FILE", "--items", "FILE", "--domain", domain)


def catalogue_fingerprint(raw_item_ids: Sequence[str]) -> str:
    """Hexadecimal SHA-256 over raw item ids in order; [V] strings."""
    digest = hashlib.sha256()
    _add_strings(digest, raw_item_ids)
    return digest.hexdigest()


def write_tables(
    workspace: Workspace,
    domain: str,
    *,
    interactions: pa.Table,
    items: pa.Table,
    users: pa.Table,
    manifest: dict[str, Any],
    beside: Mapping[str, pa.Table] | None = None,
) -> dict[str, Any]:
    """Write the three tables and their manifest: all of them, or none, whenever the process is stopped.

    Args:
        workspace: where.
        domain: the domain's name.
        interactions: [n] rows, columns as in INTERACTIONS_SCHEMA.
        items: [V] rows, columns as in ITEMS_SCHEMA.
        users: [U] rows, columns as in USERS_SCHEMA.
        manifest: JSON-able; `fingerprint`, `catalogue` and, where there are such, `beside` are added.
        beside: further tables by file name, see `read_beside`.

    Returns:
        The manifest as written.
    """
    interactions = interactions.select(INTERACTIONS_SCHEMA.names).cast(INTERACTIONS_SCHEMA)
    items_schema = _with_categories(items.schema)
    items = items.select(items_schema.names).cast(items_schema)
    users = users.select(USERS_SCHEMA.names).cast(USERS_SCHEMA)
    problem = _inconsistency(interactions, items, users)
    assert problem is None, problem
    manifest = manifest | {
        "fingerprint": _fingerprint(interactions, items, users),
        "catalogue": catalogue_fingerprint(_strings(items, RAW_ITEM_ID)),
    }
    with written_together(workspace.processed(domain)) as part:
        for name, table in ((INTERACTIONS, interactions), (ITEMS, items), (USERS, users)):
            pq.write_table(table, part(name), compression="zstd")
        manifest.pop("beside", None)
        for name, table in (beside or {}).items():
            path = part(name)
            pq.write_table(table, path, compression="zstd")
            manifest.setdefault("beside", {})[name] = sha256(path)
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
        part(MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def read_beside(workspace: Workspace, domain: str, manifest: Mapping[str, Any], name: str) -> pa.Table | None:
    """A table that was written beside a domain's tables, or None if their manifest knows of none.

    Raises:
        DataError: it is not there any more, or another one.
    """
    digest = manifest.get("beside", {}).get(name)
    if digest is None:
        return None
    path = workspace.processed(domain) / name
    if not path.is_file() or sha256(path) != digest:
        raise DataError(f"{path} is not the file that {MANIFEST} describes", hint=preprocess_command(workspace, domain))
    return pq.read_table(path, partitioning=None)


def write_images(
    workspace: Workspace, domain: str, paths: Sequence[str | None], entries: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Set where the items' pictures lie; everything else in the tables stays.

    Args:
        workspace: where.
        domain: a domain that has tables.
        paths: [V] in the order of the item ids: path of the picture (relative ones from the workspace), or None.
        entries: what to add to the manifest, or to replace there.

    Returns:
        The new manifest, its `image_share` brought up to date.
    """
    folder = workspace.processed(domain)
    manifest = read_manifest(workspace, domain)
    items = _read(folder / ITEMS, ITEMS_SCHEMA, preprocess_command(workspace, domain), optional=CATEGORIES_FIELD)
    column = pa.array([None if path is None else image_entry(workspace, path) for path in paths], pa.string())
    assert len(column) == items.num_rows, f"{len(column)} paths for {items.num_rows} items"
    items = items.set_column(ITEMS_SCHEMA.get_field_index(IMAGE), ITEMS_SCHEMA.field(IMAGE), column)
    with written_whole(folder / ITEMS) as part:
        pq.write_table(items.cast(_with_categories(items.schema)), part, compression="zstd")
    manifest |= {"image_share": 1 - column.null_count / max(len(column), 1), **(entries or {})}
    write_json(folder / MANIFEST, manifest)
    return manifest


def image_entry(workspace: Workspace, path: str | Path) -> str:
    """How items.parquet names a picture: relative to the workspace if it lies inside it, else absolute."""
    absolute = workspace.root.absolute() / path
    for root in (workspace.root.absolute(), workspace.root.resolve()):
        if absolute.is_relative_to(root):
            return absolute.relative_to(root).as_posix()
    return str(absolute)


def read_manifest(workspace: Workspace, domain: str) -> dict[str, Any]:
    """The manifest of a domain's tables.

    Raises:
        DataError: there are no tables, or the manifest cannot be read; the hint is the command that makes them.
    """
    path = workspace.processed(domain) / MANIFEST
    hint = preprocess_command(workspace, domain)
    finish_renames(path.parent)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"domain {domain!r} has no tables: {path} is missing", hint=hint) from None
    except ValueError as error:
        raise DataError(f"{path}: not a manifest ({error})", hint=hint) from error
    if not isinstance(manifest, dict):
        raise DataError(f"{path}: not a manifest (no JSON object)", hint=hint)
    return manifest


def read_tables(workspace: Workspace, domain: str) -> Tables:
    """Read and check the tables of one domain.

    Raises:
        DataError: a file is missing, damaged, of another schema, or does not fit the others; the hint is the command
            that makes the tables anew.
    """
    folder = workspace.processed(domain)
    hint = preprocess_command(workspace, domain)
    manifest = read_manifest(workspace, domain)
    interactions = _read(folder / INTERACTIONS, INTERACTIONS_SCHEMA, hint)
    items = _read(folder / ITEMS, ITEMS_SCHEMA, hint, optional=CATEGORIES_FIELD)
    users = _read(folder / USERS, USERS_SCHEMA, hint)
    problem = _inconsistency(interactions, items, users)
    fingerprint = _fingerprint(interactions, items, users)
    if problem is None and manifest.get("fingerprint") != fingerprint:
        problem = f"the tables are not those that {MANIFEST} describes"
    if problem is not None:
        raise DataError(f"{folder}: {problem}", hint=hint)
    raw_item_ids = _strings(items, RAW_ITEM_ID)
    return Tables(
        domain=domain,
        user_id=_numbers(interactions, USER_ID),
        item_id=_numbers(interactions, ITEM_ID),
        timestamp=_numbers(interactions, TIMESTAMP),
        raw_item_ids=raw_item_ids,
        raw_user_ids=_strings(users, RAW_USER_ID),
        items=items,
        manifest=manifest,
        fingerprint=fingerprint,
        catalogue=catalogue_fingerprint(raw_item_ids),
    )


def _with_categories(found: pa.Schema) -> pa.Schema:
    return ITEMS_SCHEMA.append(CATEGORIES_FIELD) if CATEGORIES in found.names else ITEMS_SCHEMA


def _read(path: Path, schema: pa.Schema, hint: str, optional: pa.Field | None = None) -> pa.Table:
    """Read a Parquet file's columns of `schema`, and `optional` if it is there, or say what is wrong with it."""
    try:
        with pq.ParquetFile(path) as file:
            found = file.schema_arrow
            if optional is not None and optional.name in found.names:
                schema = schema.append(optional)
            problems = [
                f"{path}: column {field.name!r} is missing"
                if field.name not in found.names
                else f"{path}: column {field.name!r} is {found.field(field.name).type}, not {field.type}"
                for field in schema
                if field.name not in found.names or found.field(field.name).type != field.type
            ]
            if problems:
                raise DataError(*problems, hint=hint)
            table = file.read(columns=schema.names)
    except FileNotFoundError:
        raise DataError(f"{path} is missing", hint=hint) from None
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: cannot be read as Parquet ({first_line})", hint=hint) from error
    holed = [field.name for field in schema if not field.nullable and table[field.name].null_count]
    if holed:
        raise DataError(*(f"{path}: column {name!r} has nulls" for name in holed), hint=hint)
    return table


def _inconsistency(interactions: pa.Table, items: pa.Table, users: pa.Table) -> str | None:
    """What breaks the contract between the three tables, if anything."""
    user_id, item_id = _numbers(interactions, USER_ID), _numbers(interactions, ITEM_ID)
    timestamp = _numbers(interactions, TIMESTAMP)
    n_users, n_items = users.num_rows, items.num_rows
    if not np.array_equal(_numbers(items, ITEM_ID), np.arange(1, n_items + 1)):
        return f"{ITEMS}: item ids are not 1..{n_items} in order"
    if not np.array_equal(_numbers(users, USER_ID), np.arange(n_users)):
        return f"{USERS}: user ids are not 0..{n_users - 1} in order"
    if not len(user_id):
        return f"{INTERACTIONS}: no interactions"
    if user_id[0] < 0 or user_id[-1] >= n_users:
        return f"{INTERACTIONS}: user ids outside 0..{n_users - 1}"
    if item_id.min() < 1 or item_id.max() > n_items:
        return f"{INTERACTIONS}: item ids outside 1..{n_items}"
    same_user = user_id[1:] == user_id[:-1]
    if np.any(user_id[1:] < user_id[:-1]) or np.any(same_user & (timestamp[1:] < timestamp[:-1])):
        return f"{INTERACTIONS}: not sorted by user and time"
    if not np.array_equal(np.bincount(user_id, minlength=n_users), _numbers(users, N_INTERACTIONS)):
        return f"{USERS}: {N_INTERACTIONS} does not fit {INTERACTIONS}"
    if not np.array_equal(np.bincount(item_id, minlength=n_items + 1)[1:], _numbers(items, N_INTERACTIONS)):
        return f"{ITEMS}: {N_INTERACTIONS} does not fit {INTERACTIONS}"
    return None


def _fingerprint(interactions: pa.Table, items: pa.Table, users: pa.Table) -> str:
    """Hexadecimal SHA-256 over the content of the three tables, but for where the pictures lie."""
    digest = hashlib.sha256()
    for name in INTERACTIONS_SCHEMA.names:
        values = _numbers(interactions, name)
        digest.update(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).data)
    for table, name in ((users, RAW_USER_ID), (items, RAW_ITEM_ID), (items, TITLE), (items, TEXT), (items, IMAGE_URL)):
        _add_strings(digest, _strings(table, name))
    if CATEGORIES in items.column_names:
        _add_strings(digest, (None if names is None else json.dumps(names) for names in items[CATEGORIES].to_pylist()))
    return digest.hexdigest()


def _add_strings(digest: "hashlib._Hash", values: Iterable[str | None]) -> None:
    """Feed strings with their lengths, so that no two lists look alike; None differs from the empty string."""
    encoded = [None if value is None else value.encode() for value in values]
    lengths = np.fromiter((-1 if value is None else len(value) for value in encoded), "<i8", count=len(encoded))
    digest.update(np.int64(len(encoded)).astype("<i8").tobytes())
    digest.update(lengths.tobytes())
    digest.update(b"".join(value for value in encoded if value is not None))


def _numbers(table: pa.Table, name: str) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = table[name].to_numpy()
    return values


def _strings(table: pa.Table, name: str) -> list[Any]:
    values: list[Any] = table[name].to_numpy().tolist()
    return values
