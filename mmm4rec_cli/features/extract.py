"""From the items table to a features file: encode texts and pictures, or take vectors that the user made.

Sizes: n items, B texts or pictures at once, F feature width.
"""

import hashlib
import json
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mmm4rec_cli.data.columns import IMAGE, ITEM_ID, TEXT
from mmm4rec_cli.data.tables import catalogue_fingerprint, read_tables
from mmm4rec_cli.errors import DataError, NetworkError, UsageError
from mmm4rec_cli.features.encoders import Encoder, load_encoder
from mmm4rec_cli.features.parts import (
    Encoded,
    Known,
    OpenPart,
    Plan,
    Shard,
    copied,
    made_by,
    merged_identity,
    width_of,
    write_part,
)
from mmm4rec_cli.features.prepare import Job, Ready, cores, n_processes, prepared
from mmm4rec_cli.features.store import (
    Side,
    encoder_name,
    features_command,
    features_file,
    fingerprint,
    known_keys,
    model_slug,
    read_metadata,
    write_features,
)
from mmm4rec_cli.files import written_whole
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.settings.schema import FeatureSettings
from mmm4rec_cli.workspace import Workspace

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Engine = Literal["local", "ray"]

_WHITE = hashlib.sha256(b"the published stand-in: a white picture").digest()
"""Stands for the published stand-in where other pictures have the hash of their bytes."""
_SLICE = 4096
"""Items joined at once."""
_SIDES: tuple[Side, Side] = ("text", "image")


class _Column(NamedTuple):
    """What is to be encoded for one modality.

    Attributes:
        keys: [n] SHA-256 of the input that an item has, None for none.
        inputs: the distinct inputs by their key.
    """

    keys: list[bytes | None]
    inputs: dict[bytes, Any]


def extract_features(
    workspace: Workspace,
    domain: str,
    settings: FeatureSettings,
    device: str = "auto",
    reporter: Reporter | None = None,
    *,
    engine: Engine = "local",
    shard: Shard | None = None,
    merge: bool = False,
) -> Path | None:
    """Encode the texts and pictures of a domain's items into `data/features/<domain>/<encoder>.parquet`.

    Equal texts and equal files are encoded once. Pictures that cannot be read are null (or the white picture, with
    `features.fallback = published`), counted, and listed with the reason in `<encoder>.log` beside the file. A file
    of the same encoder, catalogue, texts and pictures is kept; of another, what has not changed is taken over.

    Args:
        workspace: where.
        domain: a domain that has tables.
        settings: which encoder, and how.
        device: auto, cpu, cuda or cuda:N.
        reporter: hears of progress, counts and speed.
        engine: this process and its workers, or Ray Data.
        shard: encode this share of the parts, and join nothing.
        merge: encode nothing, join the parts of all shards.

    Returns:
        The features file; None for a shard.

    Raises:
        DataError: the domain has no tables; a model's folder is not one; a vector does not fit `features.dtype`; with
            `merge`, parts are missing or come from different encoders.
        UsageError: no such encoder.
        DeviceError: no such device, or out of its memory.
        NetworkError: the model is not on the disk and the hub does not answer.
    """
    reporter = reporter or SilentReporter()
    tables = read_tables(workspace, domain)
    path = workspace.features(domain, encoder_name(settings))
    existing = _existing(path)
    if existing is not None and existing["identity"].get("kind") == "imported":
        if existing["catalogue"] == tables.catalogue:
            reporter.note(f"{path}: vectors of your own for this catalogue, kept (delete the file to encode anew)")
            return path
        existing = None
    return encode_catalogue(
        path,
        tables.raw_item_ids,
        tables.items[TEXT].to_pylist(),
        [None if path is None else workspace.root / path for path in tables.items[IMAGE].to_pylist()],
        settings,
        device,
        reporter,
        existing=None if existing is None else path,
        command=features_command(workspace, domain, settings),
        engine=engine,
        shard=shard,
        merge=merge,
    )


