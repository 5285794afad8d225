"""Interactions: read, cleaned in the published order, brought into order (paper section 5.1; published behaviour)."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from mmm4rec_cli.data import raw
from mmm4rec_cli.data.columns import CATEGORIES, ITEM_ID, TIMESTAMP, USER_ID
from mmm4rec_cli.errors import DataError
from mmm4rec_cli.settings.schema import Columns

Unit = Literal["auto", "s", "ms", "iso"]

LATEST = 4_102_444_800
"""2100-01-01 in Unix seconds: what lies beyond is no time in seconds."""

AMAZON_COLUMNS = (ITEM_ID, USER_ID, "rating", TIMESTAMP)
"""The columns of Amazon's ratings files, which have no header."""

BATCH = 1 << 16
"""Objects that are held as Python values before they become a frame."""

_ISO = (
    r"^\s*(?P<date>\d{4}-\d{2}-\d{2})"
    r"(?:[T ](?P<hour>\d{2}):(?P<minute>\d{2})(?::(?P<second>\d{2})(?:[.,](?P<fraction>\d{1,9}))?)?"
    r"\s*(?P<zone>Z|[+-]\d{2}(?::?\d{2})?)?)?\s*$"
)
_AMAZON_HINT = "fetch the file anew, or mend or remove that line"
_OWN_HINT = "mend the table, or name its columns with --set data.columns.user_id=NAME (item_id, timestamp alike)"


@dataclass(frozen=True)
class Log:
    """Interactions in the order of the raw file; n rows.

    Attributes:
        user: uint32 [n], index into `users`.
        item: uint32 [n], index into `items`.
        time: int64 [n], time since 1970 in `ticks` a second.
        rating: float64 [n], used for nothing but telling exact duplicates; None if the source has none.
        users: raw user ids, each once, in any order; some may have no rows.
        items: raw item ids, likewise.
        ticks: 1 (seconds) or 1000 (milliseconds).
    """

    user: npt.NDArray[np.uint32]
    item: npt.NDArray[np.uint32]
    time: npt.NDArray[np.int64]
    rating: npt.NDArray[np.float64] | None
    users: pl.Series
    items: pl.Series
    ticks: int = 1

    def __len__(self) -> int:
        return len(self.user)

    def rows(self, which: npt.NDArray[Any]) -> "Log":
        """The rows that a mask or an index array names."""
        rating = None if self.rating is None else self.rating[which]
        return replace(self, user=self.user[which], item=self.item[which], time=self.time[which], rating=rating)

    def counts(self) -> dict[str, int]:
        """Users, items and rows."""
        users = np.count_nonzero(np.bincount(self.user, minlength=1))
        items = np.count_nonzero(np.bincount(self.item, minlength=1))
        return {"users": int(users), "items": int(items), "rows": len(self)}

    def item_names(self) -> pl.Series:
        """The raw ids of the items that have rows."""
        return self.items.filter(pl.Series(np.bincount(self.item, minlength=len(self.items)) > 0))


def read_ratings(path: Path, hint: str) -> Log:
    """Read a ratings file of Amazon Review 2018: `item,user,rating,timestamp` without a header, times in seconds.

    Args:
        path: the file.
        hint: what to do if it is not there.

    Raises:
        DataError: missing, empty, not UTF-8, or a row is broken; the first one is named.
    """
    raw.require_file(path, hint)
    frame = _read_csv(path, AMAZON_COLUMNS, {"rating": raw.a_number, TIMESTAMP: raw.whole_seconds}, _AMAZON_HINT)
    time = frame[TIMESTAMP].cast(pl.Int64).to_numpy()
    locate = _csv_locator(path, header=False)
    _check_range(time, 1, path, locate, _AMAZON_HINT, mixed=False)
    return _log(frame, time, 1, path, locate, _AMAZON_HINT)


