"""What is compared in docs/measurements.md: one arm a row of a table, each a `mmm4rec` command."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import Any

Sets = dict[str, Any]
"""Setting (dotted) -> value, as `--set` takes them."""

QUICK: Sets = {
    "finetune.batch_size": 1024,
    "finetune.accumulation": 1,
    "finetune.lr": 1e-3,
    "finetune.schedule": "cosine",
    "finetune.epochs": 10,
    "finetune.patience": 10,
    "model.max_len": 20,
    "model.time": "none",
}
"""The plan of all blocks but `optimisation`: short, and without the luck of an epoch that a constant rate leaves."""

LONG: Sets = {**QUICK, "finetune.prefixes": 16, "finetune.epochs": 30, "finetune.patience": 30, "model.max_len": 100}
"""For long windows, whose steps cost five times more: 16 targets of a user in an epoch."""

SMALL: Sets = {**QUICK, "finetune.batch_size": 512, "finetune.epochs": 30, "finetune.patience": 30}
"""The same for the small domains, in steps of half as many targets."""

TINY: Sets = {**SMALL, "finetune.batch_size": 256}
"""And for the tiny one."""

SOURCE: Sets = {
    "pretrain.batch_size": 512,
    "pretrain.accumulation": 1,
    "pretrain.lr": 1e-3,
    "pretrain.schedule": "cosine",
    "pretrain.epochs": 30,
    "model.max_len": 20,
    "model.time": "none",
}
"""Pre-training for the transfer."""

WIDER, WIDE = "magazine+ml100k", {**SOURCE, "pretrain.prefixes": 16}
"""What is added to the source where three domains are, and how: 16 targets of a user an epoch, since films are many."""


SAME_WORK = {
    *(f"{part}.{name}" for part in ("finetune", "pretrain") for name in ("lr", "schedule", "epochs", "patience")),
    *("finetune.warmup", "finetune.weight_decay", "finetune.decayed", "finetune.transfer", "finetune.frozen_epochs"),
    *("features.missing", "model.feature_scale"),
}
"""Settings that leave the time of an epoch as it is, next to nothing aside."""


KNOWN = "-known"
"""Behind the name of a source: its training part alone, each user's last two interactions left out."""


TARGETS = {"ml100k": (943, 96458), "industrial": (2917, 11509), "office": (2897, 11205), "magazine": (284, 1098)}
"""Users and training targets of the domains."""


@dataclass(frozen=True)
class Arm:
    """One row of a table."""

    block: str
    name: str
    domain: str
    sets: Sets = field(default_factory=dict)
    source: str | None = None
    """Pre-train on this domain (or on several, joined by "+") first, with the same seed."""
    source_sets: Sets = field(default_factory=dict)
    hidden: float = 0.0
    """Share of the images that are hidden before training."""
    users: float = 1.0
    """Share of the users that the domain has; the items stay."""

    @property
    def key(self) -> str:
        """Unique, and a file's name."""
        return f"{self.block}-{self.domain}-{self.name}".replace(" ", "_").replace("/", "_")

    @property
    def training(self) -> str:
        """Equal for arms that are the same training, so that tables may share rows."""
        return _training(vars(self))

    @property
    def work(self) -> str:
        """Equal for arms whose epochs cost the same."""
        sets = {name: value for name, value in self.sets.items() if name not in SAME_WORK}
        return json.dumps([self.domain, self.users, sets], sort_keys=True)

    @property
    def source_work(self) -> str | None:
        """The same of the epochs of pre-training."""
        sets = {name: value for name, value in self.source_sets.items() if name not in SAME_WORK}
        return None if self.source is None else json.dumps([self.source, sets], sort_keys=True)

    @property
    def steps_an_epoch(self) -> int:
        """Optimiser steps of an epoch of fine-tuning."""
        users, targets = (round(self.users * n) for n in TARGETS[self.domain])
        targets = min(targets, users * self.sets.get("finetune.prefixes", targets))
        return ceil(targets / (self.sets["finetune.batch_size"] * self.sets["finetune.accumulation"]))

    @property
    def source_key(self) -> tuple[Any, ...] | None:
        """Equal for arms that start from the same pre-training."""
        return None if self.source is None else (self.source, *sorted(self.source_sets.items()))


def written(sets: Sets) -> list[str]:
    """As `--set` takes them."""
    return [f"{path}={str(value).lower() if isinstance(value, bool) else value}" for path, value in sets.items()]


def _time() -> Iterator[Arm]:
    for length, plan in ((20, QUICK), (100, LONG)):
        for time in ("none", "observed", "published", "buckets", "decay"):
            yield Arm("time", f"{time} {length}", "ml100k", {**plan, "model.time": time})
    for time in ("none", "observed", "published", "buckets", "decay"):
        yield Arm("time", time, "magazine", {**TINY, "model.time": time})


