"""Part files: the vectors of some inputs each, from which an interrupted run goes on and which machines exchange.

A part is an Arrow file with the columns `key` (32 bytes: SHA-256 of the text or of the picture's bytes), `vector`
(float32, null where the picture cannot be read) and `why` (the reason then). Which input lies in which part follows
from the plan alone, so that every machine and engine makes the same parts. Sizes: n inputs, F feature width.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mmm4rec_cli.errors import DataError, UsageError
from mmm4rec_cli.features.store import Side, fingerprint, known_inputs
from mmm4rec_cli.files import written_whole

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_DOCUMENT = b"mmm4rec"


@dataclass(frozen=True)
class Shard:
    """One machine's share: every `of`-th part from `index` (1 is the first) on."""

    index: int
    of: int

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


def read_shard(text: str) -> Shard:
    """The shard that `I/N` names.

    Raises:
        UsageError: it is not of this form, or I is not within 1 to N.
    """
    index, slash, of = text.partition("/")
    numbers = [part.strip() for part in (index, of)]
    if slash and all(part.isascii() and part.isdigit() for part in numbers):
        shard = Shard(int(numbers[0]), int(numbers[1]))
        if 1 <= shard.index <= shard.of:
            return shard
    raise UsageError(f"--shard {text}: no shard", hint="of four machines the first takes --shard 1/4, the last 4/4")