def read_own_interactions(path: Path, columns: Columns, unit: Unit) -> tuple[Log, list[str]]:
    """Read a user's own interactions from csv, parquet or jsonl.

    Args:
        path: the file; its ending tells the format.
        columns: the names of its columns. A CSV file without them whose rows look like Amazon's is read as such.
        unit: unit of the times, or "auto": milliseconds if the median is beyond the year 2100 in seconds; ISO 8601
            dates if the values are no numbers (without a zone: UTC).

    Returns:
        The interactions, and what was found out about the file, one line each.

    Raises:
        DataError: missing, empty, unknown format, a column missing, or a row broken; the first one is named.
    """
    raw.require_file(path, "give the table of interactions with --interactions FILE")
    names = {columns.user_id: USER_ID, columns.item_id: ITEM_ID, columns.timestamp: TIMESTAMP}
    notes: list[str] = []
    match format_of(path):
        case "csv":
            first = raw.first_record(path, _OWN_HINT)
            header = not (set(names) - set(first)) or not _looks_amazon(first)
            if header:
                require_columns(path, first, names, _OWN_HINT)
                order = [names.get(name, f"{place}: {name}") for place, name in enumerate(first)]
                checks: dict[str, raw.Check] = {TIMESTAMP: _a_time}
            else:
                notes.append(f"{path}: no header; read in Amazon's order item,user,rating,timestamp")
                order, checks = list(AMAZON_COLUMNS), {"rating": raw.a_number, TIMESTAMP: _a_time}
            frame = _read_csv(path, order, checks, _OWN_HINT, header=header)
            locate = _csv_locator(path, header=header)
        case "parquet":
            frame = read_parquet(path, names, _OWN_HINT, ids=(USER_ID, ITEM_ID))
            locate = _row_name
        case "jsonl":
            frame = read_jsonl(path, names, (), _OWN_HINT)
            locate = _line_locator(frame[raw.LINE])
    for name in (USER_ID, ITEM_ID, TIMESTAMP):
        missing = frame[name].is_null()
        if missing.any():
            raise DataError(f"{path}, {locate(int(missing.arg_max() or 0))}: no {name}", hint=_OWN_HINT)
    time, ticks, what = _times(frame[TIMESTAMP], unit, path, locate)
    notes.append(f"{path}: timestamps read as {what}")
    return _log(frame, time, ticks, path, locate, _OWN_HINT), notes


def format_of(path: Path) -> Literal["csv", "parquet", "jsonl"]:
    """The format that a file's ending stands for; DataError for an unknown one."""
    match path.suffix.lower():
        case ".csv":
            return "csv"
        case ".parquet" | ".pq":
            return "parquet"
        case ".jsonl" | ".ndjson":
            return "jsonl"
    raise DataError(f"{path}: unknown format {path.suffix!r}", hint="give a .csv, .parquet or .jsonl file")


def require_columns(path: Path, found: Sequence[str], names: dict[str, str], hint: str) -> None:
    """Raise DataError if a column of `names` (name in the file -> our name) is not among those found, or is twice."""
    problems = [
        f"{path}: column {name!r} ({ours}) is missing; found {', '.join(map(repr, found))}"
        for name, ours in names.items()
        if name not in found
    ]
    problems += [f"{path}, line 1: column {name!r} occurs twice" for name in names if list(found).count(name) > 1]
    if problems:
        raise DataError(*problems, hint=hint)


def read_parquet(path: Path, names: dict[str, str], hint: str, *, ids: Sequence[str]) -> pl.DataFrame:
    """Read columns of a Parquet file under our names; ids become strings.

    Raises:
        DataError: not Parquet, a column missing, or ids that are neither strings nor whole numbers.
    """
    try:
        found = pl.read_parquet_schema(path)
        require_columns(path, list(found), names, hint)
        frame = pl.read_parquet(path, columns=list(names)).rename(names)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({_first_line(error)})", hint=hint) from error
    if not frame.height:
        raise DataError(f"{path} has no rows", hint=hint)
    for name in ids:
        kind = frame.schema[name]
        if not (kind.is_integer() or kind in (pl.String, pl.Categorical, pl.Enum)):
            raise DataError(f"{path}: {name} is {kind}, not a string or a whole number", hint=hint)
    return frame.with_columns(pl.col(*ids).cast(pl.String))