def encode_catalogue(
    path: Path,
    raw_item_ids: Sequence[str],
    texts: Sequence[str | None],
    images: Sequence[Path | None],
    settings: FeatureSettings,
    device: str = "auto",
    reporter: Reporter | None = None,
    *,
    existing: Path | None = None,
    command: str = "mmm4rec preprocess",
    engine: Engine = "local",
    shard: Shard | None = None,
    merge: bool = False,
) -> Path | None:
    """Encode a catalogue, given as columns, into the features file `path`; see `extract_features`.

    Vectors that `existing` holds of the same texts and picture bytes, by the same model and preparation, are taken over
    and not made again: where a catalogue grew, only the new items cost anything. Nothing is read at `path` unless it
    is named as `existing`, and `existing` stays as it is unless it is `path`.

    Parts that are not joined yet lie in the folder `<encoder>.parts` beside `path`; the same call goes on from them.

    Args:
        path: where to.
        raw_item_ids: [n] in the order of the item ids.
        texts: [n], None where an item has none.
        images: [n] files, None where an item has none.
        settings: which encoder, and how.
        device: auto, cpu, cuda or cuda:N.
        reporter: hears of progress, counts and speed.
        existing: a features file whose vectors can be taken over.
        command: the command line that makes this file, for hints.
        engine: as in `extract_features`, like the others.
        shard: encode this share of the parts, and join nothing.
        merge: encode nothing, join the parts of all shards.

    Returns:
        `path`; None for a shard.

    Raises:
        As `extract_features`.
    """
    reporter = reporter or SilentReporter()
    pictures, missing = _images(images, settings)
    columns: dict[Side, _Column] = {"text": _texts(texts, raw_item_ids, settings), "image": pictures}
    inputs = _inputs_hash(columns, settings)
    catalogue = catalogue_fingerprint(raw_item_ids)
    before = None if existing is None else _existing(existing)
    same = before is not None and before["catalogue"] == catalogue and before["source"].get("inputs") == inputs
    if same and shard is None and existing == path:
        kept = _kept(path, before, settings, device, reporter, merge)
        if isinstance(kept, Path):
            return kept
    else:
        kept = None
    folder = path.with_suffix(".parts")
    loaded = None if merge else kept or load_encoder(settings, device, reporter)
    identity = None if loaded is None else loaded.identity

    def plan(side: Side, known: set[bytes]) -> Plan:
        keys = [key for key in columns[side].inputs if key not in known]
        return Plan(side, keys, [columns[side].inputs[key] for key in keys], settings.part_size)

    old = _reusable(existing, before, identity, columns, settings)
    plans = {side: plan(side, old[side]) for side in _SIDES}
    if loaded is None:
        # what the shards took over depends on who encoded, which only their parts can say
        for side in _SIDES:
            if not _complete(plans[side], folder):
                old[side] = set()
                plans[side] = plan(side, set())
        identity, models = merged_identity(plans.values(), folder, command)
        checked = _reusable(existing, before, identity, columns, settings)
        if any(old[side] - checked[side] for side in _SIDES):
            raise DataError(
                f"{existing}: made by another encoder than the parts in {folder}",
                hint=f"delete {existing} and run every shard again",
            )
    else:
        models = loaded.models
        _encode_missing(loaded, plans, folder, settings, device, reporter, engine, shard)
        if shard is not None:
            counts = ", ".join(f"{len(plans[side].share(shard))} of {plans[side].n_parts} {side}" for side in _SIDES)
            reporter.note(f"shard {shard}: {counts} parts are in {folder}; when all shards are done: {command} --merge")
            return None
    assert identity is not None
    known = {side: Known(width_of(plans[side].path(folder, 0))) for side in _SIDES}
    for side in _SIDES:
        for part in range(plans[side].n_parts):
            known[side].add(plans[side].path(folder, part))
        if old[side] and existing is not None:
            for copy in copied(existing, side, old[side] & set(columns[side].inputs), folder):
                known[side].add(copy)
    unreadable = dict(missing)
    for index, key in enumerate(columns["image"].keys):
        if key is not None and (why := known["image"].why(key)) is not None:
            unreadable[index] = why
    counts_of = _join(path, raw_item_ids, columns, known, settings, identity, models, inputs, catalogue, unreadable)
    _log(path.with_suffix(".log"), unreadable, raw_item_ids, reporter)
    shutil.rmtree(folder, ignore_errors=True)
    taken = {side: len(old[side] & set(columns[side].inputs)) for side in _SIDES}
    if any(taken.values()):
        reporter.note(f"taken over from the features before: {taken['text']} texts, {taken['image']} pictures")
    reporter.note(
        f"{path}: {len(raw_item_ids)} items, {counts_of['text']} with text ({known['text'].width} wide), "
        f"{counts_of['image']} with image ({known['image'].width} wide)"
    )
    return path


