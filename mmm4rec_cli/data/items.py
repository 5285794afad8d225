"""Items: their metadata read, their texts cleaned, their pictures found."""

import html
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from mmm4rec_cli.data import raw
from mmm4rec_cli.data.columns import CATEGORIES, IMAGE, IMAGE_URL, ITEM_ID, RAW_ITEM_ID, TEXT, TITLE
from mmm4rec_cli.data.interactions import BATCH, format_of, read_jsonl, read_parquet, require_columns
from mmm4rec_cli.data.tables import image_entry
from mmm4rec_cli.errors import DataError
from mmm4rec_cli.settings.schema import Columns
from mmm4rec_cli.workspace import Workspace

BRAND = "brand"
DESCRIPTION = "description"

MARKERS = {TITLE: "Title: ", BRAND: "Brand: ", DESCRIPTION: "Description: "}
"""A text is its parts in this order, each behind its marker, each ended by a full stop unless it ends in punctuation.

Parts without usable text are left out."""

_AMAZON_IMAGES = ("imageURLHighRes", "imageURL", "image")
_OWN_HINT = "mend the table, or name its columns with --set data.columns.text=NAME (item_id, title, image alike)"

_ENTITY = r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});"
_UNSEEN = r"(?is)<!--.*?(?:-->|$)|<(?:script|style)\b.*?(?:</(?:script|style)\s*>|$)"
_ATTRIBUTES = r"(?:\s[^<>]*)?/?>"
# What stands within a word or line goes without a trace, everything else parts words.
_INLINE_TAG = rf"(?i)</?(?:a|abbr|b|em|font|i|mark|s|small|span|strong|sub|sup|tt|u){_ATTRIBUTES}"
_OTHER_TAG = rf"</?[A-Za-z][A-Za-z0-9]*{_ATTRIBUTES}"
# A tag that the scraper cut off at the end of the field, as in most titles of magazines.
_CUT_TAG = r"</?[A-Za-z][A-Za-z0-9]*\s+[A-Za-z-]+\s*=[^<>]*$|(?i)</?(?:a|b|br|div|i|img|li|p|span|table|td|tr|ul)\s*/?$"
_SCRIPT = r"\.getTime\(|P\.when\("
_BLANK = r"[\s\p{Cc}\x{200B}\x{FEFF}]+"
_USABLE = r"[\p{L}\p{N}]"


@dataclass(frozen=True)
class Metadata:
    """What the metadata say of a domain's items.

    Attributes:
        known: raw ids of the rated items that occur in the metadata.
        frame: `raw_item_id`, `title`, `text`, `image`, `image_url` (all String) of the wanted ones, once an item; of a
            user's own, of all.
        lines: lines or rows read.
        repeated: of these, the ones whose item had occurred before; the first line of an item counts.
    """

    known: pl.Series
    frame: pl.DataFrame
    lines: int
    repeated: int


@dataclass(frozen=True)
class OwnItems:
    """A user's own items, as they stand in the table, with the pictures found.

    Attributes:
        frame: `item_id`, those of `text`, `title`, `brand`, `description`, `categories` that there are, `image`,
            `image_url`; all String, but for the categories, which are lists.
        named: items that name a picture's path.
        missing: of these, the ones whose picture is not there.
    """

    frame: pl.DataFrame
    named: int
    missing: int


def read_metadata(path: Path, rated: pl.Series, wanted: pl.Series, hint: str) -> Metadata:
    """Read the metadata of a category: JSON lines, Python literals, or both; gzip or plain.

    Args:
        path: the file.
        rated: raw ids of all rated items.
        wanted: the ones whose text and image are needed.
        hint: what to do if the file is missing or damaged.

    Raises:
        DataError: missing, empty, not UTF-8, its gzip stream cut or damaged, or a line without an `asin` or that is
            no object; file and line are named.
    """
    seen: set[str] = set()
    needed = set(wanted)
    lines = 0
    frames: list[pl.DataFrame] = []
    texts = (ITEM_ID, TITLE, BRAND, DESCRIPTION, IMAGE, IMAGE_URL)
    schema: dict[str, pl.DataType] = {**dict.fromkeys(texts, pl.String()), CATEGORIES: pl.List(pl.String())}
    columns: tuple[list[Any], ...] = tuple([] for _ in schema)

    def flush() -> None:
        frames.append(pl.DataFrame(dict(zip(schema, columns, strict=True)), schema=schema))
        for column in columns:
            column.clear()

    for number, item in raw.objects(path, hint, literals=True):
        asin = raw.scalar(item.get("asin"))
        if asin is None or not asin.strip():
            raise DataError(f"{path}, line {number}: no asin", hint=hint)
        lines += 1
        # The first line of an item counts.
        if asin in needed and asin not in seen:
            addresses = (url for key in _AMAZON_IMAGES for url in raw.strings(item.get(key)) or ())
            fields = (
                *(raw.joined(item.get(name)) for name in (TITLE, BRAND, DESCRIPTION)),
                None,
                next((url for url in addresses if url.strip()), None),
                raw.strings(item.get("category")),
            )
            for column, field in zip(columns, (asin, *fields), strict=True):
                column.append(field)
            if len(columns[0]) == BATCH:
                flush()
        seen.add(asin)
    if not lines:
        raise DataError(f"{path} has no lines", hint=hint)
    flush()
    distinct = pl.Series(ITEM_ID, list(seen), pl.String)
    return Metadata(
        known=distinct.filter(distinct.is_in(rated.implode())),
        frame=with_texts(pl.concat(frames)),
        lines=lines,
        repeated=lines - len(seen),
    )