def read_jsonl(path: Path, names: dict[str, str], texts: Sequence[str], hint: str) -> pl.DataFrame:
    """Read fields of a file with one JSON object a line under our names, as strings.

    Those of `texts` may be lists of strings, which are joined; `categories` becomes a list of strings; a list or an
    object anywhere else counts as nothing.

    Returns:
        The fields and `line`, the number of the line.

    Raises:
        DataError: a line is no JSON object, or no line has a field.
    """
    schema: dict[str, Any] = {raw.LINE: pl.UInt32} | dict.fromkeys(names.values(), pl.String)
    read: dict[str, Callable[[Any], Any]]
    read = {ours: raw.joined if ours in texts else raw.scalar for ours in names.values()}
    if CATEGORIES in read:
        schema[CATEGORIES], read[CATEGORIES] = pl.List(pl.String), raw.names
    objects = raw.objects(path, hint, literals=False)
    frames = []
    while batch := list(itertools.islice(objects, BATCH)):
        columns: dict[str, list[Any]] = {raw.LINE: [number for number, _ in batch]}
        for name, ours in names.items():
            columns[ours] = [read[ours](value.get(name)) for _, value in batch]
        frames.append(pl.DataFrame(columns, schema=schema))
    if not frames:
        raise DataError(f"{path} has no rows", hint=hint)
    return pl.concat(frames)


def drop_exact_duplicates(log: Log) -> Log:
    """Keep the first of rows that agree in user, item, rating and time."""
    # An exact duplicate is a repeated pair, and few pairs repeat: only those rows are compared in full.
    pair = pl.Series("pair", _pairs(log))
    ascending = np.sort(pair.to_numpy())
    twice = ascending[1:][ascending[1:] == ascending[:-1]]
    del ascending
    candidates = np.flatnonzero(pair.is_in(pl.Series(twice).unique().implode()).to_numpy())
    again = log.rows(candidates)
    columns = {"pair": pair.gather(candidates), "time": again.time, "row": candidates}
    if again.rating is not None:
        columns["rating"] = again.rating
    same = [name for name in columns if name != "row"]
    firsts = pl.DataFrame(columns).unique(subset=same, keep="first", maintain_order=True)["row"].to_numpy()
    keep = np.ones(len(log), dtype=bool)
    keep[candidates] = False
    keep[firsts] = True
    return log if keep.all() else log.rows(keep)


def keep_items(log: Log, names: pl.Series) -> Log:
    """Keep the rows whose item is among `names`."""
    known = log.items.is_in(names.unique().implode()).to_numpy()
    return log.rows(known[log.item])


def k_core(log: Log, min_user: int, min_item: int) -> tuple[Log, int]:
    """Drop rows of users and items that have too few, in rounds, until nothing changes.

    A round counts users and items first and then drops every row with either count too small at once (published
    behaviour, spec 7.2). Rows are counted, not distinct pairs.

    Returns:
        The rows left, and the number of rounds that dropped some.
    """
    rounds = 0
    while len(log):
        keep = np.bincount(log.user)[log.user] >= min_user
        keep &= np.bincount(log.item)[log.item] >= min_item
        if keep.all():
            break
        log = log.rows(keep)
        rounds += 1
    return log, rounds


def without_idle_names(log: Log) -> Log:
    """Forget the names of users and items that have no rows."""
    for names, codes in (("users", "user"), ("items", "item")):
        code, known = getattr(log, codes), getattr(log, names)
        kept = np.flatnonzero(np.bincount(code, minlength=len(known)))
        if len(kept) < len(known):
            log = replace(log, **{codes: _places(kept, len(known))[code], names: known.gather(kept)})
    return log