def _missing() -> Iterator[Arm]:
    for hidden in (0.3, 0.5, 0.79):
        for missing in ("zero", "mean", "learned"):
            sets = {**QUICK, "features.missing": missing}
            yield Arm("missing", f"{missing} {hidden:.0%}", "ml100k", sets, hidden=hidden)
    yield Arm("missing", "scale none", "ml100k", QUICK)
    for scale in ("unit", "standard"):
        yield Arm("missing", f"scale {scale}", "ml100k", {**QUICK, "model.feature_scale": scale})


def _optimisation() -> Iterator[Arm]:
    model = {"model.max_len": 20, "model.time": "none"}

    def plan(batch: int, accumulation: int, lr: float, **more: Any) -> Sets:
        own = {"batch_size": batch, "accumulation": accumulation, "lr": lr, **more}
        return {**{f"finetune.{name}": value for name, value in own.items()}, **model}

    def falling(batch: int, lr: float, epochs: int, schedule: str = "cosine", **more: Any) -> Sets:
        return plan(batch, 1, lr, schedule=schedule, epochs=epochs, patience=epochs, **more)

    large = {
        "published": plan(1024, 8, 1e-4),
        "1024 x 8, 1e-3": plan(1024, 8, 1e-3),
        "1024, 1e-3": plan(1024, 1, 1e-3),
        "1024, 1e-3, average .99": plan(1024, 1, 1e-3, average=0.99),
        "1024, 1e-3, cosine 10": falling(1024, 1e-3, 10),
        "1024, 1e-3, cosine 20": falling(1024, 1e-3, 20),
        "1024, 1e-3, cosine 40": falling(1024, 1e-3, 40),
        "1024, 1e-3, linear 10": falling(1024, 1e-3, 10, "linear"),
        "1024, 5e-4, cosine 10": falling(1024, 5e-4, 10),
        "1024, 2e-3, cosine 10": falling(1024, 2e-3, 10),
        "1024, 3e-3, cosine 10": falling(1024, 3e-3, 10),
        "1024, 3e-3, cosine 10, warm-up 1": falling(1024, 3e-3, 10, warmup=1),
        "256, 5e-4, cosine 10": falling(256, 5e-4, 10),
        "512, 1e-3, cosine 10": falling(512, 1e-3, 10),
        "2048, 1e-3, cosine 10": falling(2048, 1e-3, 10),
        "2048, 2e-3, cosine 10": falling(2048, 2e-3, 10),
        "1024, 1e-3, cosine 10, warm-up 1": falling(1024, 1e-3, 10, warmup=1),
        "1024, 1e-3, cosine 10, average .99": falling(1024, 1e-3, 10, average=0.99),
        "1024, 1e-3, cosine 10, matrices decayed": falling(1024, 1e-3, 10, decayed="matrices"),
        "1024, 1e-3, cosine 10, no decay": falling(1024, 1e-3, 10, weight_decay=0),
        "1024, 1e-3, cosine 10, decay 5e-4": falling(1024, 1e-3, 10, weight_decay=5e-4),
        "1024, 1e-3, cosine 10, adam": falling(1024, 1e-3, 10, optimizer="adam"),
        "1024, 1e-3, cosine 40, 16 a user": falling(1024, 1e-3, 40, prefixes=16),
        "1024, 1e-3, cosine 80, 8 a user": falling(1024, 1e-3, 80, prefixes=8),
    }
    small = {
        "published": plan(1024, 8, 1e-4),
        "512, 1e-3": plan(512, 1, 1e-3),
        "512, 1e-3, average .99": plan(512, 1, 1e-3, average=0.99),
        "512, 1e-3, cosine 10": falling(512, 1e-3, 10),
        "512, 1e-3, cosine 30": falling(512, 1e-3, 30),
        "512, 3e-4, cosine 30": falling(512, 3e-4, 30),
        "512, 3e-4, average .99": plan(512, 1, 3e-4, average=0.99),
        "512, 1e-4, cosine 30": falling(512, 1e-4, 30),
        "256, 3e-4, cosine 30": falling(256, 3e-4, 30),
        "256, 1e-3, cosine 10": falling(256, 1e-3, 10),
        "1024, 1e-3, cosine 30": falling(1024, 1e-3, 30),
        "512, 1e-3, cosine 30, no decay": falling(512, 1e-3, 30, weight_decay=0),
    }
    tiny = {
        "published": plan(1024, 8, 1e-4),
        "256, 1e-3": plan(256, 1, 1e-3),
        "256, 1e-3, cosine 30": falling(256, 1e-3, 30),
        "256, 3e-4, cosine 30": falling(256, 3e-4, 30),
        "256, 1e-4, cosine 30": falling(256, 1e-4, 30),
        "64, 1e-3, cosine 30": falling(64, 1e-3, 30),
        "64, 3e-4, cosine 30": falling(64, 3e-4, 30),
    }
    for domain, arms in {"ml100k": large, "office": small, "magazine": tiny}.items():
        for name, sets in arms.items():
            yield Arm("optimisation", name, domain, sets)


