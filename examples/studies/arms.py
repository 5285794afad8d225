"""What is compared in docs/measurements.md: one arm a row of a table, each a `mmm4rec` command."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Sets = dict[str, Any]
"""Setting (dotted) -> value, as `--set` takes them."""

QUICK: Sets = {
    "finetune.batch_size": 1024,
    "finetune.accumulation": 1,
    "finetune.lr": 1e-3,
    "finetune.schedule": "cosine",
    "finetune.epochs": 20,
    "finetune.patience": 20,
}
"""The plan of all blocks but `optimisation`: short, and without the luck of an epoch that a constant rate leaves."""

SMALL: Sets = {**QUICK, "finetune.batch_size": 512, "finetune.epochs": 60, "finetune.patience": 60}
"""The same for the small domains of the transfer, in steps of half as many targets."""

SOURCE: Sets = {
    "pretrain.batch_size": 512,
    "pretrain.accumulation": 1,
    "pretrain.lr": 1e-3,
    "pretrain.schedule": "cosine",
    "pretrain.epochs": 40,
}
"""Pre-training for the transfer."""


@dataclass(frozen=True)
class Arm:
    """One row of a table."""

    block: str
    name: str
    domain: str
    sets: Sets = field(default_factory=dict)
    source: str | None = None
    """Pre-train on this domain first, with the same seed."""
    source_sets: Sets = field(default_factory=dict)
    hidden: float = 0.0
    """Share of the images that are hidden before training."""

    @property
    def key(self) -> str:
        """Unique, and a file's name."""
        return f"{self.block}-{self.domain}-{self.name}".replace(" ", "_").replace("/", "_")

    @property
    def source_key(self) -> tuple[Any, ...] | None:
        """Equal for arms that start from the same pre-training."""
        return None if self.source is None else (self.source, *sorted(self.source_sets.items()))


def written(sets: Sets) -> list[str]:
    """As `--set` takes them."""
    return [f"{path}={str(value).lower() if isinstance(value, bool) else value}" for path, value in sets.items()]


def _time() -> Iterator[Arm]:
    for length in (20, 100):
        for time in ("none", "observed", "published", "buckets", "decay"):
            sets = {**QUICK, "model.max_len": length, "model.time": time}
            yield Arm("time", f"{time} {length}", "ml100k", sets)
    for time in ("none", "observed", "published", "buckets", "decay"):
        yield Arm("time", time, "magazine", {**SMALL, "finetune.batch_size": 256, "model.time": time})


def _missing() -> Iterator[Arm]:
    for hidden in (0.3, 0.5, 0.79):
        for missing in ("zero", "mean", "learned"):
            yield Arm(
                "missing", f"{missing} {hidden:.0%}", "ml100k", {**QUICK, "features.missing": missing}, hidden=hidden
            )
    for scale in ("none", "unit", "standard"):
        yield Arm("missing", f"scale {scale}", "ml100k", {**QUICK, "model.feature_scale": scale})


