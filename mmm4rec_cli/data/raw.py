"""Parsers of raw files: CSV rows and lines of JSON, with the file, the line and the fault in every complaint.

Files are read by Polars in large pieces. Only when a piece is refused are its lines looked at one by one: to name the
first broken one, or, in metadata, to read the Python literals of older dumps (`ast.literal_eval`, never `eval`).
"""

import ast
import csv
import gzip
import itertools
import json
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import polars as pl

from mmm4rec_cli.errors import DataError

LINE = "line"
"""Column with the number of the line a row came from, counted from 1."""

_PIECE_BYTES = 1 << 25
_GZIP_MAGIC = b"\x1f\x8b"

Check = Callable[[str], str | None]
"""Takes a field, gives what is wrong with it or None."""


def require_file(path: Path, hint: str) -> None:
    """Raise DataError unless `path` is a file with something in it."""
    if not path.is_file():
        raise DataError(f"{path} is missing" if not path.exists() else f"{path} is not a file", hint=hint)
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty", hint=hint)


def first_record(path: Path, hint: str) -> list[str]:
    """The fields of a CSV file's first row; DataError if there is none."""
    for record, _ in _records(path, hint):
        return record
    raise DataError(f"{path} has no rows", hint=hint)


def read_csv(
    path: Path,
    columns: Sequence[str],
    exprs: Sequence[pl.Expr],
    checks: dict[str, Check],
    *,
    header: bool,
    hint: str,
) -> pl.DataFrame:
    """Read some columns of a CSV file: UTF-8, comma, optional double quotes; blank lines are left out.

    Args:
        path: the file.
        columns: the names of all its columns, in order.
        exprs: what to make of its columns, all strings; evaluated in Polars' streaming engine, row order is kept.
        checks: what the fields of a column must fulfil; `exprs` give null, under the column's name, where they do not.
        header: whether the first row holds the names.
        hint: what to do about a broken file.

    Raises:
        DataError: a row is broken (the first one is named), the file is not UTF-8, or it has no rows.
    """
    last = "the last field is there"
    schema = dict.fromkeys(columns, pl.String)
    plan = pl.scan_csv(path, has_header=False, skip_rows=int(header), schema=schema).select(
        *exprs, pl.col(columns[-1]).is_not_null().alias(last), pl.any_horizontal(pl.all().is_not_null()).alias("any")
    )
    try:
        frame = plan.collect(engine="streaming")
    except pl.exceptions.PolarsError as error:
        if not _rows_sound(path, columns, checks, header=header, hint=hint):
            raise DataError(f"{path} has no rows", hint=hint) from None
        raise DataError(f"{path}: cannot be read as CSV ({str(error).splitlines()[0]})", hint=hint) from error
    # Polars fills short rows with nulls, so that a null in the last column may mean one.
    if not frame[last].all() or any(frame[name].null_count() for name in checks):
        _rows_sound(path, columns, checks, header=header, hint=hint)
        frame = frame.filter("any")
        for name in checks:
            if frame[name].null_count():
                line = csv_line(path, int(frame[name].is_null().arg_max() or 0), header=header, hint=hint)
                raise DataError(f"{path}, line {line}: {name} cannot be read", hint=hint)
    if not frame.height:
        raise DataError(f"{path} has no rows", hint=hint)
    return frame.drop(last, "any")


def _rows_sound(path: Path, columns: Sequence[str], checks: dict[str, Check], *, header: bool, hint: str) -> int:
    """Count the rows of a CSV file one by one, and raise DataError at the first broken one."""
    rows = 0
    places = {name: columns.index(name) for name in checks}
    for record, line in itertools.islice(_records(path, hint), int(header), None):
        if len(record) != len(columns):
            raise DataError(
                f"{path}, line {line}: {len(record)} fields instead of {len(columns)} ({','.join(columns)})", hint=hint
            )
        for name, check in checks.items():
            fault = check(record[places[name]])
            if fault:
                raise DataError(f"{path}, line {line}: {name} {fault}", hint=hint)
        rows += 1
    return rows


def csv_line(path: Path, row: int, *, header: bool, hint: str) -> int:
    """The line on which row `row` (from 0, blank lines not counted) of a CSV file ends."""
    return next(itertools.islice(_records(path, hint), row + int(header), None))[1]


def _records(path: Path, hint: str) -> Iterator[tuple[list[str], int]]:
    """The rows of a CSV file with their line numbers, blank lines left out."""

    def lines() -> Iterator[str]:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason})", hint=hint) from error
                yield text.removeprefix("\ufeff") if number == 1 else text

    reader = csv.reader(lines(), strict=True)
    try:
        for record in reader:
            if record:
                yield record, reader.line_num
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV ({error})", hint=hint) from error


def a_name(field: str) -> str | None:
    """Check of an id: not empty."""
    return None if field.strip() else "is empty"


def a_number(field: str) -> str | None:
    """Check of a rating: a number."""
    try:
        float(field)
    except ValueError:
        return f"{field!r} is not a number" if field.strip() else "is empty"
    return None


def whole_seconds(field: str) -> str | None:
    """Check of a time stamp in Amazon's files: whole Unix seconds."""
    try:
        seconds = int(field)
    except ValueError:
        return f"{field!r} is not a whole number of seconds" if field.strip() else "is empty"
    return None if abs(seconds) < 2**63 else f"{field} is out of range"


