"""docs/measurements.md from the rows of a study: tables, intervals, learning curves, commands."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from arms import ARMS, KNOWN, Arm, Sets, training_of, written
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray
from torch import Tensor

from mmm4rec_cli.evaluation.compare import paired_bootstrap
from mmm4rec_cli.evaluation.metrics import per_user

METRIC = "NDCG@10"
FINDINGS = Path(__file__).with_name("findings.md")
"""What the tables say in words: a beginning, then one part a section."""
Row = dict[str, Any]


class Results:
    """Rows by training and seed, and the ranks of their users."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, dict[int, Row]] = defaultdict(dict)
        self.raw = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        self.paces = {row["pace"]: row["seconds"] for row in self.raw if "pace" in row}
        for row in self.raw:
            if "curve" in row:
                self.rows[training_of(row)][row["seed"]] = row

    def of(self, arm: Arm) -> list[Row]:
        """Rows in the order of the seeds."""
        return [row for _, row in sorted(self.rows[arm.training].items())]

    def seconds(self, arm: Arm, epochs: float) -> str:
        """Of so many epochs of a training that has the device for itself."""
        pace = self.paces.get(arm.work)
        return "–" if pace is None else f"{epochs * pace:.1f}"

    def ranks(self, arm: Arm, seeds: Iterable[int], kind: str) -> list[Tensor]:
        """One tensor a seed."""
        rows = self.rows[arm.training]
        files = (self.folder / f"{rows[seed]['arm']}-seed{seed}-ranks_{kind}.npy" for seed in seeds)
        return [torch.from_numpy(np.load(file)).double() for file in files]

    def difference(self, arm: Arm, other: Arm, kind: str) -> dict[str, float] | None:
        """Of the means over the seeds that both have, with its interval; None where they share none."""
        seeds = sorted(self.rows[arm.training].keys() & self.rows[other.training].keys())
        if not seeds or arm.training == other.training:
            return None
        ours, theirs = (self.ranks(each, seeds, kind) for each in (arm, other))
        pairs = ([self.rows[each.training][seed][kind][METRIC] for seed in seeds] for each in (arm, other))
        above = sum(a > b for a, b in zip(*pairs, strict=True))
        return interval(ours, theirs) | {"above": above, "seeds": len(seeds)}


RESAMPLES = 2000


@cache
def _drawn(users: int) -> NDArray[np.float64]:
    """How often each user is drawn in each resample, as a share of all [R, U]."""
    return np.random.default_rng(0).multinomial(users, np.full(users, 1 / users), RESAMPLES) / users


