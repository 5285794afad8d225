"""The published fine-tuning results (figures of the reference's own logs), to stand beside ours."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class PublishedResult:
    """One published run: leave-one-out, whole catalogue ranked, seen items not masked."""

    domain: str
    item_bias: bool
    """The paper's "with ID" or "without ID"."""
    n_users: int
    n_items: int
    valid_metric: str
    """The metric that chose the epoch."""
    best_epoch: int
    epochs: int
    train_seconds: float
    """Sum over the epochs, on one GPU of 24 GiB that the logs do not name."""
    valid: dict[str, float]
    test: dict[str, float]


@cache
def _document() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(files(__package__).joinpath("results.json").read_text(encoding="utf-8"))
    return document


def published_domains() -> list[str]:
    """The five downstream domains of the paper."""
    return list(_document()["domains"])


def published_result(domain: str, *, item_bias: bool) -> PublishedResult | None:
    """The published run of a domain, or None where there is none."""
    row = _document()["domains"].get(domain, {}).get("with_id" if item_bias else "without_id")
    if row is None:
        return None
    names = ("n_users", "n_items", "valid_metric", "best_epoch", "epochs", "train_seconds", "valid", "test")
    return PublishedResult(domain=domain, item_bias=item_bias, **{name: row[name] for name in names})
