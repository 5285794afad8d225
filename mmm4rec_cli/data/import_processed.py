"""The published layout taken in: `*_seq.jsonl`, `item2id/user2id.jsonl` and `*_feat.pth` to our tables and features.

A line of a sequence file is `[user, [[item, time], …]]`. `test_seq` has each user's whole history, `eval_seq` all but
the last event, `train_seq` every shorter prefix. A folder with `train_seq` alone is a pre-training set: a user's
longest line is the history. Row i of the feature files is item id i + 1.
"""

import itertools
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from mmm4rec_cli.data import domains
from mmm4rec_cli.data.columns import (
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
from mmm4rec_cli.data.tables import write_tables
from mmm4rec_cli.errors import DataError
from mmm4rec_cli.features.store import write_features
from mmm4rec_cli.files import sha256
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.workspace import Workspace

SEQUENCES = ("train_seq.jsonl", "eval_seq.jsonl", "test_seq.jsonl")
FEATURES = {"text": "text_feat.pth", "image": "image_feat.pth"}
_HINT = "fetch the published folder again: mmm4rec download --kind processed"

History = list[tuple[int, int]]
"""Item id and Unix seconds of each event, in order."""


def import_processed(
    workspace: Workspace, domain: str, folder: Path, encoder: str, reporter: Reporter | None = None
) -> dict[str, Any]:
    """Write a domain's tables, and its features if they are there, from a folder in the published layout.

    Args:
        workspace: where.
        domain: the name it gets: a category, a mix or one of the user's own.
        folder: holds `train_seq.jsonl`; beside it `eval_seq` and `test_seq`, both or none of them, `item2id.jsonl`
            and `user2id.jsonl` (a JSON object, or lines of pairs), `text_feat.pth` and `image_feat.pth`.
        encoder: the name of the features file.
        reporter: told what could not be recovered.

    Returns:
        The manifest.

    Raises:
        UsageError: `domain` cannot be a name.
        DataError: a file is missing or broken, or the files do not agree with one another.
    """
    reporter = reporter or SilentReporter()
    if not domains.is_registered(domain):
        domains.own_domain(domain)
    lost = ["titles, texts and image addresses of the items", "events that the publisher's filters dropped"]
    histories, pretraining = _histories(folder)
    n_items = max(item for history in histories.values() for item, _ in history)
    vectors = _features(folder)
    item_names = _names(folder / "item2id.jsonl", 1)
    if item_names is None:
        lost.append("raw item ids (their numbers stand for them)")
        item_names = [str(item) for item in range(1, max([n_items, *map(len, vectors.values())]) + 1)]
    if len(item_names) < n_items:
        raise DataError(f"{folder}: item {n_items} is in a sequence, item2id ends at {len(item_names)}", hint=_HINT)
    user_names = _names(folder / "user2id.jsonl", 0)
    if user_names is None:
        lost.append("raw user ids (their numbers stand for them)")
        user_names = [str(user) for user in range(max(histories) + 1)]
    if len(user_names) <= max(histories):
        raise DataError(f"{folder}: user {max(histories)} has a sequence, user2id ends before", hint=_HINT)
    for kind, rows in vectors.items():
        if len(rows) != len(item_names):
            raise DataError(f"{folder / FEATURES[kind]}: {len(rows)} rows for {len(item_names)} items", hint=_HINT)
    manifest = _write(workspace, domain, folder, histories, item_names, user_names, pretraining)
    if len(vectors) == len(FEATURES):
        everything = np.ones(len(item_names), bool)
        write_features(
            workspace.features(domain, encoder),
            text=vectors["text"],
            has_text=everything,
            image=vectors["image"],
            has_image=everything,
            encoder=encoder,
            identity={"kind": "published", "name": encoder} | {kind: rows.shape[1] for kind, rows in vectors.items()},
            catalogue=manifest["catalogue"],
            source={kind: sha256(folder / name) for kind, name in FEATURES.items()},
        )
        lost.append("which vectors stand for a missing text or picture (published ones do not tell)")
    else:
        missing = [name for kind, name in FEATURES.items() if kind not in vectors]
        reporter.warn(f"{folder}: no {' and no '.join(missing)}, so that no features were written")
    reporter.note(f"{folder}: not to be recovered: {'; '.join(lost)}")
    if pretraining:
        reporter.note(f"{folder}: a pre-training set (train_seq alone): each user's longest line is the history")
    return manifest


def _histories(folder: Path) -> tuple[dict[int, History], bool]:
    """Each user's whole history, and whether the folder is a pre-training set; the prefixes agree with one another."""
    train, valid, test = (folder / name for name in SEQUENCES)
    if not train.is_file():
        raise DataError(f"{train} is missing", hint="name a folder in the published layout: train_seq.jsonl, …")
    if valid.is_file() != test.is_file():
        raise DataError(f"{folder}: {valid.name} and {test.name} belong together, one is missing", hint=_HINT)
    pretraining = not test.is_file()
    histories: dict[int, History] = {}
    for number, user, history in _lines(train if pretraining else test):
        if pretraining:
            if len(history) > len(histories.get(user, ())):
                histories[user] = history
        elif user in histories:
            raise DataError(f"{test}, line {number}: user {user} occurs again", hint=_HINT)
        else:
            histories[user] = history
    if not histories:
        raise DataError(f"{train if pretraining else test} has no lines", hint=_HINT)
    seen: set[int] = set()
    for path in (train,) if pretraining else (train, valid):
        for number, user, history in _lines(path):
            whole = histories.get(user)
            if whole is None:
                raise DataError(f"{path}, line {number}: user {user} is not in {test.name}", hint=_HINT)
            if history != whole[: len(history)]:
                raise DataError(f"{path}, line {number}: no beginning of user {user}'s history", hint=_HINT)
            if path == valid and len(history) != len(whole) - 1:
                raise DataError(
                    f"{path}, line {number}: {len(history)} events, the user's history has {len(whole)}", hint=_HINT
                )
            if path == valid:
                seen.add(user)
    if not pretraining and len(seen) != len(histories):
        raise DataError(f"{valid}: {len(seen)} users, {test.name} has {len(histories)}", hint=_HINT)
    return histories, pretraining


def _lines(path: Path) -> Iterator[tuple[int, int, History]]:
    """The number, user and history of each line."""
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, *_parsed(line, path, number)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason})", hint=_HINT) from error


