"""Parsers of raw files: CSV rows and lines of JSON, with the file, the line and the fault in every complaint.

CSV is read by Polars; only when it refuses a file are the rows looked at one by one, to name the first broken one.
Lines of objects are read by orjson; what it refuses may be JSON of Python's kind (NaN) or, in metadata, one of the
Python literals of older dumps (`ast.literal_eval`, never `eval`).
"""

import ast
import csv
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import orjson
import polars as pl
import pyarrow as pa

from mmm4rec_cli.errors import DataError

LINE = "line"
"""Column with the number of the line a row came from, counted from 1."""

_PIECE_BYTES = 1 << 23
_LONGEST_LINE = 1 << 26
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
    plan = pl.scan_csv(path, has_header=False, skip_rows=int(header), schema=schema)
    try:
        frame = plan.select(*exprs, pl.col(columns[-1]).is_not_null().alias(last)).collect(engine="streaming")
    except pl.exceptions.PolarsError as error:
        if not _rows_sound(path, columns, checks, header=header, hint=hint):
            raise DataError(f"{path} has no rows", hint=hint) from None
        raise DataError(f"{path}: cannot be read as CSV ({str(error).splitlines()[0]})", hint=hint) from error
    # Polars fills short rows with nulls, so that a null in the last column may mean one.
    if not frame[last].all() or any(frame[name].null_count() for name in checks):
        _rows_sound(path, columns, checks, header=header, hint=hint)
        # All is null only in blank lines.
        there = plan.select(pl.any_horizontal(pl.all().is_not_null()).alias("there")).collect(engine="streaming")
        frame = frame.filter(there["there"])
        for name in checks:
            if frame[name].null_count():
                line = csv_line(path, int(frame[name].is_null().arg_max() or 0), header=header, hint=hint)
                raise DataError(f"{path}, line {line}: {name} cannot be read", hint=hint)
    if not frame.height:
        raise DataError(f"{path} has no rows", hint=hint)
    return frame.drop(last)


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


def objects(path: Path, hint: str, *, literals: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file that holds one a line, plain or gzip (told by its first bytes), blank lines left out.

    Args:
        path: the file.
        hint: what to do about a broken file.
        literals: whether lines may be Python literals instead of JSON.

    Yields:
        The line's number, from 1, and its object.

    Raises:
        DataError: the file is missing, empty, not UTF-8, its gzip stream is cut, damaged or none at all, or a line is
            no object or longer than 64 MiB.
    """
    number = 0
    for piece in _pieces(path, hint):
        for line in piece.split(b"\n"):
            number += 1
            try:
                value = orjson.loads(line)
            except orjson.JSONDecodeError:
                text = _text(line, number, path, hint)
                if not text:
                    continue
                value = _object(text, literals)
            if not isinstance(value, dict):
                kind = "neither a JSON object nor a Python dictionary" if literals else "not a JSON object"
                said = _text(line, number, path, hint)[:60]
                raise DataError(f"{path}, line {number}: {kind}: {said!r}", hint=hint)
            yield number, value


def _text(line: bytes, number: int, path: Path, hint: str) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 ({error.reason})", hint=hint) from error
    return (text.removeprefix("\ufeff") if number == 1 else text).strip()


def _pieces(path: Path, hint: str) -> Iterator[bytes]:
    """Large pieces of a file, plain or gzip, cut behind a line's end, the end itself left out.

    The next piece is read and unpacked in a thread, so that the memory held is a few pieces whatever the file unpacks
    to.
    """
    require_file(path, hint)
    rest, number = b"", 1
    with ExitStack() as closing:
        packed = closing.enter_context(path.open("rb")).read(2) == _GZIP_MAGIC
        if not packed and path.suffix == ".gz":
            raise DataError(f"{path}: not a gzip file, in spite of its name", hint=hint)
        stream = closing.enter_context(pa.input_stream(str(path), compression="gzip" if packed else None))
        ahead = closing.enter_context(ThreadPoolExecutor(1))
        coming = ahead.submit(stream.read, _PIECE_BYTES)
        while True:
            try:
                piece = coming.result()
            except OSError as error:
                if "Truncated" in str(error):
                    size = path.stat().st_size
                    raise DataError(f"{path}: its gzip stream is cut off after {size:,} bytes", hint=hint) from None
                where = number + rest.count(b"\n")
                raise DataError(
                    f"{path}: its gzip stream is damaged behind line {where} ({error})", hint=hint
                ) from error
            if not piece:
                break
            coming = ahead.submit(stream.read, _PIECE_BYTES)
            head, newline, tail = piece.rpartition(b"\n")
            if newline:
                yield rest + head
                number += rest.count(b"\n") + head.count(b"\n") + 1
                rest = tail
            else:
                rest += piece
            if len(rest) > _LONGEST_LINE:
                raise DataError(f"{path}, line {number}: longer than {_LONGEST_LINE >> 20} MiB", hint=hint)
        if rest:
            yield rest


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


def scalar(value: Any) -> str | None:
    """A text, number or truth value as a string, numbers by their digits; None for anything else.

    A whole number beyond 64 bits is read as a real one that lacks digits, which would make one id of several: None too.
    """
    if isinstance(value, (list, tuple, dict)) or (isinstance(value, float) and 2**63 <= abs(value) < math.inf):
        return None
    return _string(value)


def strings(value: Any) -> list[str] | None:
    """The texts of a list, or of a lone value; None where there is none at all."""
    if isinstance(value, (list, tuple)):
        return [text for part in value if (text := scalar(part)) is not None]
    text = scalar(value)
    return None if text is None else [text]


def names(value: Any) -> list[str] | None:
    """The texts of a list, or the parts of a lone one between |; None where there is none at all."""
    return value.split("|") if isinstance(value, str) else strings(value)


def joined(value: Any) -> str | None:
    """The texts of a list, or a lone one, with spaces between them; None where there is none at all."""
    if isinstance(value, str):
        return _string(value)
    parts = strings(value)
    return None if parts is None else " ".join(parts)


def _string(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    # Half a surrogate pair, as JSON may escape it, is no text.
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