def in_order(log: Log) -> Log:
    """Number the users and items that are left by their raw ids, and sort by user, then time, then file order."""
    log = without_idle_names(log)
    # Polars sorts by UTF-8 bytes, which is by code point.
    by_user, by_item = log.users.arg_sort().to_numpy(), log.items.arg_sort().to_numpy()
    log = replace(
        log,
        user=_places(by_user, len(by_user))[log.user],
        item=_places(by_item, len(by_item))[log.item],
        users=log.users.gather(by_user),
        items=log.items.gather(by_item),
    )
    frame = pl.DataFrame({"user": log.user, "time": log.time}).with_row_index("row")
    return log.rows(frame.sort("user", "time", "row")["row"].to_numpy())


def with_prefix(log: Log, prefix: str) -> Log:
    """Put `prefix` before every raw id."""
    return replace(log, users=prefix + log.users, items=prefix + log.items)


def concatenated(logs: Sequence[Log]) -> Log:
    """One log of several that share no user and no item."""
    first_user = np.cumsum([0, *(len(log.users) for log in logs)], dtype=np.uint32)
    first_item = np.cumsum([0, *(len(log.items) for log in logs)], dtype=np.uint32)
    ticks = max(log.ticks for log in logs)
    return Log(
        user=np.concatenate([log.user + first for log, first in zip(logs, first_user, strict=False)]),
        item=np.concatenate([log.item + first for log, first in zip(logs, first_item, strict=False)]),
        time=np.concatenate([log.time * (ticks // log.ticks) for log in logs]),
        rating=None,
        users=pl.concat([log.users for log in logs]),
        items=pl.concat([log.items for log in logs]),
        ticks=ticks,
    )


def tied_rows(log: Log) -> int:
    """Rows that have their time, in whole seconds, in common with another row of the same user."""
    if not len(log):
        return 0
    # Seconds before the year 2100 fit 32 bits.
    moment = np.sort(log.user.astype(np.uint64) << np.uint64(32) | (log.time // log.ticks).astype(np.uint64))
    same = moment[1:] == moment[:-1]
    return int(np.count_nonzero(np.append(same, False) | np.append(False, same)))


def repeated_pairs(log: Log) -> int:
    """Rows beyond the first of their (user, item) pair."""
    pair = np.sort(_pairs(log))
    return int(np.count_nonzero(pair[1:] == pair[:-1]))


def _pairs(log: Log) -> npt.NDArray[np.uint64]:
    """A number [n] for each row's user and item."""
    return log.user.astype(np.uint64) << np.uint64(32) | log.item


def _places(order: npt.NDArray[Any], size: int) -> npt.NDArray[np.uint32]:
    """The place in `order` of each of `size` codes; zero for those that do not occur there."""
    places = np.zeros(size, np.uint32)
    places[order] = np.arange(len(order), dtype=np.uint32)
    return places


def _read_csv(
    path: Path, columns: Sequence[str], checks: dict[str, raw.Check], hint: str, *, header: bool = False
) -> pl.DataFrame:
    """Read ids as categories, the rating as a number and the time as it stands; refuse broken rows."""
    whole = checks[TIMESTAMP] is raw.whole_seconds
    exprs = [
        pl.col(USER_ID, ITEM_ID).cast(pl.Categorical),
        pl.col(TIMESTAMP).cast(pl.Int64, strict=False) if whole else pl.col(TIMESTAMP),
    ]
    if "rating" in checks:
        exprs.append(pl.col("rating").cast(pl.Float64, strict=False))
    checks = {USER_ID: raw.a_name, ITEM_ID: raw.a_name} | checks
    return raw.read_csv(path, columns, exprs, checks, header=header, hint=hint)


def _log(
    frame: pl.DataFrame,
    time: npt.NDArray[np.int64],
    ticks: int,
    path: Path,
    locate: Callable[[int], str],
    hint: str,
) -> Log:
    users, user = _coded(frame[USER_ID], path, locate, hint)
    items, item = _coded(frame[ITEM_ID], path, locate, hint)
    rating = frame["rating"].to_numpy() if "rating" in frame.columns else None
    return Log(user, item, time, rating, users, items, ticks)


def _coded(
    ids: pl.Series, path: Path, locate: Callable[[int], str], hint: str
) -> tuple[pl.Series, npt.NDArray[np.uint32]]:
    """Distinct ids, and each row's place among them."""
    categories = ids.cast(pl.Categorical)
    distinct = categories.unique()
    names = distinct.cast(pl.String).alias("name")
    physical = distinct.to_physical().to_numpy()
    codes = _places(physical, int(physical.max()) + 1)[categories.to_physical().to_numpy()]
    for faulty, fault in (
        (names.str.strip_chars() == "", "is empty"),
        (names.str.contains("\0", literal=True), "holds a NUL byte"),
    ):
        if faulty.any():
            row = int(np.flatnonzero(faulty.to_numpy()[codes])[0])
            raise DataError(f"{path}, {locate(row)}: {ids.name} {fault}", hint=hint)
    return names, codes


def _looks_amazon(record: Sequence[str]) -> bool:
    return len(record) == 4 and raw.a_number(record[2]) is None and _a_time(record[3]) is None


def _a_time(field: str) -> str | None:
    """Check of a time: a number, or an ISO 8601 date."""
    if raw.a_number(field) is None or _iso_milliseconds(pl.Series([field]))[0] is not None:
        return None
    return f"{field!r} is neither a number nor an ISO 8601 date" if field.strip() else "is empty"


def _times(
    column: pl.Series, unit: Unit, path: Path, locate: Callable[[int], str]
) -> tuple[npt.NDArray[np.int64], int, str]:
    """A user's time column (no nulls) as integers, ticks a second, and in words."""

    def refuse(faulty: pl.Series, fault: str) -> None:
        if faulty.any():
            row = int(faulty.arg_max() or 0)
            raise DataError(f"{path}, {locate(row)}: timestamp {column[row]!r} {fault}", hint=_OWN_HINT)

    if column.dtype in (pl.Datetime, pl.Date):
        dates = column.cast(pl.Datetime("ms", getattr(column.dtype, "time_zone", None))).dt.epoch("ms")
        return _as_dates(dates, path, locate)
    if column.dtype.is_numeric():
        if unit == "iso":
            raise DataError(
                f"{path}: timestamp is {column.dtype}, not ISO 8601 dates", hint="set data.timestamp_unit=auto"
            )
        refuse(~column.is_finite(), "is not a number")
        return _as_numbers(column, unit, path, locate)
    if column.dtype not in (pl.String, pl.Categorical, pl.Enum):
        raise DataError(f"{path}: timestamp is {column.dtype}, neither numbers nor dates", hint=_OWN_HINT)

    text = column.cast(pl.String).str.strip_chars()
    if unit != "iso":
        whole = text.cast(pl.Int64, strict=False)
        if not whole.null_count():
            return _as_numbers(whole, unit, path, locate)
    real = text.cast(pl.Float64, strict=False)
    is_number = real.is_finite().fill_null(value=False)
    if unit in ("s", "ms"):
        refuse(~is_number, "is not a number")
    if unit != "iso" and is_number.all():
        return _as_numbers(real, unit, path, locate)
    dates = _iso_milliseconds(text)
    if unit == "auto":
        refuse(dates.is_null() & ~is_number, "is neither a number nor an ISO 8601 date")
        # Both kinds occur: the rarer one is at fault.
        if 2 * int(is_number.sum()) > len(column):
            refuse(~is_number, "is a date, most others are numbers")
        refuse(is_number, "is a number, most others are dates")
    refuse(dates.is_null(), "is not an ISO 8601 date")
    return _as_dates(dates, path, locate)


def _as_dates(values: pl.Series, path: Path, locate: Callable[[int], str]) -> tuple[npt.NDArray[np.int64], int, str]:
    time = values.to_numpy()
    _check_range(time, 1000, path, locate, _OWN_HINT, mixed=False)
    return time, 1000, "dates (UTC where no zone is given)"


def _as_numbers(
    values: pl.Series, unit: Unit, path: Path, locate: Callable[[int], str]
) -> tuple[npt.NDArray[np.int64], int, str]:
    """Numbers (finite, no nulls) as integers; fractions of a second are kept for the order, as milliseconds."""
    numbers = values.to_numpy()
    milliseconds = unit == "ms" or (unit == "auto" and bool(np.quantile(numbers, 0.5, method="lower") > LATEST))
    _check_range(numbers, 1000 if milliseconds else 1, path, locate, _OWN_HINT, mixed=unit == "auto")
    if milliseconds and unit == "auto":
        early = numbers <= LATEST
        if early.any():
            row = int(early.argmax())
            raise DataError(
                f"{path}, {locate(row)}: timestamp {numbers[row]} looks like seconds, most others like milliseconds",
                hint="use one unit for the whole column, or set data.timestamp_unit=ms",
            )
    if milliseconds or np.array_equal(numbers, np.floor(numbers)):
        ticks, said = (1000, "milliseconds") if milliseconds else (1, "seconds")
        return np.floor(numbers).astype(np.int64), ticks, said
    return np.floor(numbers * 1000).astype(np.int64), 1000, "seconds"


def _check_range(
    time: npt.NDArray[Any], ticks: int, path: Path, locate: Callable[[int], str], hint: str, *, mixed: bool
) -> None:
    """Refuse times before 1970 and after 2099."""
    early, late = time < 0, time > LATEST * ticks
    if early.any():
        row = int(early.argmax())
        raise DataError(f"{path}, {locate(row)}: timestamp {time[row]} is negative (before 1970)", hint=hint)
    if late.any():
        row = int(late.argmax())
        if mixed and ticks == 1:
            raise DataError(
                f"{path}, {locate(row)}: timestamp {time[row]} looks like milliseconds, most others like seconds",
                hint="use one unit for the whole column",
            )
        unit = "seconds" if ticks == 1 else "milliseconds"
        raise DataError(f"{path}, {locate(row)}: timestamp {time[row]} is after the year 2099 in {unit}", hint=hint)


def _iso_milliseconds(text: pl.Series) -> pl.Series:
    """ISO 8601 dates as milliseconds since 1970, null where a text is none; without a zone: UTC."""
    part = pl.col("part").struct.field

    def number(name: str) -> pl.Expr:
        return part(name).cast(pl.Int64, strict=False).fill_null(0)

    zone = part("zone").str.replace(":", "").fill_null("Z")
    minutes = (
        pl.when(zone == "Z")
        .then(0)
        .otherwise(
            zone.str.slice(1, 2).cast(pl.Int64, strict=False) * 60
            + zone.str.slice(3, 2).cast(pl.Int64, strict=False).fill_null(0)
        )
    )
    offset = pl.when(zone.str.starts_with("-")).then(-minutes).otherwise(minutes)
    milliseconds = part("fraction").fill_null("0").str.pad_end(3, "0").str.slice(0, 3).cast(pl.Int64, strict=False)
    valid = (number("hour") < 24) & (number("minute") < 60) & (number("second") <= 60)
    days = part("date").str.to_date("%Y-%m-%d", strict=False).dt.epoch("d").cast(pl.Int64)
    seconds = (days * 24 + number("hour")) * 3600 + (number("minute") - offset) * 60 + number("second")
    frame = pl.DataFrame({"part": text.cast(pl.String).str.extract_groups(_ISO)})
    return frame.select(pl.when(valid).then(seconds * 1000 + milliseconds).alias("time")).to_series()


def _csv_locator(path: Path, *, header: bool) -> Callable[[int], str]:
    return lambda row: f"line {raw.csv_line(path, row, header=header, hint=_OWN_HINT)}"


def _line_locator(numbers: pl.Series) -> Callable[[int], str]:
    return lambda row: f"line {numbers[row]}"


def _row_name(row: int) -> str:
    return f"row {row + 1}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