def _parsed(line: str, path: Path, number: int) -> tuple[int, History]:
    try:
        user, events = json.loads(line)
        history = [(item, time) for item, time in events]
        whole = all(type(value) is int for event in history for value in event) and type(user) is int
        if whole and history and user >= 0 and all(item >= 1 for item, _ in history):
            if any(later < time for (_, time), (_, later) in itertools.pairwise(history)):
                raise DataError(f"{path}, line {number}: times run backwards", hint=_HINT)
            return user, history
    except (ValueError, TypeError, RecursionError):
        pass
    raise DataError(f"{path}, line {number}: not [user, [[item, time], …]]: {line[:60]!r}", hint=_HINT)


def _names(path: Path, first: int) -> list[str] | None:
    """Raw ids in the order of their numbers, which run from `first` without a gap; None if there is no such file."""
    if not path.is_file():
        return None
    pairs: dict[int, str] = {}
    try:
        text = path.read_text(encoding="utf-8")
        try:
            whole = json.loads(text)
        except ValueError:
            whole = [json.loads(line) for line in text.splitlines() if line.strip()]
        if isinstance(whole, list) and len(whole) == 2 and isinstance(whole[0], str):
            whole = [whole]  # a file of one line
        entries = list(whole.items()) if isinstance(whole, dict) else []
        for entry in [] if isinstance(whole, dict) else whole:
            entries += entry.items() if isinstance(entry, dict) else [tuple(entry)]
        for name, number in entries:
            if not isinstance(name, str) or type(number) is not int or number in pairs:
                raise ValueError(f"{name!r}: {number!r}")
            pairs[number] = name
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not raw ids with their numbers ({str(error)[:80]})", hint=_HINT) from error
    if sorted(pairs) != list(range(first, first + len(pairs))) or len(set(pairs.values())) != len(pairs):
        raise DataError(f"{path}: the numbers do not run from {first} without a gap, or an id occurs twice", hint=_HINT)
    return [pairs[number] for number in range(first, first + len(pairs))]


