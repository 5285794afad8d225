"""From the items table to a features file: encode texts and pictures, or take vectors that the user made.

Sizes: n items, B texts or pictures at once, F feature width.
"""

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmm4rec_cli.data.columns import IMAGE, ITEM_ID, TEXT
from mmm4rec_cli.data.images import UnreadableImage, decoding, open_image
from mmm4rec_cli.data.tables import Tables, read_tables
from mmm4rec_cli.errors import DataError, NetworkError, UsageError
from mmm4rec_cli.features.encoders import Encoder, ImageEncoder, Prepared, TextEncoder, load_encoder
from mmm4rec_cli.features.store import encoder_name, fingerprint, model_slug, read_features, write_features
from mmm4rec_cli.files import written_whole
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.settings.schema import FeatureSettings
from mmm4rec_cli.workspace import Workspace

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

_WHITE = "white"
"""Stands for the published stand-in where other pictures have the hash of their bytes."""


class _Column(NamedTuple):
    """What is to be encoded for one modality.

    Attributes:
        keys: [n] which of the distinct inputs an item has, None for none.
        inputs: the distinct inputs.
    """

    keys: list[str | None]
    inputs: dict[str, Any]


def extract_features(
    workspace: Workspace,
    domain: str,
    settings: FeatureSettings,
    device: str = "auto",
    reporter: Reporter | None = None,
) -> Path:
    """Encode the texts and pictures of a domain's items into `data/features/<domain>/<encoder>.parquet`.

    Equal texts and equal files are encoded once. Pictures that cannot be read are null (or the white picture, with
    `features.fallback = published`), counted, and listed with the reason in `<encoder>.log` beside the file. A file
    of the same encoder, catalogue, texts and pictures is kept.

    Args:
        workspace: where.
        domain: a domain that has tables.
        settings: which encoder, and how.
        device: auto, cpu, cuda or cuda:N.
        reporter: hears of progress, counts and speed.

    Returns:
        The features file.

    Raises:
        DataError: the domain has no tables; a model's folder is not one; a vector does not fit `features.dtype`.
        UsageError: no such encoder.
        DeviceError: no such device, or out of its memory.
        NetworkError: the model is not on the disk and the hub does not answer.
    """
    reporter = reporter or SilentReporter()
    tables = read_tables(workspace, domain)
    path = workspace.features(domain, encoder_name(settings))
    existing = _existing(path, tables)
    if existing is not None and existing["identity"].get("kind") == "imported":
        reporter.note(f"{path}: vectors of your own for this catalogue, kept (delete the file to encode anew)")
        return path
    paths = [None if path is None else workspace.root / path for path in tables.items[IMAGE].to_pylist()]
    texts = _texts(tables.items[TEXT].to_pylist(), tables.raw_item_ids, settings)
    images, unreadable = _images(paths, settings)
    inputs = _inputs_hash(texts, images, settings)
    same_inputs = existing is not None and existing["source"].get("inputs") == inputs
    try:
        encoder = load_encoder(settings, device, reporter)
    except NetworkError as error:
        if not same_inputs:
            raise
        reporter.warn(f"{path} kept, without a look at its encoder: {error}")
        return path
    if existing is not None and same_inputs and existing["fingerprint"] == fingerprint(encoder.identity):
        reporter.note(f"{path}: features of these items by this encoder are there already, kept")
        return path
    text, has_text = _encoded_texts(encoder.text, texts, settings.batch_size, reporter)
    image, has_image = _encoded_images(encoder.image, images, settings, unreadable, reporter)
    source = {
        "models": encoder.models,
        "inputs": inputs,
        "fallback": settings.fallback,
        "items": tables.n_items,
        "with_text": int(has_text.sum()),
        "with_image": int(has_image.sum()),
        "unreadable_images": len(unreadable),
    }
    write_features(
        path,
        text=text,
        has_text=has_text,
        image=image,
        has_image=has_image,
        encoder=encoder.name,
        identity=encoder.identity,
        catalogue=tables.catalogue,
        source=source,
        dtype=settings.dtype,
    )
    _log(path.with_suffix(".log"), unreadable, tables, reporter)
    reporter.note(
        f"{path}: {tables.n_items} items, {source['with_text']} with text ({text.shape[1]} wide), "
        f"{source['with_image']} with image ({image.shape[1]} wide)"
    )
    return path