def _transfer() -> Iterator[Arm]:
    for source, target in (("industrial", "office"), ("office", "industrial"), ("industrial", "magazine")):
        plan = TINY if target == "magazine" else SMALL
        for named, bias in BIAS.items():
            yield Arm("transfer", f"scratch, {named}", target, {**plan, **bias})
            yield Arm("transfer", f"pre-trained, {named}", target, {**plan, **bias}, source, SOURCE)
        if target == "magazine":
            continue
        for named, bias in BIAS.items():
            yield Arm("transfer", f"three domains, {named}", target, {**plan, **bias}, f"{source}+{WIDER}", WIDE)
        short = {"finetune.epochs": 3, "finetune.patience": 3}
        yield from _pairs(source, target, "3e-4", {**plan, "finetune.lr": 3e-4})
        yield from _pairs(source, target, "3 epochs", {**plan, **short})
    yield from _variants("industrial", "office")
    for share, said in ((0.3, "three tenths of the users"), (0.1, "a tenth of the users")):
        yield from _pairs("industrial", "office", said, TINY, users=share)


BIAS: dict[str, Sets] = {"with ID": {}, "without ID": {"model.item_bias": False}}
"""The bias is on unless it is said otherwise, so that the first of `_transfer` is the training of other tables."""


def _pairs(source: str, target: str, said: str, plan: Sets, users: float = 1.0) -> Iterator[Arm]:
    for name, bias in BIAS.items():
        yield Arm("transfer", f"scratch, {said}, {name}", target, {**plan, **bias}, users=users)
        yield Arm("transfer", f"pre-trained, {said}, {name}", target, {**plan, **bias}, source, SOURCE, users=users)


def _variants(source: str, target: str) -> Iterator[Arm]:
    without = {**SMALL, "model.item_bias": False}
    variants: dict[str, tuple[Sets, Sets]] = {
        "adapters alone": ({"finetune.transfer": "adapters"}, {}),
        "blocks alone": ({"finetune.transfer": "blocks"}, {}),
        "adapters frozen for 5 epochs": ({"finetune.frozen_epochs": 5}, {}),
        "adapters frozen throughout": ({"finetune.frozen_epochs": 30}, {}),
        "pre-trained with the full loss": ({}, {"pretrain.loss": "full"}),
        "pre-trained without ID": ({}, {"model.item_bias": False}),
        "pre-trained without ID, full loss": ({}, {"model.item_bias": False, "pretrain.loss": "full"}),
        "pre-trained for 5 epochs": ({}, {"pretrain.epochs": 5}),
        "pre-trained for 100 epochs": ({}, {"pretrain.epochs": 100}),
        "two layers": ({"model.num_layers": 2}, {"model.num_layers": 2}),
    }
    for name, (own, theirs) in variants.items():
        yield Arm("transfer", f"{name}, without ID", target, {**without, **own}, source, {**SOURCE, **theirs})
    yield Arm("transfer", "scratch, two layers, without ID", target, {**without, "model.num_layers": 2})
    parts: dict[str, tuple[Sets, Sets]] = {
        "adapters alone": ({"finetune.transfer": "adapters"}, {}),
        "blocks alone": ({"finetune.transfer": "blocks"}, {}),
        "pre-trained without ID": ({}, {"model.item_bias": False}),
    }
    for name, (own, theirs) in parts.items():
        sets = {**SMALL, "finetune.lr": 3e-4, **own}
        yield Arm("transfer", f"{name}, 3e-4, with ID", target, sets, source, {**SOURCE, **theirs})
    for named, bias in BIAS.items():
        known = f"{source}+{target}{KNOWN}"
        yield Arm("transfer", f"own history too, {named}", target, {**SMALL, **bias}, known, SOURCE)


ARMS: dict[str, Arm] = {arm.key: arm for part in (_time, _missing, _optimisation, _transfer) for arm in part()}


def training_of(row: dict[str, Any]) -> str:
    """`Arm.training` of a row."""
    return _training({"users": 1.0, **row})


def _training(of: dict[str, Any]) -> str:
    names = ("domain", "sets", "source", "source_sets", "hidden", "users")
    return json.dumps([of[name] for name in names], sort_keys=True)