def _features(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    """The vectors that are there: kind -> [V, F]."""
    found = {}
    for kind, name in FEATURES.items():
        path = folder / name
        if not path.is_file():
            continue
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
            line = " ".join(str(error).split())[:120] or type(error).__name__
            raise DataError(f"{path}: damaged, or not tensors alone ({line})", hint=_HINT) from error
        if isinstance(loaded, (list, tuple)) and all(isinstance(row, torch.Tensor) for row in loaded) and loaded:
            if len({tuple(row.shape) for row in loaded}) != 1:
                raise DataError(f"{path}: rows of different widths", hint=_HINT)
            loaded = torch.stack(list(loaded))
        if not isinstance(loaded, torch.Tensor) or loaded.ndim != 2 or not loaded.is_floating_point():
            raise DataError(f"{path}: not one row of numbers an item", hint=_HINT)
        rows = loaded.float().numpy()
        if not rows.size or not np.isfinite(rows).all():
            raise DataError(f"{path}: empty, or holds NaN or infinite numbers", hint=_HINT)
        found[kind] = rows
    return found


def _write(
    workspace: Workspace,
    domain: str,
    folder: Path,
    histories: dict[int, History],
    item_names: list[str],
    user_names: list[str],
    pretraining: bool,
) -> dict[str, Any]:
    """Write the tables; users without a sequence get no row, the others keep their order."""
    users = sorted(histories)
    user_id = np.repeat(np.arange(len(users), dtype=np.int32), [len(histories[user]) for user in users])
    events = np.array([event for user in users for event in histories[user]], dtype=np.int64)
    per_item = np.bincount(events[:, 0], minlength=len(item_names) + 1)[1:]
    nothing = pa.nulls(len(item_names), pa.string())
    tied = np.flatnonzero((user_id[1:] == user_id[:-1]) & (events[1:, 1] == events[:-1, 1]))
    counts = {"users": len(users), "items": len(item_names), "rows": len(events)}
    names = [name for name in (*SEQUENCES, "item2id.jsonl", "user2id.jsonl") if (folder / name).is_file()]
    manifest = {
        "domain": domain,
        "sources": [
            {"role": "published", "path": str((folder / name).absolute()), "sha256": sha256(folder / name)}
            for name in names
        ],
        "pretraining_set": pretraining,
        "counts": [{"step": "as published"} | counts],
        **counts,
        "tied_share": len(np.union1d(tied, tied + 1)) / len(events),
        "text_share": 0.0,
        "image_share": 0.0,
    }
    return write_tables(
        workspace,
        domain,
        interactions=pa.table({USER_ID: user_id, ITEM_ID: events[:, 0].astype(np.int32), TIMESTAMP: events[:, 1]}),
        items=pa.table(
            {
                ITEM_ID: np.arange(1, len(item_names) + 1, dtype=np.int32),
                RAW_ITEM_ID: item_names,
                **{TITLE: nothing, TEXT: nothing, IMAGE: nothing, IMAGE_URL: nothing},
                N_INTERACTIONS: per_item.astype(np.int32),
            }
        ),
        users=pa.table(
            {
                USER_ID: np.arange(len(users), dtype=np.int32),
                RAW_USER_ID: [user_names[user] for user in users],
                N_INTERACTIONS: np.array([len(histories[user]) for user in users], dtype=np.int32),
            }
        ),
        manifest=manifest,
    )