def encode_items(
    encoder: Encoder,
    raw_item_ids: Sequence[str],
    texts: Sequence[str | None],
    images: Sequence[Path | None],
    settings: FeatureSettings,
    reporter: Reporter,
) -> tuple[tuple[Floats, Mask], tuple[Floats, Mask]]:
    """Text and image vectors [n, F] of items and their presence [n], made as `extract_features` makes them."""
    columns, unreadable = _images(images, settings)
    text = _encoded_texts(encoder.text, _texts(texts, raw_item_ids, settings), settings.batch_size, reporter)
    image = _encoded_images(encoder.image, columns, settings, unreadable, reporter)
    if unreadable:
        first = next(iter(unreadable.values())).replace("\t", ": ")
        reporter.warn(f"{len(unreadable)} pictures are missing or cannot be read, for example {first}")
    return text, image


def _existing(path: Path, tables: Tables) -> dict[str, Any] | None:
    """The metadata of a sound features file of this catalogue, if there is one."""
    try:
        return read_features(path, tables.catalogue, tables.n_items).metadata
    except DataError:
        return None


def _texts(given: Sequence[str | None], raw_item_ids: Sequence[str], settings: FeatureSettings) -> _Column:
    texts = [text if text and text.strip() else None for text in given]
    if settings.fallback == "published":
        texts = [text or raw for text, raw in zip(texts, raw_item_ids, strict=True)]
    # by length, so that the texts of a batch need little padding
    distinct = sorted({text for text in texts if text is not None}, key=lambda text: (len(text), text))
    return _Column(texts, {text: text for text in distinct})


def _images(paths: Sequence[Path | None], settings: FeatureSettings) -> tuple[_Column, dict[int, str]]:
    """The distinct picture files by the hash of their bytes, and by item index those that are not there."""
    with ThreadPoolExecutor(_threads()) as pool:
        hashes = list(pool.map(_bytes_hash, paths))
    missing = {
        index: f"{path}\tno such file"
        for index, (path, key) in enumerate(zip(paths, hashes, strict=True))
        if path is not None and key is None
    }
    distinct: dict[str, Any] = {}
    for path, key in zip(paths, hashes, strict=True):
        if key is not None:
            distinct.setdefault(key, path)
    if settings.fallback == "published":
        hashes = [key or _WHITE for key in hashes]
        if _WHITE in hashes:
            distinct[_WHITE] = None
    return _Column(hashes, distinct), missing


def _bytes_hash(path: Path | None) -> str | None:
    try:
        return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _inputs_hash(texts: _Column, images: _Column, settings: FeatureSettings) -> str:
    """Changes whenever the features would, for one encoder."""
    document = json.dumps([texts.keys, images.keys, settings.fallback, settings.dtype])
    return hashlib.sha256(document.encode()).hexdigest()


def _threads() -> int:
    return min(16, os.cpu_count() or 1)


def _batches(jobs: Iterable[_Job], size: int) -> Iterator[list[_Job]]:
    rest = iter(jobs)
    while batch := list(islice(rest, size)):
        yield batch


def _ahead(work: Callable[[_Job], _Result], jobs: Iterable[_Job], most: int) -> Iterator[_Result]:
    """Results in the order of the jobs; threads work up to `most` jobs ahead of whoever takes them."""
    with ThreadPoolExecutor(_threads()) as pool:
        waiting: deque[Future[_Result]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(work, job))
                if len(waiting) >= most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _encoded_texts(encoder: TextEncoder, column: _Column, size: int, reporter: Reporter) -> tuple[Floats, Mask]:
    rows: dict[str, Floats] = {}
    started = time.perf_counter()
    with reporter.stage("texts", len(column.inputs), "texts") as progress:
        for batch in _batches(column.inputs, size):
            rows.update(zip(batch, encoder.texts(batch), strict=True))
            progress.advance(len(batch))
    _say_speed(reporter, "texts", len(rows), time.perf_counter() - started)
    width = len(next(iter(rows.values()))) if rows else encoder.texts(["text"]).shape[1]
    return _spread(column.keys, rows, width)