def line_batches(path: Path, hint: str) -> Iterator[pl.DataFrame]:
    """The lines of a text file, plain or gzip (told by its first bytes), a large piece at a time.

    Yields:
        `line` (UInt32, from 1) and `text` (String), blank lines left out.

    Raises:
        DataError: the file is missing, empty, not UTF-8, or its gzip stream is cut, damaged or none at all.
    """
    require_file(path, hint)
    rest, number = b"", 1
    with ExitStack() as closing:
        stream: Any = closing.enter_context(path.open("rb"))
        if stream.read(2) == _GZIP_MAGIC:
            stream = closing.enter_context(gzip.open(path))
        elif path.suffix == ".gz":
            raise DataError(f"{path}: not a gzip file, in spite of its name", hint=hint)
        else:
            stream.seek(0)
        while True:
            try:
                piece = stream.read(_PIECE_BYTES)
            except EOFError:
                size = path.stat().st_size
                raise DataError(f"{path}: its gzip stream is cut off after {size:,} bytes", hint=hint) from None
            except (gzip.BadGzipFile, zlib.error) as error:
                where = number + rest.count(b"\n")
                raise DataError(
                    f"{path}: its gzip stream is damaged behind line {where} ({error})", hint=hint
                ) from error
            whole, newline, tail = (rest + piece).rpartition(b"\n") if piece else (rest, b"", b"")
            rest = tail
            if whole:
                yield _lines(whole, number, path, hint)
            number += whole.count(b"\n") + len(newline)
            if not piece:
                return


def _lines(whole: bytes, first: int, path: Path, hint: str) -> pl.DataFrame:
    try:
        text = whole.decode()
    except UnicodeDecodeError as error:
        number = first + whole[: error.start].count(b"\n")
        raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason})", hint=hint) from error
    text = text.removeprefix("\ufeff") if first == 1 else text
    lines = pl.Series("text", [text]).str.split("\n").explode().str.strip_chars()
    return lines.to_frame().with_row_index(LINE, offset=first).filter(pl.col("text") != "")


def decoded(batch: pl.DataFrame, fields: dict[str, Any], *, literals: bool, path: Path, hint: str) -> pl.DataFrame:
    """Decode lines that hold one object each.

    Args:
        batch: rows of `line_batches`.
        fields: name -> pl.String or pl.List(pl.String); numbers become their digits, a lone string a list of one.
        literals: whether lines may be Python literals instead of JSON.
        path: the file, for complaints.
        hint: what to do about a broken line.

    Returns:
        `line` and the fields, null where the object lacks them; rows in order.

    Raises:
        DataError: a line is neither.
    """
    dtype = pl.Struct(fields)
    is_literal = batch["text"].str.contains(r"^\{\s*'") if literals else pl.repeat(False, batch.height, eager=True)
    parts = [_decoded_json(batch.filter(~is_literal), dtype, literals, path, hint)]
    if is_literal.any():
        parts.append(_decoded_singly(batch.filter(is_literal), dtype, literals, path, hint))
    return pl.concat(parts).sort(LINE)


def _decoded_json(batch: pl.DataFrame, dtype: pl.Struct, literals: bool, path: Path, hint: str) -> pl.DataFrame:
    """Decode with Polars; where it refuses, halve until the refused lines are found."""
    try:
        values = batch["text"].str.json_decode(dtype)
        if len(values) == batch.height:
            return pl.DataFrame([batch[LINE], values.alias("value")]).unnest("value")
    except pl.exceptions.PolarsError:
        pass
    if batch.height <= 32:
        return _decoded_singly(batch, dtype, literals, path, hint)
    half = batch.height // 2
    pieces = (batch.head(half), batch.slice(half))
    return pl.concat([_decoded_json(piece, dtype, literals, path, hint) for piece in pieces])


def _decoded_singly(batch: pl.DataFrame, dtype: pl.Struct, literals: bool, path: Path, hint: str) -> pl.DataFrame:
    schema = dtype.to_schema()
    rows: list[dict[str, Any]] = []
    for number, text in batch.iter_rows():
        value = _object(text, literals)
        if value is None:
            kind = "neither a JSON object nor a Python dictionary" if literals else "not a JSON object"
            raise DataError(f"{path}, line {number}: {kind}: {text[:60]!r}", hint=hint)
        row = {name: _strings(value.get(name), whole=kind == pl.String) for name, kind in schema.items()}
        rows.append({LINE: number} | row)
    return pl.DataFrame(rows, schema={LINE: pl.UInt32} | dict(schema))


def _object(text: str, literals: bool) -> dict[str, Any] | None:
    """The dictionary that a line holds, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if not literals:
            return None
        try:
            with warnings.catch_warnings():
                # Old dumps hold backslashes that Python warns of as invalid escapes; they stay as they are.
                warnings.simplefilter("ignore")
                value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _strings(value: Any, *, whole: bool) -> Any:
    """A value as a string (`whole`) or a list of strings, None where it is neither."""
    if whole:
        parts = _strings(value, whole=False)
        return None if parts is None else " ".join(part for part in parts if part is not None)
    if isinstance(value, (list, tuple)):
        return [None if isinstance(part, (list, tuple, dict)) else _string(part) for part in value]
    return None if value is None or isinstance(value, dict) else [_string(value)]


def _string(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    # Half a surrogate pair, as JSON may escape it, is no text.
    return text.encode("utf-8", "replace").decode()