def _kept(
    path: Path,
    before: Mapping[str, Any] | None,
    settings: FeatureSettings,
    device: str,
    reporter: Reporter,
    merge: bool,
) -> Path | Encoder | None:
    """The features file of the same inputs if its encoder is the same too; else the encoder."""
    assert before is not None
    if merge:
        if not path.with_suffix(".parts").is_dir():
            reporter.note(f"{path}: the parts were joined already, kept")
            return path
        return None
    try:
        encoder = load_encoder(settings, device, reporter)
    except NetworkError as error:
        reporter.warn(f"{path} kept, without a look at its encoder: {error}")
        return path
    if before["fingerprint"] == fingerprint(encoder.identity):
        reporter.note(f"{path}: features of these items by this encoder are there already, kept")
        return path
    return encoder


def _existing(path: Path) -> dict[str, Any] | None:
    """The metadata of a sound features file, if there is one."""
    try:
        document = read_metadata(path)
        with pq.ParquetFile(path) as file:
            return document if file.metadata.num_rows else None
    except (DataError, pa.ArrowException, OSError):
        return None


def _reusable(
    existing: Path | None,
    before: Mapping[str, Any] | None,
    identity: Mapping[str, Any] | None,
    columns: Mapping[Side, _Column],
    settings: FeatureSettings,
) -> dict[Side, set[bytes]]:
    """The inputs whose vectors a features file holds, by side; `identity` None asks nothing of the encoder."""
    found: dict[Side, set[bytes]] = {"text": set(), "image": set()}
    if (
        existing is None
        or before is None
        or before["source"].get("dtype", "float32") not in {"float32", settings.dtype}
    ):
        return found
    for side in _SIDES:
        if identity is None or before["identity"].get(side) == identity[side]:
            found[side] = known_keys(existing, side) & set(columns[side].inputs)
    return found


def _complete(plan: Plan, folder: Path) -> bool:
    return all(plan.path(folder, part).is_file() for part in range(plan.n_parts))


def _encode_missing(
    encoder: Encoder,
    plans: Mapping[Side, Plan],
    folder: Path,
    settings: FeatureSettings,
    device: str,
    reporter: Reporter,
    engine: Engine,
    shard: Shard | None,
) -> None:
    """Write the parts that are not there yet, those of a shard or all; parts of other plans are thrown away."""
    identity = encoder.identity
    share = {side: plans[side].share(shard) for side in _SIDES}
    todo = {
        side: [part for part in share[side] if not made_by(plans[side], folder, part, identity[side])]
        for side in _SIDES
    }
    made = {side: len(share[side]) - len(todo[side]) for side in _SIDES}
    if any(made.values()):
        reporter.note(f"{folder}: going on from {made['text']} text and {made['image']} image parts")
    if shard is None and folder.is_dir():
        mine = {plans[side].path(folder, part) for side in _SIDES for part in range(plans[side].n_parts)}
        stale = [path for path in folder.glob("*.arrow") if path not in mine]
        for path in stale:
            path.unlink()
        if [path for path in stale if not path.name.startswith("known-")]:
            reporter.note(f"{folder}: {len(stale)} parts of other items or settings were thrown away")
    if engine == "ray":
        from mmm4rec_cli.features.ray_engine import encoded_by_ray

        results: Iterator[Encoded] = encoded_by_ray(encoder, plans, todo, settings, device, reporter)
    else:
        results = encoded_here(encoder, plans, todo, settings, reporter)
    for encoded in results:
        side = encoded.side
        write_part(folder, plans[side], encoded, identity[side], encoder.models[side])