def _encoded_images(
    encoder: ImageEncoder, column: _Column, settings: FeatureSettings, unreadable: dict[int, str], reporter: Reporter
) -> tuple[Floats, Mask]:
    """Encode the distinct pictures; those that cannot be decoded are added to `unreadable`."""

    def prepare(job: tuple[str, Path | None]) -> tuple[str, Prepared | str]:
        key, path = job
        try:
            image = Image.new("RGB", (200, 200), "white") if path is None else open_image(path)
            return key, encoder.prepare(image)
        except (UnreadableImage, ValueError) as error:
            return key, f"{path}\t{error}"

    rows: dict[str, Floats] = {}
    failed: dict[str, str] = {}
    started = time.perf_counter()
    prepared = _ahead(prepare, column.inputs.items(), 4 * max(settings.batch_size, _threads()))
    with decoding(), reporter.stage("images", len(column.inputs), "images") as progress:
        for batch in _batches(prepared, settings.batch_size):
            good = [(key, result) for key, result in batch if not isinstance(result, str)]
            failed |= {key: result for key, result in batch if isinstance(result, str)}
            if good:
                vectors = encoder.images([result for _, result in good])
                rows.update((key, vector) for (key, _), vector in zip(good, vectors, strict=True))
            progress.advance(len(batch), f"{len(failed)} unreadable" if failed else "")
    _say_speed(reporter, "images", len(rows), time.perf_counter() - started)
    unreadable |= {index: failed[key] for index, key in enumerate(column.keys) if key in failed}
    white = None
    if not rows or (failed and settings.fallback == "published"):
        white = encoder.images([encoder.prepare(Image.new("RGB", (200, 200), "white"))])[0]
    if white is not None and settings.fallback == "published":
        rows.update(dict.fromkeys(failed, white))
    width = len(next(iter(rows.values()))) if white is None else len(white)
    return _spread(column.keys, rows, width)


def _say_speed(reporter: Reporter, what: str, count: int, seconds: float) -> None:
    if count:
        reporter.note(f"{count} distinct {what} encoded in {seconds:.1f} s ({count / max(seconds, 1e-9):.0f} a second)")


def _spread(keys: Sequence[str | None], rows: dict[str, Floats], width: int) -> tuple[Floats, Mask]:
    """Vectors [n, F] and their presence [n]; a vector of zeros says nothing and counts as none."""
    vectors = np.zeros((len(keys), width), dtype=np.float32)
    for index, key in enumerate(keys):
        if key is not None and key in rows:
            vectors[index] = rows[key]
    present: Mask = np.any(vectors, axis=1)
    return vectors, present


def _log(path: Path, unreadable: dict[int, str], tables: Tables, reporter: Reporter) -> None:
    if not unreadable:
        path.unlink(missing_ok=True)
        return
    with written_whole(path) as part:
        lines = [f"{tables.raw_item_ids[index]}\t{why}\n" for index, why in sorted(unreadable.items())]
        part.write_text("".join(lines), encoding="utf-8")
    reporter.warn(f"{len(unreadable)} pictures are missing or cannot be read; they are listed in {path}")


