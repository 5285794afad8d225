"""Feature files: one row an item, a vector or null for each modality. Read with pyarrow and numpy alone.

A file is `data/features/<domain>/<encoder>.parquet` with the columns

- `item_id` int32, 1 to the number of items, in order,
- `text` and `image`, fixed-size lists of float32 or float16, null where the item has none,
- where an encoder of ours made them, `text_sha256` and `image_sha256`: what each vector was made of (null where there
  is none), by which vectors are found again when the catalogue grows,

and, as JSON under the key `mmm4rec` of the Parquet metadata, a document with `format`, `encoder` (its name),
`identity` (what decides which vector a text or a picture gets: models with the hash of their weights, preprocessing),
`fingerprint` (SHA-256 of `identity`), `catalogue` (SHA-256 over the raw item ids, as in the tables) and `source` (what
was encoded).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mmm4rec_cli.data.columns import IMAGE, ITEM_ID, TEXT
from mmm4rec_cli.data.domains import MIXES
from mmm4rec_cli.data.tables import command
from mmm4rec_cli.errors import DataError
from mmm4rec_cli.files import written_whole
from mmm4rec_cli.settings.schema import FeatureSettings
from mmm4rec_cli.workspace import Workspace

FORMAT = 1
_KEY = b"mmm4rec"
_DOCUMENT = {"format": int, "encoder": str, "identity": dict, "fingerprint": str, "catalogue": str, "source": dict}

PRESETS: dict[str, str | None] = {
    "siglip": "google/siglip-base-patch16-224",
    "siglip2": "google/siglip2-base-patch16-224",
    "clip": "openai/clip-vit-base-patch32",
    "blip": "Salesforce/blip-itm-base-coco",
    "blip2": "Salesforce/blip2-itm-vit-g",
    "fashion-siglip": "Marqo/marqo-fashionSigLIP",
    "sketch": None,
}
"""Encoders by short name: the Hugging Face id of a joint image-text model, None where no weights are needed."""

PAIRS: dict[str, tuple[str, str]] = {
    "siglip+roberta": ("FacebookAI/roberta-base", "google/siglip-base-patch16-224"),
    "clip+bert": ("google-bert/bert-base-uncased", "openai/clip-vit-base-patch32"),
}
"""Encoders by short name whose sides are two models: the ids of the text model and of the image model."""

HASHES = {TEXT: "text_sha256", IMAGE: "image_sha256"}
"""Columns that say what a vector was made of."""

Side = Literal["text", "image"]
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ItemFeatures:
    """The vectors of one catalogue by one encoder; V = number of items + 1, row i belongs to item id i.

    Attributes:
        text: float32 [V, F_text]; row 0 (padding) and the rows of items without text are zero.
        has_text: bool [V]; False in row 0.
        image: float32 [V, F_image]; as `text`.
        has_image: bool [V]; False in row 0.
        metadata: the document in the file's metadata.
        fingerprint: identity of the encoder, the same for every catalogue that it encoded.
    """

    text: Floats
    has_text: Mask
    image: Floats
    has_image: Mask
    metadata: dict[str, Any]
    fingerprint: str


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Hexadecimal SHA-256 of an encoder's identity, independent of the order of its keys."""
    text = json.dumps(identity, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def model_slug(name: str) -> str:
    """A Hugging Face id or a folder as part of a file name.

    `google/vit-base` gives `google--vit-base`; of an absolute or longer path only the last part is kept. The answer
    does not depend on what lies on the disk, so that every command finds the same file.
    """
    parts = [part for part in re.split(r"[/\\]+", name) if part]
    if len(parts) > 2 or name.startswith(("/", "\\", ".", "~")) or (parts and parts[0].endswith(":")):
        parts = [part for part in parts if part not in {".", ".."}][-1:]
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", "--".join(parts)).strip(".-") or "model"


def encoder_name(settings: FeatureSettings) -> str:
    """The name of the features file (without `.parquet`) that these settings make and read.

    A preset or a name of the user's own is the name itself; an id or folder becomes its slug. With a text model or an
    image model it is `<text>+<image>`, where a side without a model of its own is the encoder's; an encoder that is
    neither a preset nor an id or folder then only names the file.
    """
    encoder = model_slug(settings.encoder)
    if settings.text_model is None and settings.image_model is None:
        return encoder
    if (
        settings.text_model
        and settings.image_model
        and encoder == settings.encoder
        and encoder not in {*PRESETS, *PAIRS}
    ):
        return encoder
    sides = (model_slug(side) if side else encoder for side in (settings.text_model, settings.image_model))
    return "+".join(sides)


def _column(vectors: npt.NDArray[Any], present: Mask, dtype: Literal["float32", "float16"], first: int) -> pa.Array:
    """Vectors [n, F] and their presence [n] as they are stored; row 0 belongs to item id `first`."""
    with np.errstate(over="ignore"):  # what overflows is found and said below
        stored = np.where(present[:, None], vectors, 0).astype(dtype)
    if not np.isfinite(stored).all():
        rows = np.flatnonzero(~np.isfinite(stored).all(axis=1))
        raise DataError(
            f"{len(rows)} vectors hold NaN or infinite numbers as {dtype}; the first belongs to item id "
            f"{rows[0] + first}",
            hint="mend the vectors" if dtype == "float32" else "store them with --set features.dtype=float32",
        )
    return pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), stored.shape[1], mask=pa.array(~present))