def encoded_here(
    encoder: Encoder,
    plans: Mapping[Side, Plan],
    todo: Mapping[Side, Sequence[int]],
    settings: FeatureSettings,
    reporter: Reporter,
) -> Iterator[Encoded]:
    """Encode parts in this process, with workers beside it that make texts and pictures ready ahead of the model."""
    jobs: dict[Side, list[tuple[int, list[int]]]] = {
        side: [
            (part, places)
            for part in todo[side]
            for places in plans[side].jobs(part, encoder.batch_size(side, settings))
        ]
        for side in _SIDES
    }
    count = sum(len(places) for side in _SIDES for _, places in jobs[side])
    stream = (Job(side, [plans[side].inputs[place] for place in places]) for side in _SIDES for _, places in jobs[side])
    processes = n_processes(settings, count, encoder.on_gpu)
    with prepared(stream, encoder.preparers, processes, reporter, encoder.on_gpu) as ready:
        for side in _SIDES:
            yield from _encoded_side(encoder, plans[side], todo[side], jobs[side], ready, reporter)


def _encoded_side(
    encoder: Encoder,
    plan: Plan,
    todo: Sequence[int],
    jobs: Sequence[tuple[int, list[int]]],
    ready: Iterator[Ready],
    reporter: Reporter,
) -> Iterator[Encoded]:
    if not todo:
        return
    if not jobs:
        width = encoder.width(plan.side)
        yield from (OpenPart(plan, part, width).encoded for part in todo)
        return
    waiting: deque[tuple[int, list[int], Ready]] = deque()

    def batches() -> Iterator[Any]:
        for (part, places), one in zip(jobs, islice(ready, len(jobs)), strict=True):
            waiting.append((part, places, one))
            if one.arrays is not None:
                yield one.arrays

    started = time.perf_counter()
    what = {"text": "texts", "image": "images"}[plan.side]
    total, failures = sum(len(places) for _, places in jobs), 0
    current: OpenPart | None = None
    answers = encoder.side(plan.side).stream(batches())
    with reporter.stage(what, total, what) as progress:
        while True:
            vectors = next(answers, None)
            while waiting:
                part, places, one = waiting.popleft()
                if one.arrays is not None and vectors is None:
                    raise AssertionError("an answer is missing")
                if current is None:
                    width = encoder.width(plan.side) if vectors is None else vectors.shape[1]
                    current = OpenPart(plan, part, width)
                current.fill(places, vectors if one.arrays is not None else None, one.failed)
                failures += len(one.failed)
                progress.advance(len(places), f"{failures} unreadable" if failures else "")
                if not current.left:
                    yield current.encoded
                    current = None
                if one.arrays is not None:
                    break
            if vectors is None:
                break
    seconds = time.perf_counter() - started
    if total > failures:
        reporter.note(
            f"{total - failures} distinct {what} encoded in {seconds:.1f} s "
            f"({(total - failures) / max(seconds, 1e-9):.0f} a second)"
        )


def _join(
    path: Path,
    raw_item_ids: Sequence[str],
    columns: Mapping[Side, _Column],
    known: Mapping[Side, Known],
    settings: FeatureSettings,
    identity: Mapping[str, Any],
    models: Mapping[Side, str],
    inputs: str,
    catalogue: str,
    unreadable: Mapping[int, str],
) -> dict[Side, int]:
    """Write the features file from the parts, a slice of items after the other; gives how many have a vector."""
    n = len(raw_item_ids)
    stand_in = _WHITE if settings.fallback == "published" else None

    def take(side: Side, first: int) -> tuple[Floats, Mask, list[bytes | None]]:
        keys = columns[side].keys[first : first + _SLICE]
        vectors, present = known[side].take(keys, stand_in if side == "image" else None)
        # the stand-in of a picture that cannot be read is no vector of that picture
        own = [
            key if there and key is not None and known[side].why(key) is None else None
            for key, there in zip(keys, present, strict=True)
        ]
        return vectors, present, own

    counts = {side: sum(int(take(side, first)[1].sum()) for first in range(0, n, _SLICE)) for side in _SIDES}
    source = {
        "models": dict(models),
        "inputs": inputs,
        "fallback": settings.fallback,
        "dtype": settings.dtype,
        "items": n,
        "with_text": counts["text"],
        "with_image": counts["image"],
        "unreadable_images": len(unreadable),
    }
    with features_file(
        path,
        widths=(known["text"].width, known["image"].width),
        encoder=encoder_name(settings),
        identity=identity,
        catalogue=catalogue,
        source=source,
        dtype=settings.dtype,
        hashed=True,
    ) as write:
        for first in range(0, n, _SLICE):
            slices = {side: take(side, first) for side in _SIDES}
            write(
                {side: (vectors, present) for side, (vectors, present, _) in slices.items()},
                {side: keys for side, (_, _, keys) in slices.items()},
            )
    return counts


