"""Files around recommendations: who asks, which items may be answered, and the answers. All of them are streamed."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from mmm4rec_cli.data.columns import ITEM_ID
from mmm4rec_cli.errors import DataError, UsageError
from mmm4rec_cli.evaluation.recommend import SCHEMA, Asked
from mmm4rec_cli.files import written_whole

_ROWS = 1024
SUFFIXES = (".parquet", ".csv", ".jsonl")
_ASKED_HINT = "give .csv, .parquet or .jsonl with a column `user`, or `history` (raw item ids) and optionally `times`"


def check_suffix(path: Path) -> None:
    """Raise UsageError unless recommendations can be written under that name."""
    if path.suffix not in SUFFIXES:
        raise UsageError(
            f"{path}: format {path.suffix or 'without suffix'!r} is not known", hint="use " + ", ".join(SUFFIXES)
        )


@contextmanager
def recommendation_file(path: Path) -> Iterator[Callable[[pa.Table], None]]:
    """Give a function that appends tables of `SCHEMA`; the file is there, whole, when the block has succeeded.

    Raises:
        UsageError: no such format.
    """
    check_suffix(path)
    with written_whole(path) as part, ExitStack() as stack:
        if path.suffix == ".jsonl":
            stream = stack.enter_context(part.open("w", encoding="utf-8"))

            def write(table: pa.Table) -> None:
                stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())

            yield write
        else:
            open_file = pq.ParquetWriter if path.suffix == ".parquet" else pa_csv.CSVWriter
            yield stack.enter_context(open_file(part, SCHEMA)).write_table


def read_ids(path: Path) -> list[str]:
    """Raw item ids: one a line, or the column `item_id` of a .csv or .parquet file.

    Raises:
        DataError: missing, unreadable, or without ids.
    """
    hint = f"give raw item ids, one a line, or .csv or .parquet with a column `{ITEM_ID}`"
    if path.suffix in (".csv", ".parquet"):
        ids = [str(row[ITEM_ID]) for _, row in _rows(path, (ITEM_ID,), hint) if row.get(ITEM_ID) is not None]
    else:
        ids = [line.strip() for line in _lines(path, hint) if line.strip()]
    if not ids:
        raise DataError(f"{path}: no item ids", hint=hint)
    return ids


def read_asked(path: Path) -> Iterator[Asked]:
    """Who asks, row by row.

    Raises:
        DataError: missing, unreadable, without the columns, or a row that says nothing.
    """
    for place, row in _rows(path, ("user", "history", "times"), _ASKED_HINT):
        user, history, times = row.get("user"), row.get("history"), row.get("times")
        if user is None and history is None:
            raise DataError(f"{place}: neither user nor history", hint=_ASKED_HINT)
        try:
            moments = None if times is None else [int(time) for time in _listed(times)]
        except (ValueError, TypeError):
            raise DataError(f"{place}: times are Unix seconds, got {times!r}", hint=_ASKED_HINT) from None
        items = None if history is None else [str(item) for item in _listed(history)]
        yield Asked(None if user is None else str(user), items, moments or None, place)


def _listed(value: Any) -> list[Any]:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else list(value)


def _rows(path: Path, wanted: tuple[str, ...], hint: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with their place; of csv every value is text, an empty one is null."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(_lines(path, hint), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}, line {number}: {error}", hint=hint) from None
                if not isinstance(row, dict):
                    raise DataError(f"{path}, line {number}: not an object", hint=hint)
                yield f"{path}, line {number}", row
        return
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown format", hint=hint)
    try:
        with ExitStack() as stack:
            if path.suffix == ".parquet":
                file = stack.enter_context(pq.ParquetFile(path))
                names, batches = file.schema_arrow.names, file.iter_batches(8192, columns=list(wanted))
            else:
                texts = pa_csv.ConvertOptions(
                    column_types=dict.fromkeys(wanted, pa.string()), strings_can_be_null=True, null_values=[""]
                )
                batches = stack.enter_context(pa_csv.open_csv(path, convert_options=texts))
                names = batches.schema.names
            if not {"user", "history", ITEM_ID} & set(names) & set(wanted):
                raise DataError(f"{path}: no column {' or '.join(wanted[:2])}", hint=hint)
            number = 0
            for batch in batches:
                # As Python objects rows are large: of a batch of the reader's size only a part at a time.
                for begin in range(0, len(batch), _ROWS):
                    for row in batch.slice(begin, _ROWS).to_pylist():
                        number += 1
                        yield f"{path}, row {number}", row
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", hint=hint) from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]})", hint=hint) from None


def _lines(path: Path, hint: str) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            yield from stream
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})", hint=hint) from None