def write_features(
    path: Path,
    *,
    text: npt.NDArray[Any],
    has_text: Mask,
    image: npt.NDArray[Any],
    has_image: Mask,
    encoder: str,
    identity: Mapping[str, Any],
    catalogue: str,
    source: Mapping[str, Any],
    dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Write the features of items 1 to n, whole or not at all.

    Args:
        path: where to.
        text: [n, F_text] with F_text at least 1; rows of items without text are not looked at.
        has_text: bool [n].
        image: [n, F_image]; as `text`.
        has_image: bool [n].
        encoder: name of the encoder.
        identity: what decides the vector of a text or picture; the fingerprint is its hash.
        catalogue: SHA-256 over the raw item ids.
        source: what was encoded, for people and for finding out whether it is still the same.
        dtype: number format of the stored vectors.

    Raises:
        DataError: a vector holds NaN or an infinite number (in float16: is too large for it).
    """
    widths = text.shape[1], image.shape[1]
    with features_file(
        path, widths=widths, encoder=encoder, identity=identity, catalogue=catalogue, source=source, dtype=dtype
    ) as write:
        write({TEXT: (text, has_text), IMAGE: (image, has_image)})


Vectors = tuple[npt.NDArray[Any], Mask]
"""[n, F] and, bool [n], which of them are there."""


@contextmanager
def features_file(
    path: Path,
    *,
    widths: tuple[int, int],
    encoder: str,
    identity: Mapping[str, Any],
    catalogue: str,
    source: Mapping[str, Any],
    dtype: Literal["float32", "float16"] = "float32",
    hashed: bool = False,
) -> Iterator[Callable[..., None]]:
    """Write a features file slice by slice, whole or not at all, without ever holding all of it.

    Gives a function that takes the next items' vectors, by `text` and `image`, and, where `hashed`, by the same keys
    what each vector was made of: 32 bytes, or None for an item without one.

    Args:
        path: where to.
        widths: F of the text and of the image vectors.
        encoder: as in `write_features`, like the others.
        identity: what decides the vector of a text or picture.
        catalogue: SHA-256 over the raw item ids.
        source: what was encoded.
        dtype: number format of the stored vectors.
        hashed: the file gets the columns of HASHES.
    """
    document = {
        "format": FORMAT,
        "encoder": encoder,
        "identity": dict(identity),
        "fingerprint": fingerprint(identity),
        "catalogue": catalogue,
        "source": dict(source),
    }
    number = pa.float16() if dtype == "float16" else pa.float32()
    fields = [pa.field(ITEM_ID, pa.int32())]
    fields += [pa.field(side, pa.list_(number, width)) for side, width in zip((TEXT, IMAGE), widths, strict=True)]
    fields += [pa.field(name, pa.binary(32)) for name in HASHES.values() if hashed]
    schema = pa.schema(fields, {_KEY: json.dumps(document, ensure_ascii=False)})
    with (
        written_whole(path) as part,
        pq.ParquetWriter(part, schema, compression="zstd", use_dictionary=False) as file,
    ):
        first = 1

        def write(vectors: Mapping[str, Vectors], hashes: Mapping[str, Sequence[bytes | None]] | None = None) -> None:
            nonlocal first
            n = len(vectors[TEXT][1])
            columns = [pa.array(np.arange(first, first + n, dtype=np.int32))]
            columns += [_column(*vectors[side], dtype, first) for side in (TEXT, IMAGE)]
            columns += [pa.array(hashes[side], pa.binary(32)) for side in HASHES if hashes is not None]
            file.write_table(pa.table(columns, schema=schema))
            first += n

        yield write


def known_inputs(path: Path, side: Side) -> Iterator[tuple[list[bytes | None], Floats]]:
    """What a features file's vectors were made of and, float32 [n, F], the vectors, a slice after the other.

    Rows without a vector have the key None. A file without these columns gives nothing.
    """
    with pq.ParquetFile(path) as file:
        if HASHES[side] not in file.schema_arrow.names:
            return
        for batch in file.iter_batches(4096, columns=[side, HASHES[side]]):
            vectors, present = scattered(batch.column(side))
            keys = batch.column(HASHES[side]).to_pylist()
            yield [key if there else None for key, there in zip(keys, present, strict=True)], vectors


def known_keys(path: Path, side: Side) -> set[bytes]:
    """What the vectors of a features file were made of; empty where it does not say."""
    if HASHES[side] not in pq.read_schema(path).names:
        return set()
    return {key for key in pq.read_table(path, columns=[HASHES[side]])[HASHES[side]].to_pylist() if key is not None}


def features_command(workspace: Workspace, domain: str, settings: FeatureSettings) -> str:
    """The command line that makes a domain's features with these settings, ready to be typed."""
    models = (("--text-model", settings.text_model), ("--image-model", settings.image_model))
    given = (word for option, model in models if model is not None for word in (option, model))
    return _command(workspace, domain, settings.encoder, *given)


def _command(workspace: Workspace, domain: str, encoder: str, *words: str) -> str:
    which = "--mix" if domain in MIXES else "--domain"
    return command(workspace, "preprocess", which, domain, "--encoder", encoder, *words)


def _command_for(path: Path) -> str:
    """The command line that makes the features file at `path`, as far as its name tells."""
    folders = path.parents
    workspace = Workspace(folders[3] if len(folders) > 3 else Path())
    if "+" not in path.stem or path.stem in PAIRS:
        return _command(workspace, path.parent.name, path.stem)
    text, image = (side.replace("--", "/") for side in path.stem.split("+", 1))
    return _command(workspace, path.parent.name, path.stem, "--text-model", text, "--image-model", image)


def read_metadata(path: Path, hint: str | None = None) -> dict[str, Any]:
    """The document in a features file's metadata.

    Args:
        path: the features file.
        hint: the command that makes it; else it is read from the file's name.

    Raises:
        DataError: the file is missing, damaged, or no features file of a known format.
    """
    try:
        schema = pq.read_schema(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such features file", hint=hint or _command_for(path)) from None
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, str(error), hint) from None
    try:
        document = json.loads((schema.metadata or {})[_KEY])
    except (KeyError, ValueError):
        raise DataError(
            f"{path}: a Parquet file, but not a features file of this tool",
            hint="take embeddings of your own with: mmm4rec preprocess --features FILE",
        ) from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f"{path}: features file of an unknown format", hint=hint or _command_for(path))
    wrong = [key for key, kind in _DOCUMENT.items() if not isinstance(document.get(key), kind)]
    if wrong or document["fingerprint"] != fingerprint(document["identity"]):
        why = f"metadata {', '.join(wrong)} missing" if wrong else "fingerprint and identity disagree"
        raise _damaged(path, why, hint)
    return document