def read_own_items(path: Path, columns: Columns, workspace: Workspace) -> OwnItems:
    """Read a user's own items from csv, parquet or jsonl.

    A picture is a path relative to the folder of the table, or an address (http, https); one that is not there
    becomes null and is counted.

    Raises:
        DataError: missing, empty, unknown format, a column missing, an item without id, or an item id that occurs
            twice.
    """
    raw.require_file(path, "give the table of items with --items FILE")
    ours = {
        columns.item_id: ITEM_ID,
        columns.text: TEXT,
        columns.title: TITLE,
        columns.brand: BRAND,
        columns.description: DESCRIPTION,
        columns.image: IMAGE,
        columns.categories: CATEGORIES,
    }
    lines = None
    match format_of(path):
        case "csv":
            found = raw.first_record(path, _OWN_HINT)
            names = _present(path, found, ours)
            order = [names.get(name, f"{place}: {name}") for place, name in enumerate(found)]
            exprs = [pl.col(list(names.values()))]
            frame = raw.read_csv(path, order, exprs, {ITEM_ID: raw.a_name}, header=True, hint=_OWN_HINT)
        case "parquet":
            try:
                schema = pl.read_parquet_schema(path)
            except (pl.exceptions.PolarsError, OSError) as error:
                message = (str(error).splitlines() or [type(error).__name__])[0]
                raise DataError(f"{path}: cannot be read as Parquet ({message})", hint=_OWN_HINT) from error
            frame = read_parquet(path, _present(path, list(schema), ours), _OWN_HINT, ids=(ITEM_ID,))
        case "jsonl":
            frame = read_jsonl(path, ours, (TEXT, *MARKERS), _OWN_HINT)
            lines = frame[raw.LINE]
            # An object may lack any key: the columns there are those that some object has.
            there = [name for name, mine in ours.items() if frame[mine].null_count() < frame.height]
            frame = frame.select(_present(path, there, ours).values())
    frame = frame.with_columns(
        _as_names(kind) if name == CATEGORIES else _as_text(name, kind) for name, kind in frame.schema.items()
    )

    def place(row: int) -> str:
        if lines is not None:
            return f"line {lines[row]}"
        return f"row {row + 1}" if path.suffix != ".csv" else f"line {raw.csv_line(path, row, header=True, hint='')}"

    nameless = frame[ITEM_ID].fill_null("").str.strip_chars() == ""
    if nameless.any():
        raise DataError(f"{path}, {place(int(nameless.arg_max() or 0))}: no {ITEM_ID}", hint=_OWN_HINT)
    again = ~frame[ITEM_ID].is_first_distinct()
    if again.any():
        row = int(again.arg_max() or 0)
        name = frame[ITEM_ID][row]
        first = int((frame[ITEM_ID] == name).arg_max() or 0)
        raise DataError(
            f"{path}, {place(row)}: item id {name!r} occurs again (first in {place(first)}); "
            f"{int(again.sum())} such rows in all",
            hint="keep one row an item",
        )
    return _with_pictures(frame, path.parent, workspace)


def metadata_of_own(items: OwnItems, rated: pl.Series) -> Metadata:
    """A user's own items, rated or not, their texts cleaned."""
    frame = items.frame
    return Metadata(
        known=frame[ITEM_ID].filter(frame[ITEM_ID].is_in(rated.implode())),
        frame=with_texts(frame),
        lines=frame.height,
        repeated=0,
    )