def import_features(workspace: Workspace, domain: str, file: Path, name: str, reporter: Reporter | None = None) -> Path:
    """Take vectors that the user made as `data/features/<domain>/<name>.parquet`.

    The file is Parquet or JSON lines (`.jsonl`, `.ndjson`, `.json`) with the columns `item_id` (raw ids), `text` and
    `image` (lists of numbers, null where missing); one of `text` and `image` may be left out. Vectors are stored as
    float32 (float16 stays float16) and not normalised. The encoder's identity is its name and its widths: files of one
    encoder for several domains are to be given the same name.

    Args:
        workspace: where.
        domain: a domain that has tables.
        file: the user's file.
        name: name of the encoder.
        reporter: hears how many items got vectors.

    Returns:
        The features file.

    Raises:
        DataError: the file is missing, damaged, lacks columns, has uneven widths, numbers that are not finite, ids
            that are null or twice there, or no item of the domain.
        UsageError: the name cannot be a file's.
    """
    reporter = reporter or SilentReporter()
    if not name or model_slug(name) != name:
        raise UsageError(f"{name!r} cannot name features", hint="take letters, digits, dots, - and _ for --encoder")
    tables = read_tables(workspace, domain)
    given = _read_own(file)
    ids = _raw_ids(given, file, reporter)
    place = {raw: row for row, raw in enumerate(ids)}
    rows = np.fromiter((place.get(raw, -1) for raw in tables.raw_item_ids), dtype=np.int64, count=tables.n_items)
    found = rows >= 0
    if not found.any():
        raise DataError(
            f"{file}: none of its {len(ids)} ids is one of the {tables.n_items} items of {domain} "
            f"(there: {ids[0]!r}, here: {tables.raw_item_ids[0]!r})",
            hint="item_id must hold the raw ids of the interactions",
        )
    columns = {kind: _vectors(given, kind, file, ids) for kind in (TEXT, IMAGE)}
    stored: dict[str, tuple[npt.NDArray[Any], Mask]] = {}
    for kind, (vectors, present) in columns.items():
        has = found & present[rows]
        stored[kind] = np.where(has[:, None], vectors[rows], 0), has
    half = all(given.schema.field(kind).type.value_type == pa.float16() for kind in (TEXT, IMAGE) if _has(given, kind))
    (text, has_text), (image, has_image) = stored[TEXT], stored[IMAGE]
    counts = {
        "items": tables.n_items,
        "without_row": int((~found).sum()),
        "rows_of_other_items": len(ids) - int(found.sum()),
        "with_text": int(has_text.sum()),
        "with_image": int(has_image.sum()),
    }
    path = workspace.features(domain, name)
    write_features(
        path,
        text=text,
        has_text=has_text,
        image=image,
        has_image=has_image,
        encoder=name,
        identity={"kind": "imported", "name": name, "text": text.shape[1], "image": image.shape[1]},
        catalogue=tables.catalogue,
        source={"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), **counts},
        dtype="float16" if half else "float32",
    )
    if counts["without_row"]:
        reporter.warn(f"{counts['without_row']} of {tables.n_items} items have no row in {file}: they get no vectors")
    if counts["rows_of_other_items"]:
        reporter.note(
            f"{counts['rows_of_other_items']} of {len(ids)} rows of {file} are of no item of {domain}: left out"
        )
    reporter.note(
        f"{path}: {tables.n_items} items, {counts['with_text']} with text ({text.shape[1]} wide), "
        f"{counts['with_image']} with image ({image.shape[1]} wide)"
    )
    return path


def own_vectors(file: Path, reporter: Reporter) -> tuple[list[str], tuple[Floats, Mask], tuple[Floats, Mask]]:
    """Raw ids, text and image vectors of a file as `import_features` takes it, whatever the catalogue.

    Raises:
        DataError: as `import_features`.
    """
    given = _read_own(file)
    ids = _raw_ids(given, file, reporter)
    text, image = (_vectors(given, kind, file, ids) for kind in (TEXT, IMAGE))
    return ids, text, image


def _has(table: pa.Table, kind: str) -> bool:
    return kind in table.schema.names and table[kind].null_count < table.num_rows


def _read_json_lines(file: Path) -> pa.Table:
    """JSON lines with the ids as they are written: left alone, the reader would see dates in some of them."""
    import pyarrow.json as pa_json

    numbers = pa.list_(pa.float64())

    def read(ids: pa.DataType) -> pa.Table:
        schema = pa.schema([(ITEM_ID, ids), (TEXT, numbers), (IMAGE, numbers)])
        return pa_json.read_json(file, parse_options=pa_json.ParseOptions(explicit_schema=schema))

    try:
        return read(pa.string())
    except pa.ArrowInvalid as as_text:
        try:
            return read(pa.int64())
        except pa.ArrowInvalid:
            raise as_text from None


def _read_own(file: Path) -> pa.Table:
    """The user's table, its vectors as lists; columns that are nobody's business are dropped."""
    hint = "give a Parquet or JSON lines file with item_id, text and image (lists of numbers, null where missing)"
    if not file.is_file():
        raise DataError(f"{file}: no such file", hint=hint)
    try:
        if file.suffix.lower() in {".jsonl", ".ndjson", ".json"}:
            table = _read_json_lines(file)
        else:
            table = pq.read_table(file, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file}: cannot be read ({reason})", hint=hint) from None
    names = table.schema.names
    problems = [f"{file}: no column {ITEM_ID}"] if ITEM_ID not in names else []
    problems += [f"{file}: {count} columns are called {name}" for name in names if (count := names.count(name)) > 1]
    if not (_has(table, TEXT) or _has(table, IMAGE)):
        problems.append(f"{file}: no vectors, neither in {TEXT} nor in {IMAGE}")
    for kind in (TEXT, IMAGE):
        form = table.schema.field(kind).type if kind in names and names.count(kind) == 1 else pa.null()
        if form != pa.null() and not _lists_of_numbers(form):
            problems.append(f"{file}: column {kind} is {form}, not lists of numbers")
    if table.num_rows == 0:
        problems.append(f"{file}: no rows")
    if problems:
        raise DataError(*dict.fromkeys(problems), hint=hint)
    return table


def _lists_of_numbers(form: Any) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_list(form) for is_list in lists):
        return False
    return bool(pa.types.is_floating(form.value_type) or pa.types.is_integer(form.value_type))