def _damaged(path: Path, why: str, hint: str | None) -> DataError:
    reason = " ".join(why.split())[:200]
    return DataError(f"{path}: damaged features file ({reason})", hint=hint or _command_for(path))


def scattered(column: pa.Array) -> tuple[Floats, Mask]:
    """Vectors float32 [n, F] and their presence [n] of one array of fixed-size lists; null ones are zero.

    Raises:
        ValueError: a vector has holes, NaN or infinite numbers.
    """
    width = column.type.list_size
    vectors = np.zeros((len(column), width), dtype=np.float32)
    valid: Mask = column.is_valid().to_numpy(zero_copy_only=False)
    # flatten() leaves out the places of null rows
    flat = column.flatten()
    if flat.null_count:
        raise ValueError("a vector has null elements")
    vectors[valid] = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
    if not np.isfinite(vectors).all():
        raise ValueError("a vector holds NaN or an infinite number")
    return vectors, valid


def _catalogue_wide(column: pa.ChunkedArray, n_items: int) -> tuple[Floats, Mask]:
    """Vectors [V, F] and their presence [V] of a column in item order; ValueError for a vector with holes."""
    vectors = np.zeros((n_items + 1, column.type.list_size), dtype=np.float32)
    present = np.zeros(n_items + 1, dtype=np.bool_)
    row = 1
    for chunk in column.chunks:
        vectors[row : row + len(chunk)], present[row : row + len(chunk)] = scattered(chunk)
        row += len(chunk)
    return vectors, present