def _optimisation() -> Iterator[Arm]:
    def plan(batch: int, accumulation: int, lr: float, **more: Any) -> Sets:
        own = {"batch_size": batch, "accumulation": accumulation, "lr": lr, **more}
        return {f"finetune.{name}": value for name, value in own.items()}

    def falling(batch: int, lr: float, epochs: int, schedule: str = "cosine", **more: Any) -> Sets:
        return plan(batch, 1, lr, schedule=schedule, epochs=epochs, patience=epochs, **more)

    arms = {
        "published": plan(1024, 8, 1e-4),
        "1024 x 8, 1e-3": plan(1024, 8, 1e-3),
        "1024 x 8, 3e-3": plan(1024, 8, 3e-3),
        "1024, 3e-4": plan(1024, 1, 3e-4),
        "1024, 1e-3": plan(1024, 1, 1e-3),
        "1024, 3e-3": plan(1024, 1, 3e-3),
        "256, 3e-4": plan(256, 1, 3e-4),
        "256, 1e-3": plan(256, 1, 1e-3),
        "1024, 1e-3, cosine 10": falling(1024, 1e-3, 10),
        "1024, 1e-3, cosine 20": falling(1024, 1e-3, 20),
        "1024, 1e-3, cosine 40": falling(1024, 1e-3, 40),
        "1024, 1e-3, linear 20": falling(1024, 1e-3, 20, "linear"),
        "1024, 3e-3, cosine 10": falling(1024, 3e-3, 10),
        "1024, 3e-3, cosine 20": falling(1024, 3e-3, 20),
        "1024, 3e-4, cosine 40": falling(1024, 3e-4, 40),
        "256, 3e-4, cosine 20": falling(256, 3e-4, 20),
        "256, 1e-3, cosine 10": falling(256, 1e-3, 10),
        "1024, 1e-3, cosine 20, warm-up 1": falling(1024, 1e-3, 20, warmup=1),
        "1024, 3e-3, cosine 20, warm-up 1": falling(1024, 3e-3, 20, warmup=1),
        "1024, 1e-3, cosine 20, matrices decayed": falling(1024, 1e-3, 20, decayed="matrices"),
        "1024, 1e-3, cosine 20, no decay": falling(1024, 1e-3, 20, weight_decay=0),
        "1024, 1e-3, cosine 20, decay 5e-4": falling(1024, 1e-3, 20, weight_decay=5e-4),
        "1024, 1e-3, average .99": plan(1024, 1, 1e-3, average=0.99),
        "1024, 1e-3, average .998": plan(1024, 1, 1e-3, average=0.998),
        "1024, 1e-3, cosine 20, adam": falling(1024, 1e-3, 20, optimizer="adam"),
        "512, 1e-3, cosine 100, 16 a user": falling(512, 1e-3, 100, prefixes=16),
    }
    for name, sets in arms.items():
        yield Arm("optimisation", name, "ml100k", sets)


def _transfer() -> Iterator[Arm]:
    pairs = (("industrial", "office"), ("office", "industrial"), ("industrial", "magazine"))
    model: Sets = {"model.time": "none"}
    for source, target in pairs:
        plan = {**SMALL, **model} if target != "magazine" else {**SMALL, **model, "finetune.batch_size": 256}
        there = {**SOURCE, **model}
        for bias in (True, False):
            sets = {**plan, "model.item_bias": bias}
            named = "with ID" if bias else "without ID"
            yield Arm("transfer", f"scratch, {named}", target, sets)
            yield Arm("transfer", f"pre-trained, {named}", target, sets, source, there)
        without = {**plan, "model.item_bias": False}
        variants: dict[str, tuple[Sets, Sets]] = {
            "adapters alone": ({"finetune.transfer": "adapters"}, {}),
            "blocks alone": ({"finetune.transfer": "blocks"}, {}),
            "adapters frozen for 5 epochs": ({"finetune.frozen_epochs": 5}, {}),
            "adapters frozen throughout": ({"finetune.frozen_epochs": 60}, {}),
            "pre-trained with the full loss": ({}, {"pretrain.loss": "full"}),
            "pre-trained without ID": ({}, {"model.item_bias": False}),
            "pre-trained without ID, full loss": ({}, {"model.item_bias": False, "pretrain.loss": "full"}),
            "pre-trained for 10 epochs": ({}, {"pretrain.epochs": 10}),
            "pre-trained for 100 epochs": ({}, {"pretrain.epochs": 100}),
            "two layers": ({"model.num_layers": 2}, {"model.num_layers": 2}),
            "3e-4": ({"finetune.lr": 3e-4}, {}),
        }
        for name, (own, theirs) in variants.items():
            yield Arm("transfer", f"{name}, without ID", target, {**without, **own}, source, {**there, **theirs})
        for name, own in {"two layers": {"model.num_layers": 2}, "3e-4": {"finetune.lr": 3e-4}}.items():
            yield Arm("transfer", f"scratch, {name}, without ID", target, {**without, **own})


ARMS: dict[str, Arm] = {arm.key: arm for part in (_time, _missing, _optimisation, _transfer) for arm in part()}