def _raw_ids(table: pa.Table, file: Path, reporter: Reporter) -> list[str]:
    column = table[ITEM_ID]
    if column.null_count:
        raise DataError(f"{file}: {column.null_count} rows have no {ITEM_ID}", hint="give every row its raw item id")
    if pa.types.is_integer(column.type):
        reporter.note(f"{file}: {ITEM_ID} holds integers; they are taken as text ({str(column[0].as_py())!r}, …)")
        column = column.cast(pa.string())
    elif not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise DataError(f"{file}: {ITEM_ID} is {column.type}, not text", hint="write raw item ids as strings")
    ids: list[str] = column.to_pylist()
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(raw for raw in ids if raw in seen or seen.add(raw))  # type: ignore[func-returns-value]
        raise DataError(
            f"{file}: {len(ids) - len(set(ids))} rows repeat an {ITEM_ID}, {twice!r} the first",
            hint="keep one row an item",
        )
    return ids


def _vectors(table: pa.Table, kind: str, file: Path, ids: list[str]) -> tuple[npt.NDArray[Any], Mask]:
    """Vectors float32 [rows, F] and their presence [rows]; a modality that no row has is one zero wide."""
    nothing = np.zeros((table.num_rows, 1), dtype=np.float32), np.zeros(table.num_rows, dtype=np.bool_)
    if not _has(table, kind):
        return nothing
    column = table[kind].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    present: Mask = column.is_valid().to_numpy(zero_copy_only=False)
    if not present.any():
        return nothing
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).drop_null().to_numpy(zero_copy_only=False)
    width = int(np.bincount(lengths).argmax())
    odd = np.flatnonzero(lengths != width)
    if len(odd) or not width:
        where = ids[np.flatnonzero(present)[odd[0]]] if len(odd) else ids[np.flatnonzero(present)[0]]
        raise DataError(
            f"{file}: column {kind} has vectors of different widths, or empty ones: {len(odd) or len(lengths)} are not "
            f"{width or 'at least 1'} wide, that of item {where!r} the first",
            hint="give every vector of a column the same width, null where there is none",
        )
    flat = column.flatten()
    with np.errstate(over="ignore"):  # what overflows is found and said below
        values = flat.to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, width)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if flat.null_count or len(bad):
        raise DataError(
            f"{file}: column {kind} has {len(bad)} vectors with NaN, infinite or missing numbers, that of item "
            f"{ids[np.flatnonzero(present)[bad[0]]]!r} the first",
            hint="mend these vectors, or write null for items that have none",
        )
    vectors = np.zeros((table.num_rows, width), dtype=np.float32)
    vectors[present] = values
    return vectors, present