def read_features(path: Path, catalogue: str, n_items: int, hint: str | None = None) -> ItemFeatures:
    """Read the features of a catalogue.

    Args:
        path: the features file.
        catalogue: SHA-256 over the raw item ids of the tables that the features shall fit.
        n_items: number of items in the catalogue.
        hint: the command that makes the file (`features_command`); else it is read from the file's name.

    Raises:
        DataError: the file is missing, damaged, of another catalogue or of other columns.
    """
    metadata = read_metadata(path, hint)
    if metadata["catalogue"] != catalogue:
        raise DataError(
            f"{path}: features of another catalogue ({metadata['catalogue'][:12]}; the tables have {catalogue[:12]})",
            hint=hint or _command_for(path),
        )
    try:
        names = [name for name in (ITEM_ID, TEXT, IMAGE) if name in pq.read_schema(path).names]
        table = pq.read_table(path, columns=names, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, str(error), hint) from None
    for name in (TEXT, IMAGE):
        kind = table.schema.field(name).type if name in table.schema.names else None
        if kind is None or not (pa.types.is_fixed_size_list(kind) and kind.value_type in (pa.float32(), pa.float16())):
            raise _damaged(path, f"column {name} is {kind}, not a fixed-size list of float32 or float16", hint)
    if ITEM_ID not in table.schema.names or table.schema.field(ITEM_ID).type != pa.int32():
        raise _damaged(path, f"column {ITEM_ID} is not int32", hint)
    ids = table[ITEM_ID].to_numpy()
    if len(ids) != n_items or not np.array_equal(ids, np.arange(1, n_items + 1)):
        raise _damaged(
            path, f"{len(ids)} rows for a catalogue of {n_items} items, or not in the order of item ids", hint
        )
    try:
        text, has_text = _catalogue_wide(table[TEXT], n_items)
        image, has_image = _catalogue_wide(table[IMAGE], n_items)
    except ValueError as error:
        raise _damaged(path, str(error), hint) from None
    return ItemFeatures(text, has_text, image, has_image, metadata, str(metadata["fingerprint"]))