def with_texts(frame: pl.DataFrame) -> pl.DataFrame:
    """Clean title, brand, description and text, and join what there is to one text an item.

    Args:
        frame: `item_id`, `image`, `image_url` and any of `text`, `title`, `brand`, `description` (all String).

    Returns:
        `raw_item_id`, `title`, `text`, `image`, `image_url` and, if there, `categories`. A usable text of the item's
        own is taken as it is, else the parts are joined (MARKERS); null where nothing usable remains.
    """
    parts = {name: clean(frame[name]) for name in (TEXT, *MARKERS) if name in frame.columns}
    title = parts.get(TITLE, pl.repeat(None, frame.height, dtype=pl.String, eager=True)).alias(TITLE)
    cleaned = pl.DataFrame({name: part.alias(name) for name, part in parts.items()})
    # Every part ends its sentence, so that the next marker does not run into it.
    ended = {
        name: pl.when(pl.col(name).str.contains(r"[.!?…:;,]$")).then(name).otherwise(pl.col(name) + ".")
        for name in parts
    }
    marked = [marker + ended[name] for name, marker in MARKERS.items() if name in parts]
    texts = [pl.col(TEXT)] if TEXT in parts else []
    if marked:
        joined = pl.concat_str(marked, separator=" ", ignore_nulls=True)
        texts.append(pl.when(joined != "").then(joined))
    text = cleaned.select(pl.coalesce(texts).alias(TEXT))[TEXT]
    kept = [frame[name] for name in (IMAGE, IMAGE_URL, CATEGORIES) if name in frame.columns]
    return pl.DataFrame([frame[ITEM_ID].alias(RAW_ITEM_ID), title, text, *kept])


def clean(texts: pl.Series) -> pl.Series:
    """Strip HTML and script debris, unescape entities, join white space; null where no letter or digit is left."""
    # Twice: descriptions hold escaped tags and entities escaped again (&amp;amp;).
    for _ in range(2):
        texts = _unescaped(texts)
    column = pl.col(texts.name)
    stripped = (
        column.str.replace_all(_UNSEEN, " ")
        .str.replace_all(_INLINE_TAG, "")
        .str.replace_all(_OTHER_TAG, " ")
        .str.replace_all(_CUT_TAG, " ")
        .str.replace_all(_BLANK, " ")
        .str.strip_chars()
    )
    usable = stripped.str.contains(_USABLE) & ~stripped.str.contains(_SCRIPT)
    return texts.to_frame().select(pl.when(usable).then(stripped).alias(texts.name)).to_series()


def _unescaped(texts: pl.Series) -> pl.Series:
    """Replace HTML entities; each distinct one is looked up once."""
    entities = texts.str.extract_all(_ENTITY).explode().drop_nulls().unique().sort()
    meanings = {entity: html.unescape(entity) for entity in entities}
    known = {entity: meaning for entity, meaning in meanings.items() if meaning != entity}
    return texts.str.replace_many(list(known), list(known.values())) if known else texts


def _present(path: Path, found: list[str], ours: dict[str, str]) -> dict[str, str]:
    """Those of our columns that the table has; it must have the id and something to read."""
    names = {name: mine for name, mine in ours.items() if name in found}
    required = {name: mine for name, mine in ours.items() if mine == ITEM_ID}
    if not {TEXT, *MARKERS} & set(names.values()):
        required |= {name: mine for name, mine in ours.items() if mine == TEXT}
    require_columns(path, found, required, _OWN_HINT)
    return names


def _as_text(name: str, kind: pl.DataType) -> pl.Expr:
    column = pl.col(name)
    if isinstance(kind, (pl.List, pl.Array)):
        return column.cast(pl.List(pl.String)).list.join(" ", ignore_nulls=True)
    return column.cast(pl.String)


def _as_names(kind: pl.DataType) -> pl.Expr:
    column = pl.col(CATEGORIES)
    if isinstance(kind, (pl.List, pl.Array)):
        names = column.cast(pl.List(pl.String))
    else:
        names = column.cast(pl.String).str.split("|")
    stripped = names.list.eval(pl.element().str.strip_chars().replace("", None).drop_nulls())
    return pl.when(stripped.list.len() > 0).then(stripped).alias(CATEGORIES)


def _with_pictures(frame: pl.DataFrame, folder: Path, workspace: Workspace) -> OwnItems:
    """Part addresses from paths, and keep the paths of files that are there."""
    if IMAGE not in frame.columns:
        frame = frame.with_columns(pl.lit(None, pl.String).alias(IMAGE))
    given = pl.col(IMAGE).str.strip_chars()
    is_url = given.str.contains(r"^(?i)https?://")
    frame = frame.with_columns(
        pl.when(is_url).then(given).alias(IMAGE_URL),
        pl.when(~is_url & (given != "")).then(given).alias(IMAGE),
    )
    paths = frame[IMAGE].drop_nulls()
    # Each folder is listed once, instead of asking for every file.
    files: dict[str, str] = {}
    for parent in paths.str.extract(r"^(.*/)?[^/]*$").fill_null("").unique().sort():
        where = (folder / parent).resolve()
        if where.is_dir():
            prefix = image_entry(workspace, where / "_").removesuffix("_")
            with os.scandir(where) as there:
                files |= {parent + entry.name: prefix + entry.name for entry in there if entry.is_file()}
    found = pl.DataFrame(
        {IMAGE: list(files), "entry": list(files.values())}, schema={IMAGE: pl.String, "entry": pl.String}
    )
    entries = frame.join(found, on=IMAGE, how="left", maintain_order="left")["entry"]
    frame = frame.with_columns(entries.alias(IMAGE))
    return OwnItems(frame, named=len(paths), missing=len(paths) - (len(entries) - entries.null_count()))