def interval(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[str, float]:
    """Difference of the means with the 95 % interval of a paired bootstrap over users and over seeds.

    Users alone would say how sure we are of these very trainings; a reader wants to know about the next one. Seeds are
    drawn in pairs, their spread widened by √(n / (n - 1)) because so few are drawn from; one seed says nothing of it.

    Args:
        ours: rank0 [U] of each seed.
        theirs: the same of the other arm, the same seeds in the same order.
    """
    pairs = zip(ours, theirs, strict=True)
    gaps_SU = np.stack([(per_user(a, METRIC) - per_user(b, METRIC)).numpy() for a, b in pairs])
    seeds = len(gaps_SU)
    drawn_RS = _drawn(gaps_SU.shape[1]) @ gaps_SU.T
    means_R = drawn_RS.mean(1)
    if seeds > 1:
        chosen_RS = np.random.default_rng(1).integers(seeds, size=(RESAMPLES, seeds))
        off_RS = (drawn_RS - means_R[:, None]) * (seeds / (seeds - 1)) ** 0.5
        means_R = means_R + np.take_along_axis(off_RS, chosen_RS, 1).mean(1)
    low, high = np.percentile(means_R, (2.5, 97.5))
    return {"difference": float(gaps_SU.mean()), "low": float(low), "high": float(high)}


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± sample standard deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def gap(found: dict[str, float] | None) -> str:
    """A difference with its interval, and in how many seeds it is one upwards."""
    if found is None:
        return "–"
    said = f"{found['difference']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
    return f"{said} {found['above']}/{found['seeds']}" if "seeds" in found else said


def table(results: Results, arms: Sequence[Arm], reference: Callable[[Arm], Arm], against: str) -> list[str]:
    """One row an arm that has rows, the reference's differences left out; the others by name."""
    if not any(results.of(arm) for arm in arms):
        return ["Not measured yet.", ""]
    lines = [
        f"| arm | seeds | valid {METRIC} | test Hit@10 | test {METRIC} | valid, less {against} | test, less {against} "
        "| best epoch | seconds to it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        rows = results.of(arm)
        if not rows:
            continue
        gaps = [gap(results.difference(arm, reference(arm), kind)) for kind in ("valid", "test")]
        lines.append(
            f"| {arm.name} | {len(rows)} | {spread([r['valid'][METRIC] for r in rows])} | "
            f"{spread([r['test']['Hit@10'] for r in rows])} | {spread([r['test'][METRIC] for r in rows])} | "
            f"{' | '.join(gaps)} | {mean(r['best_epoch'] for r in rows):.0f} | "
            f"{results.seconds(arm, mean(r['best_epoch'] for r in rows))} |"
        )
    missing = [arm.name for arm in arms if not results.of(arm)]
    if missing:
        lines += ["", f"Not measured yet: {'; '.join(missing)}."]
    return [*lines, ""]


def reaching(results: Results, arms: Iterable[Arm], first: Arm, share: float) -> list[str]:
    """Epochs, steps and seconds until the validation metric first reaches a share of the best of `first`."""
    if not results.of(first):
        return []
    level = share * mean(r["valid"][METRIC] for r in results.of(first))
    what = "the best" if share == 1 else f"{share:.0%} of the best"
    lines = [
        f"Until the validation {METRIC} first reaches {what} of {first.name} ({level:.4f}), means:",
        "",
        "| arm | seeds that reach it | epochs | steps | seconds |",
        "|---|---|---|---|---|",
    ]
    for arm in arms:
        reached = []
        for row in results.of(arm):
            at = next((i for i, value in enumerate(row["curve"][METRIC], 1) if value >= level), None)
            reached += [] if at is None else [at]
        said = "– | – | –"
        if reached:
            epochs = mean(reached)
            said = f"{epochs:.1f} | {epochs * arm.steps_an_epoch:.0f} | {results.seconds(arm, epochs)}"
        if results.of(arm):
            lines.append(f"| {arm.name} | {len(reached)} of {len(results.of(arm))} | {said} |")
    return [*lines, ""]


def commands(results: Results, arms: Sequence[Arm]) -> list[str]:
    """Folded away: the commands of all arms with seed 1; what all of them set stands once, before them."""
    shared = {}
    for name, part in (("PLAN", "sets"), ("SOURCE", "source_sets")):
        each = [written(getattr(arm, part)) for arm in arms if getattr(arm, part)]
        shared[name] = [one for one in (each[0] if each else []) if all(one in other for other in each)]
    lines = ["<details><summary>the commands</summary>", "", "```"]
    lines += [f'{name}="{_typed(words)}"' for name, words in shared.items() if words]

    def typed(words: str, name: str, sets: Sets, more: Sequence[str]) -> str:
        own = [one for one in written(sets) if one not in shared[name]]
        return " ".join(filter(None, (words, "--seed 1", f"${name}" if shared[name] else "", _typed([*own, *more]))))

    for arm in arms:
        rows = results.of(arm)
        more = rows[0].get("more", ()) if rows else ()
        remarks = [f"{arm.hidden:.0%} of the images hidden by the runner"] if arm.hidden else []
        remarks += [f"{1 - arm.users:.0%} of the users left out by the runner"] if arm.users < 1 else []
        source = arm.source or ""
        remarks += [f"{source.split('+')[-1]}: its training part, cut by the runner"] if source.endswith(KNOWN) else []
        lines.append(f"# {', '.join([arm.name, *remarks])}")
        if arm.source is not None:
            domains = " ".join(f"--domain {one}" for one in arm.source.split("+"))
            lines.append(typed(f"mmm4rec pretrain {domains}", "SOURCE", arm.source_sets, more))
        start = "none" if arm.source is None else "RUN"
        lines.append(typed(f"mmm4rec finetune --domain {arm.domain} --pretrained {start}", "PLAN", arm.sets, more))
    return [*lines, "```", "", "</details>", ""]


def _typed(words: Iterable[str]) -> str:
    return " ".join(f"--set {one}" for one in words)


def curves(results: Results, panels: dict[str, Sequence[Arm]], title: str, path: Path, steps: bool = False) -> str:
    """Validation NDCG@10 by epoch (or step) as a picture, one panel a title; the line that shows it.

    Lines are means over the seeds, bands reach from the lowest to the highest.
    """
    figure = Figure(figsize=(1.6 + 4.8 * len(panels), 3.4), layout="constrained")
    for axes, (said, arms) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, arm in enumerate(arms):
            rows = results.of(arm)
            if not rows:
                continue
            length = min(len(row["curve"][METRIC]) for row in rows)
            values = np.array([row["curve"][METRIC][:length] for row in rows])
            epochs = np.arange(1, length + 1) * (arm.steps_an_epoch if steps else 1)
            style, label = ("-", "--", "-.", ":")[i % 4], f"{arm.name} ({len(rows)} seed{'s' * (len(rows) > 1)})"
            (line,) = axes.plot(epochs, values.mean(0), style, label=label)
            axes.fill_between(epochs, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set(xlabel="optimiser steps" if steps else "epoch", ylabel=f"validation {METRIC}", title=said)
        if steps:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    with rc_context({"svg.hashsalt": title}):  # the same rows are the same file
        figure.savefig(path, format="svg", metadata={"Date": None})
    return f"![{title}]({path.name})"


def _of(block: str, domain: str) -> list[Arm]:
    return [arm for arm in ARMS.values() if arm.block == block and arm.domain == domain]


def _time(results: Results, out: Path) -> list[str]:
    lines = []
    for length in (20, 100):
        arms = [arm for arm in _of("time", "ml100k") if arm.name.endswith(f" {length}")]
        lines += [f"ml100k, `model.max_len = {length}`:", ""]
        lines += table(results, arms, lambda arm, first=arms[0]: first, "none")
        lines += commands(results, arms)
    arms = _of("time", "magazine")
    lines += ["magazine:", "", *table(results, arms, lambda arm: arms[0], "none"), *commands(results, arms)]
    lines += ["What `published` loses when the label's stamp is taken away at test alone:", ""]
    lines += ["| | seeds | with it | without it | difference |", "|---|---|---|---|---|"]
    for arm in (a for a in ARMS.values() if a.sets.get("model.time") == "published"):
        rows = results.of(arm)
        if rows:
            seeds = [row["seed"] for row in rows]
            without, have = (results.ranks(arm, seeds, kind) for kind in ("without_target_time", "test"))
            lines.append(
                f"| {arm.domain}, {arm.name} | {len(rows)} | {spread([r['test'][METRIC] for r in rows])} | "
                f"{spread([r['test_without_target_time'][METRIC] for r in rows])} | "
                f"{gap(paired_bootstrap(without, have, (10,))[METRIC])} |"
            )
    return [*lines, ""]


def _missing(results: Results, out: Path) -> list[str]:
    arms = _of("missing", "ml100k")
    scaled = [arm for arm in arms if arm.name.startswith("scale")]
    hidden = [arm for arm in arms if arm.hidden]

    def mean_of(arm: Arm) -> Arm:
        return next(each for each in hidden if each.hidden == arm.hidden and "mean" in each.name)

    lines = ["Images hidden at random, by the seed, before training:", ""]
    lines += [*table(results, hidden, mean_of, "mean"), *commands(results, hidden)]
    lines += ["`model.feature_scale`, no image hidden:", "", *table(results, scaled, lambda arm: scaled[0], "none")]
    return [*lines, *commands(results, scaled)]


def _optimisation(results: Results, out: Path) -> list[str]:
    lines = []
    for domain in ("ml100k", "office", "magazine"):
        arms = _of("optimisation", domain)
        published = arms[0]
        found = [arm for arm in arms if results.of(arm)]
        found.sort(key=lambda arm: -mean(r["valid"][METRIC] for r in results.of(arm)))
        rest = [arm for arm in arms if arm not in found]
        lines += [f"{domain}:", "", *table(results, [*found, *rest], lambda arm, p=published: p, "published")]
        lines += reaching(results, found, published, 1.0)
        shown = [arm for arm in arms if arm.name in SHOWN]
        path = out.with_name(f"{out.stem}-plans-{domain}.svg")
        title = f"plans on {domain}"
        lines += [curves(results, {title: shown}, title, path, steps=True), "", *commands(results, arms)]
    return lines


SHOWN = {
    *("published", "1024, 1e-3", "1024, 1e-3, average .99", "1024, 1e-3, cosine 10", "1024, 1e-3, cosine 20"),
    *("512, 1e-3", "512, 1e-3, cosine 30", "512, 3e-4, cosine 30", "512, 3e-4, average .99"),
    *("256, 1e-3", "256, 1e-3, cosine 30", "256, 3e-4, cosine 30"),
}
"""Plans whose curves are drawn."""


def _transfer(results: Results, out: Path) -> list[str]:
    lines = []
    for domain in ("office", "industrial", "magazine"):
        arms = _of("transfer", domain)
        named = {arm.name: arm for arm in arms}

        def scratch(arm: Arm, named: dict[str, Arm] = named) -> Arm:
            """From scratch in the same way."""
            rest = arm.name.split(", ", 1)[1]
            names = (f"scratch, {arm.name}", f"scratch, {rest}", f"scratch, {rest.split(', ')[-1]}")
            return next(named[name] for name in names if name in named)

        source = next(arm.source for arm in arms if arm.source)
        main = [arm for arm in arms if arm.name.startswith(("scratch, with", "pre-trained, with"))]
        three = [arm for arm in arms if arm.name.startswith("three domains")]
        slow = [arm for arm in arms if ", 3e-4, " in arm.name]
        short = [arm for arm in arms if ", 3 epochs, " in arm.name]
        fewer = [arm for arm in arms if arm.users < 1]
        rest = [arm for arm in arms if arm not in (*main, *three, *slow, *short, *fewer)]
        lines += [f"### {source} → {domain}", "", *table(results, [*main, *three], scratch, "scratch")]
        for kind in ("with ID", "without ID"):
            lines += reaching(
                results, [a for a in main if a.name.endswith(f", {kind}")], named[f"scratch, {kind}"], 0.95
            )
        title = f"{source} → {domain}"
        panels = {
            title: main,
            f"{title}, 3e-4": [a for a in slow if a.name.startswith(("scratch", "pre-trained,"))],
            f"{title}, a tenth of the users": fewer[-4:],
        }
        panels = {said: group for said, group in panels.items() if any(results.of(arm) for arm in group)} or {
            title: main
        }
        lines += [curves(results, panels, title, out.with_name(f"{out.stem}-{domain}.svg")), ""]
        for said, group in (
            ("At 3e-4:", slow),
            ("Three epochs and no more, the rate falling to their end:", short),
            (
                "Fewer users in the target, drawn once by the runner, all its items, the plan of the tiny domain:",
                fewer,
            ),
            ("What else could help:", rest),
        ):
            if group:
                lines += [said, "", *table(results, group, scratch, "scratch")]
        lines += commands(results, arms)
    return lines


SECTIONS = (_time, _missing, _optimisation, _transfer)


def page(folder: Path, out: Path) -> None:
    """Write the page, its pictures and the rows beside it."""
    results = Results(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    finished = [row for rows in results.rows.values() for row in rows.values()]
    machines = sorted({f"{row['device'].replace('x86_64', 'a CPU')}, torch {row['torch']}" for row in finished})
    start, *texts = FINDINGS.read_text(encoding="utf-8").split("\n## ")
    lines = ["# Measurements", "", start.strip(), ""]
    lines += [
        f"{len(finished)} fine-tunings on {' and '.join(machines)}. The settings, learning curve and metrics of each "
        f"row: `{out.stem}.jsonl`.",
        "",
    ]
    for text, section in zip(texts, SECTIONS, strict=True):
        lines += [f"## {text.strip()}", "", *section(results, out)]
    out.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    out.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in results.raw), encoding="utf-8")