@dataclass(frozen=True)
class Plan:
    """Which inputs of one side are to be encoded, in which parts.

    Attributes:
        side: text or image.
        keys: [n] SHA-256 of each distinct input, in the order in which the items name them.
        inputs: [n] the texts, or the paths of the pictures (None for the white one).
        size: inputs a part.
    """

    side: Side
    keys: list[bytes]
    inputs: list[Any]
    size: int

    @property
    def n_parts(self) -> int:
        """At least one: a part of no input still says how wide the vectors are and who made them."""
        return max(1, -(-len(self.keys) // self.size))

    @cached_property
    def digest(self) -> str:
        """Identity of the plan."""
        return hashlib.sha256(b"%d\n" % self.size + b"".join(self.keys)).hexdigest()

    def span(self, part: int) -> range:
        """The inputs of a part."""
        return range(part * self.size, min(len(self.keys), (part + 1) * self.size))

    def jobs(self, part: int, size: int) -> Iterator[list[int]]:
        """The inputs of a part as they are encoded, `size` a call: texts by length, for little padding."""
        span: Iterable[int] = self.span(part)
        order = iter(sorted(span, key=lambda index: len(self.inputs[index])) if self.side == "text" else span)
        while places := list(islice(order, size)):
            yield places

    def share(self, shard: Shard | None) -> list[int]:
        """The parts that a shard makes; all for None."""
        return list(range(self.n_parts) if shard is None else range(shard.index - 1, self.n_parts, shard.of))

    def path(self, folder: Path, part: int) -> Path:
        """Where a part lies."""
        return folder / f"{self.side}-{self.digest[:12]}-{part:05d}.arrow"


class Encoded(NamedTuple):
    """A part's vectors.

    Attributes:
        side: text or image.
        part: which.
        vectors: float32 [n, F]; zero where there is none.
        why: [n] the reason where there is none, else None.
    """

    side: Side
    part: int
    vectors: Floats
    why: list[str | None]


class OpenPart:
    """A part that is being filled; `left` inputs are still to come."""

    def __init__(self, plan: Plan, part: int, width: int) -> None:
        self._plan, self._part = plan, part
        self.left = len(plan.span(part))
        self._vectors = np.zeros((self.left, width), dtype=np.float32)
        self._why: list[str | None] = [None] * self.left

    def fill(self, places: Sequence[int], vectors: Floats | None, failed: Mapping[int, str]) -> None:
        """Take the answer to one job: vectors [good, F] of those whose place in the job is not in `failed`."""
        first = self._plan.span(self._part).start
        good = [place - first for index, place in enumerate(places) if index not in failed]
        if vectors is not None:
            self._vectors[good] = vectors
        for index, why in failed.items():
            self._why[places[index] - first] = why
        self.left -= len(places)

    @property
    def encoded(self) -> Encoded:
        """The part, once nothing is left."""
        assert not self.left
        return Encoded(self._plan.side, self._part, self._vectors, self._why)


def write_part(folder: Path, plan: Plan, encoded: Encoded, identity: dict[str, Any], model: str) -> None:
    """Write a part, whole or not at all; `identity` is that of the side, `model` its id or folder.

    Raises:
        DataError: a vector holds NaN or an infinite number.
    """
    bad = np.flatnonzero(~np.isfinite(encoded.vectors).all(axis=1))
    if len(bad):
        raise DataError(
            f"{model}: {len(bad)} of {len(encoded.vectors)} {plan.side} vectors hold NaN or infinite numbers",
            hint="take another model, or --set features.precision=fp32",
        )
    span = plan.span(encoded.part)
    document = {
        "side": plan.side,
        "identity": identity,
        "model": model,
        "plan": plan.digest,
        "part": encoded.part,
        "parts": plan.n_parts,
    }
    keys = [plan.keys[index] for index in span]
    _write(plan.path(folder, encoded.part), keys, encoded.vectors, encoded.why, document)


def _write(path: Path, keys: Sequence[bytes], vectors: Floats, why: Sequence[str | None], document: Any) -> None:
    missing = np.fromiter((reason is not None for reason in why), np.bool_, count=len(why))
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
    columns = {
        "key": pa.array(keys, pa.binary(32)),
        "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1], mask=pa.array(missing)),
        "why": pa.array(why, pa.string()),
    }
    table = pa.table(columns).replace_schema_metadata({_DOCUMENT: json.dumps(document)})
    with (
        written_whole(path) as part,
        pa.OSFile(str(part), "wb") as stream,
        pa.ipc.new_file(stream, table.schema) as file,
    ):
        file.write_table(table)


class _Part(NamedTuple):
    document: dict[str, Any]
    keys: list[bytes]
    vectors: Floats
    present: Mask
    why: list[str | None]


def _read(path: Path) -> _Part:
    """A part, its vectors mapped from the disk and not read.

    Raises:
        DataError: it is missing or damaged.
    """
    hint = f"delete {path} and run the same command again: only this part is encoded anew"
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        document = json.loads(table.schema.metadata[_DOCUMENT])
        column = table["vector"].combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        vectors = column.values.to_numpy(zero_copy_only=True).reshape(-1, column.type.list_size)
        vectors = vectors[column.offset : column.offset + len(column)]
        present = column.is_valid().to_numpy(zero_copy_only=False)
        return _Part(document, table["key"].to_pylist(), vectors, present, table["why"].to_pylist())
    except FileNotFoundError:
        raise DataError(f"{path}: no such part", hint=hint) from None
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged part ({' '.join(str(error).split())[:160]})", hint=hint) from None


def part_document(plan: Plan, folder: Path, part: int) -> dict[str, Any] | None:
    """What a part says of itself; None if it is not there, damaged, or of another plan."""
    try:
        found = _read(plan.path(folder, part))
    except DataError:
        return None
    return found.document if found.document.get("plan") == plan.digest else None


def made_by(plan: Plan, folder: Path, part: int, identity: dict[str, Any]) -> bool:
    """Whether a part is there and of this encoder's side."""
    document = part_document(plan, folder, part)
    return document is not None and document["identity"] == identity


def merged_identity(plans: Iterable[Plan], folder: Path, command: str) -> tuple[dict[str, Any], dict[Side, str]]:
    """Identity and models of the encoder whose parts lie in a folder, all of them.

    Raises:
        DataError: a part is missing, or they come from different encoders.
    """
    identities: dict[str, Any] = {}
    models: dict[Side, str] = {}
    problems: list[str] = []
    for plan in plans:
        prints: dict[str, list[int]] = {}
        missing = []
        for part in range(plan.n_parts):
            document = part_document(plan, folder, part)
            if document is None:
                missing.append(part)
                continue
            prints.setdefault(fingerprint(document["identity"]), []).append(part)
            identities[plan.side], models[plan.side] = document["identity"], document["model"]
        if missing:
            problems.append(
                f"{folder}: {len(missing)} of {plan.n_parts} {plan.side} parts are missing or damaged{_shards(missing)}"
            )
        if len(prints) > 1:
            told = "; ".join(f"{one[:8]}: {_listed(parts)}" for one, parts in prints.items())
            problems.append(f"{folder}: the {plan.side} parts come from {len(prints)} different encoders ({told})")
    if problems:
        others = sorted(folder.glob("*.arrow")) if folder.is_dir() else []
        known = {plan.path(folder, part) for plan in plans for part in range(plan.n_parts)}
        strangers = [path for path in others if path not in known]
        if strangers:
            problems.append(
                f"{folder}: {len(strangers)} parts were made of other items, texts, pictures or part sizes, "
                f"{strangers[0].name} the first"
            )
        raise DataError(
            *problems,
            hint=f"bring every shard's parts into this folder, or run the shard that lacks: {command} --shard I/N",
        )
    return identities, models


def _listed(parts: Sequence[int]) -> str:
    shown = ", ".join(map(str, parts[:8]))
    return f"parts {shown}" + (", …" if len(parts) > 8 else "")


def _shards(missing: Sequence[int]) -> str:
    return f" ({_listed(missing)}; part p is made by shard p mod N + 1 of N)"


class Known:
    """Vectors by key, mapped from part files: only what is looked at is in memory."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._files: list[_Part] = []
        self._place: dict[bytes, tuple[int, int]] = {}

    def add(self, path: Path) -> None:
        """Know what a part holds, the reasons of what it could not read included."""
        part = _read(path)
        if part.vectors.shape[1] != self.width:
            raise DataError(
                f"{path}: vectors {part.vectors.shape[1]} wide among vectors {self.width} wide",
                hint=f"delete {path} and run the same command again",
            )
        number = len(self._files)
        self._files.append(part)
        self._place.update((key, (number, row)) for row, key in enumerate(part.keys))

    def why(self, key: bytes) -> str | None:
        """Why there is no vector for a key; None if there is one, or nothing is known."""
        number, row = self._place.get(key, (-1, -1))
        return None if number < 0 else self._files[number].why[row]

    def take(self, keys: Sequence[bytes | None], stand_in: bytes | None = None) -> tuple[Floats, Mask]:
        """Vectors float32 [n, F] and which are there [n]; one of zeros says nothing and counts as none."""
        vectors = np.zeros((len(keys), self.width), dtype=np.float32)
        for index, key in enumerate(keys):
            if key is not None and self.why(key) is not None:
                key = stand_in
            if key is not None:
                number, row = self._place[key]
                vectors[index] = self._files[number].vectors[row]
        present: Mask = np.any(vectors, axis=1)
        return vectors, present


def width_of(path: Path) -> int:
    """F of a part's vectors."""
    return int(_read(path).vectors.shape[1])


def copied(file: Path, side: Side, keys: set[bytes], folder: Path) -> Iterator[Path]:
    """The vectors of some keys from a features file as part files, one after the other."""
    wanted = set(keys)
    for number, (found, vectors) in enumerate(known_inputs(file, side)):
        rows: dict[bytes, int] = {}
        for row, key in enumerate(found):
            if key is not None and key in wanted:
                rows.setdefault(key, row)
        if rows:
            wanted -= rows.keys()
            path = folder / f"known-{side}-{number:05d}.arrow"
            _write(path, list(rows), vectors[list(rows.values())], [None] * len(rows), {})
            yield path