def encode_items(
    encoder: Encoder,
    raw_item_ids: Sequence[str],
    texts: Sequence[str | None],
    images: Sequence[Path | None],
    settings: FeatureSettings,
    reporter: Reporter,
) -> tuple[tuple[Floats, Mask], tuple[Floats, Mask]]:
    """Text and image vectors [n, F] of items and their presence [n], made as `extract_features` makes them."""
    pictures, unreadable = _images(images, settings)
    columns: dict[Side, _Column] = {"text": _texts(texts, raw_item_ids, settings), "image": pictures}
    plans = {
        side: Plan(side, list(one.inputs), list(one.inputs.values()), max(1, len(one.inputs)))
        for side, one in columns.items()
    }
    found: dict[Side, tuple[Floats, Mask]] = {}
    for encoded in encoded_here(encoder, plans, {side: [0] for side in _SIDES}, settings, reporter):
        column, plan = columns[encoded.side], plans[encoded.side]
        rows = {key: row for row, key in enumerate(plan.keys) if encoded.why[row] is None}
        failed = {key: why for key, why in zip(plan.keys, encoded.why, strict=True) if why is not None}
        vectors = np.zeros((len(column.keys), encoded.vectors.shape[1]), dtype=np.float32)
        for index, key in enumerate(column.keys):
            if key in failed:
                unreadable[index] = failed[key]
                key = _WHITE
            if key in rows:
                vectors[index] = encoded.vectors[rows[key]]
        found[encoded.side] = vectors, np.any(vectors, axis=1)
    if unreadable:
        first = next(iter(unreadable.values())).replace("\t", ": ")
        reporter.warn(f"{len(unreadable)} pictures are missing or cannot be read, for example {first}")
    return found["text"], found["image"]


def _texts(given: Sequence[str | None], raw_item_ids: Sequence[str], settings: FeatureSettings) -> _Column:
    texts = [text if text and text.strip() else None for text in given]
    if settings.fallback == "published":
        texts = [text or raw for text, raw in zip(texts, raw_item_ids, strict=True)]
    keys = [None if text is None else hashlib.sha256(text.encode()).digest() for text in texts]
    return _Column(keys, {key: text for key, text in zip(keys, texts, strict=True) if key is not None})


def _images(paths: Sequence[Path | None], settings: FeatureSettings) -> tuple[_Column, dict[int, str]]:
    """The distinct picture files by the hash of their bytes, and by item index those that are not there."""
    with ThreadPoolExecutor(min(16, cores())) as pool:
        hashes = list(pool.map(_bytes_hash, paths))
    missing = {
        index: f"{path}\tno such file"
        for index, (path, key) in enumerate(zip(paths, hashes, strict=True))
        if path is not None and key is None
    }
    distinct: dict[bytes, Any] = {}
    for path, key in zip(paths, hashes, strict=True):
        if key is not None:
            distinct.setdefault(key, path)
    if settings.fallback == "published":
        hashes = [key or _WHITE for key in hashes]
        distinct[_WHITE] = None
    return _Column(hashes, distinct), missing


def _bytes_hash(path: Path | None) -> bytes | None:
    try:
        return None if path is None else hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return None


def _inputs_hash(columns: Mapping[Side, _Column], settings: FeatureSettings) -> str:
    """Changes whenever the features would, for one encoder."""
    keys = [[key and key.hex() for key in columns[side].keys] for side in _SIDES]
    return hashlib.sha256(json.dumps([*keys, settings.fallback, settings.dtype]).encode()).hexdigest()


def _log(path: Path, unreadable: dict[int, str], raw_item_ids: Sequence[str], reporter: Reporter) -> None:
    if not unreadable:
        path.unlink(missing_ok=True)
        return
    with written_whole(path) as part:
        lines = [f"{raw_item_ids[index]}\t{why}\n" for index, why in sorted(unreadable.items())]
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
