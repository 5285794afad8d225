"""The page of measured kernel numbers, from the rows of `run`.

python kernels/benchmarks/page.py > docs/kernels.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
ROWS = ("h200_kernels.jsonl", "h100_kernels.jsonl")
COLD_ROWS = ("h200_cold.jsonl", "h100_cold.jsonl")
COLD = 15.0
"""Seconds that a cold first call at most 64 places long may take."""
FORWARD, BOTH = "forward", "forward+backward"
OTHER_RUNS = ("h200_chunks.jsonl", "h200.jsonl", "h200_tiles.jsonl", "h100_variants.jsonl")
"""Rows of these operations from before `run` took its present form, or of kernels on the way."""
COMMAND = "python kernels/benchmarks/run.py --out kernels/benchmarks/results/h200_kernels.jsonl"
WHERE = ("operation", "form", "peer", "batch", "length", "packed", "products", "direction", "device")
"""What a row is a measurement of; a later one takes the place of an earlier one."""
OURS = "triton"
PRODUCTS = ("tf32x3", "tf32", "bfloat16")
PEERS = ("naive", "compiled", "mamba-ssm", "simple_gla", "causal-conv1d")
"""What the names of the peers' forms begin with."""
TITLES = {
    "ssd": "The scan: `ssd`",
    "causal_conv1d": "The convolution: `causal_conv1d`",
    "gated_rms_norm": "The norm: `gated_rms_norm`",
    "ssd_block": "The whole block: `ssd_block`",
}


def read(path: Path) -> list[Row]:
    """All rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each measurement, in the order in which they were taken."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row.get(name) for name in WHERE)
        found.pop(key, None)
        found[key] = row
    return list(found.values())


def newest(rows: list[Row]) -> list[Row]:
    """Of rows in the order in which they were taken those of the last one's commit."""
    return [row for row in rows if row["commit"] == rows[-1]["commit"]]


def own(rows: list[Row], field: str) -> Row | None:
    """Our newest row that has a field; of those of one commit the one of a process of its own."""
    found = newest([row for row in rows if row["form"] == OURS and field in row])
    return min(found, key=lambda row: row["peer"] != OURS, default=None)


def rank(row: Row) -> tuple[int, int, str]:
    """Where a form stands in a table."""
    order, name = (OURS, "torch", *PEERS), row["form"]
    return next((i for i, start in enumerate(order) if name.startswith(start)), len(order)), len(name), name


def where(row: Row) -> str:
    """The shape of a row in words."""
    if "batch" not in row:
        return ""
    if row["packed"]:
        return f"{row['batch']:,} packed, {row['places']:,} places"
    return f"{row['batch']} × {row['length']}"


def select(rows: Iterable[Row], **wanted: Any) -> Iterator[Row]:
    """The rows whose fields are as wanted."""
    return (row for row in rows if all(row.get(name) == value for name, value in wanted.items()))


def ratio(rows: list[Row], row: Row, field: str) -> float | None:
    """How often our time, taken in the same process, fits into that of a row."""
    keys = ("operation", "peer", "batch", "length", "packed", "products", "direction", "device", "commit")
    ours = next(select(rows, form=OURS, **{key: row.get(key) for key in keys}), {})
    return row[field] / ours[field] if row.get(field) and ours.get(field) else None


def number(value: float | None, form: str = ",.0f") -> str:
    """A cell; a dash for what there is not."""
    return "–" if value is None else format(value, form)


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> Iterator[str]:
    """A table of Markdown."""
    head = list(head)
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(line)} |" for line in lines)
    yield ""


def measured(rows: list[Row], operation: str) -> Iterator[str]:
    """One table a shape: a line for each form and kind of products."""
    mine = [row for row in select(rows, operation=operation) if "batch" in row]
    for packed, length, batch in sorted({(row["packed"], row["length"], -row["batch"]) for row in mine}):
        here = list(select(mine, packed=packed, length=length, batch=-batch))
        yield f"**{where(here[0])}**"
        yield ""
        lines = []
        for products in PRODUCTS:
            for form in dict.fromkeys(row["form"] for row in sorted(here, key=rank)):
                found = {}
                of_form = list(select(here, products=products, form=form))
                for direction in dict.fromkeys(row.get("direction") for row in of_form):
                    way = list(select(of_form, direction=direction))
                    found[direction] = (own(way, "us") if form == OURS else None) or way[-1]
                if found:
                    lines.append(line(rows, form, products, found))
        head = (
            "form",
            "products",
            "forward",
            "both",
            "both, as called",
            "host",
            "both ÷ floor",
            "both ÷ ours",
            "called",
            "commit",
        )
        yield from table(head, lines)


def line(rows: list[Row], form: str, products: str, found: dict[str | None, Row]) -> list[str]:
    forward, both = found.get(FORWARD, {}), found.get(BOTH, {})
    error = both.get("error") or found.get(None, {}).get("error")
    commit = next(iter(found.values())).get("commit", "")
    if error and not forward.get("us"):
        return [form, products, error[:120].replace("|", "/"), *[""] * 6, commit]
    beside = form != OURS
    return [
        form,
        products,
        number(forward.get("us")),
        f"failed: {error[:90]}".replace("|", "/") if error else number(both.get("us")),
        number(both.get("call_us")),
        number(both.get("host_us")),
        number(both["us"] / both["floor_us"] if both.get("us") and both.get("floor_us") else None, ".1f"),
        number(ratio(rows, both, "us") if beside else None, ".1f"),
        number(ratio(rows, both, "call_us") if beside else None, ".1f"),
        commit,
    ]


def times(rows: list[Row], operation: str, batch: int, length: int, products: str, direction: str) -> list[Row]:
    """Every row of one place of the tables."""
    return list(
        select(
            rows,
            operation=operation,
            batch=batch,
            length=length,
            packed=False,
            products=products,
            direction=direction,
        )
    )


def at_most(
    operation: str, batch: int, length: int, products: str, direction: str, bound: Callable[[Row], float], said: str
) -> Callable[[list[Row]], list[str]]:
    """A goal on our own time."""

    def judge(rows: list[Row]) -> list[str]:
        found = own(times(rows, operation, batch, length, products, direction), "us")
        what = f"`{operation}` {batch} × {length}, {products}, {direction}"
        if found is None:
            return [what, said, "–", "–", "not measured", ""]
        met = "yes" if found["us"] <= bound(found) else f"no: {found['us'] / bound(found):.2f} × the goal"
        return [what, said, f"{found['us']:.0f} µs", f"{found['call_us']:.0f} µs", met, found["commit"]]

    return judge


def faster(length: int, batch: int, peer: str, factor: float) -> Callable[[list[Row]], list[str]]:
    """A goal on the scan's ratio to the best form of a peer."""

    def judge(rows: list[Row]) -> list[str]:
        found = [row for row in times(rows, "ssd", batch, length, "tf32", BOTH) if row["form"].startswith(peer)]
        found = [row for row in found if row.get("call_us")]
        what = f"`ssd` {batch} × {length}, tf32, {BOTH}"
        if not found:
            return [what, f"≥ {factor:g} × {peer}", "–", "–", "not measured", ""]
        found, parts, best = newest(found), [], 0.0
        for field in ("us", "call_us"):
            ratios = [r for row in found if (r := ratio(rows, row, field)) is not None]
            parts.append(f"{min(ratios):.1f} ×" if ratios else "–")
            best = best or (min(ratios) if ratios else 0.0)
        met = "yes" if best >= factor else f"no: {best / factor:.2f} of the goal"
        return [what, f"≥ {factor:g} × {peer}", parts[0], parts[1], met, found[0]["commit"]]

    return judge


GOALS = (
    at_most("ssd_block", 1024, 20, "tf32", BOTH, lambda row: 205, "≤ 205 µs"),
    at_most("ssd_block", 1024, 20, "bfloat16", BOTH, lambda row: 110, "≤ 110 µs"),
    at_most("ssd_block", 1024, 20, "tf32", FORWARD, lambda row: 75, "≤ 75 µs"),
    at_most("ssd", 1024, 20, "tf32", BOTH, lambda row: 1.5 * row["floor_us"], "≤ 1.5 × byte floor"),
    faster(20, 1024, "naive", 10),
    faster(20, 1024, "compiled", 5),
    faster(20, 1024, "mamba-ssm", 20),
    faster(50, 1024, "naive", 8),
    faster(50, 1024, "mamba-ssm", 8),
    faster(200, 256, "mamba-ssm", 2),
    faster(1024, 64, "mamba-ssm", 2),
    faster(4096, 8, "mamba-ssm", 2),
    at_most("causal_conv1d", 1024, 20, "tf32", BOTH, lambda row: 1.5 * row["floor_us"], "≤ 1.5 × byte floor"),
)


def other_runs(rows: Iterable[Row]) -> Iterator[str]:
    """Rows of other files, a line for each form at one shape."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        shape = f"{row['batch']} × {row['length']}"
        if row["length"] is None:
            shape = f"{row['batch']:,} packed, {row['packed_places']:,} places, at most {row['max_length']}"
        of = ", ".join([*filter(None, [row.get("commit")]), *([f"call {row['call']}"] if "call" in row else [])])
        key = (f"`{row['operation']}`", row["form"], shape, row["products"], of)
        found.setdefault(key, {})[row.get("direction", BOTH)] = row
    lines = []
    for (*parts, of), both in found.items():
        times = [both.get(direction, {}).get("us") for direction in (FORWARD, BOTH)]
        if any(times):
            lines.append([*parts, *map(number, times), of])
    yield from table(("operation", "form", "shape", "products", "forward", "both", "run"), lines)


def first_calls(rows: list[Row]) -> Iterator[str]:
    """Cold first calls, the last of each."""
    keys = ("operation", "batch", "length", "packed")
    lines = []
    for row in {tuple(row[key] for key in keys): row for row in rows}.values():
        shape = f"{row['batch']:,} packed, at most {row['length']}" if row["packed"] else where(row)
        times = [number(row.get(name), ".1f") for name in ("first_s", "process_s")]
        met = row.get("error") or ("yes" if row["first_s"] <= COLD else "no")
        lines.append([f"`{row['operation']}`", shape, *times, met, row.get("note", ""), row["commit"]])
    head = ("operation", "shape", "first call, s", "whole process, s", f"≤ {COLD:g} s", "machine", "commit")
    yield from table(head, lines)


def on_cpu(rows: Iterable[Row]) -> Iterator[str]:
    """The scan on a CPU: the last rows of each shape, ours beside the naive form."""
    found: dict[tuple[int, int], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["batch"], row["length"]), {})[row["form"]] = row
    lines = []
    for (batch, length), forms in found.items():
        naive, ours = forms["naive"], forms["torch"]
        cells = [f"{row[way]:.1f}" for way in ("forward_ms", "both_ms") for row in (naive, ours)]
        ratio = f"{naive['both_ms'] / ours['both_ms']:.1f} ×"
        lines.append([f"{batch} × {length}", *cells, ratio, str(ours["threads"]), ours["note"], ours["commit"]])
    head = ("shape", "naive forward, ms", "ours", "naive both", "ours", "ratio", "threads", "machine", "commit")
    yield from table(head, lines)


def of_device(rows: list[Row], device: str, cold: list[Row]) -> Iterator[str]:
    """Everything measured on one kind of card."""
    about = {name: sorted({row[name] for row in rows}) for name in ("torch", "triton", "commit")}
    there = {row["form"] for row in rows if "batch" in row}
    missing = sorted({f"{row['form']}: {row['error']}" for row in rows if row["form"] not in there})
    unseen = [peer for peer in PEERS if not any(row["form"].startswith(peer) for row in rows)]
    missing += [f"no rows of {', '.join(unseen)} yet"] if unseen else []
    yield f"## {device}"
    yield ""
    yield ", ".join(f"{name} {' and '.join(said)}" for name, said in about.items()) + "."
    yield ""
    yield from (f"Not there: {said}" for said in missing)
    yield from [""] if missing else []
    yield "### Goals"
    yield ""
    head = ("what", "goal", "device", "as called", "met on the device", "commit")
    yield from table(head, (goal(rows) for goal in GOALS))
    if cold:
        yield "### Cold first calls, forward and backward, float32"
        yield ""
        yield from first_calls(cold)
    for operation, title in TITLES.items():
        yield f"### {title}"
        yield ""
        yield from measured(rows, operation)


def page(rows: list[Row], others: dict[str, list[Row]], cold: Iterable[Row] = (), cpu: Iterable[Row] = ()) -> str:
    """The whole page: of the rows, of other files' rows by the name of the file, of cold first calls, and on a CPU."""
    undisturbed = latest(row for row in rows if "disturbed" not in row)
    lines = [
        "# Kernels, measured",
        "",
        "This page is made by `python kernels/benchmarks/page.py`; the rows come from",
        "",
        f"    {COMMAND}",
        "",
        "Times are medians in microseconds. *forward* and *both* (forward and backward) are device times of CUDA-graph",
        "replays; *as called* is an ordinary call of both until the device is done, *host* the part of it in which the",
        "host is busy. *floor* is each input read once and each output written once at what a copy moves (4.3 TB/s on",
        "an H200, 3.0 TB/s on an H100). *both ÷ ours* and *called* divide by our Triton kernels timed in the same",
        "process: below 1 the other form is faster. *tf32x3* are three TF32 products in place of one float32 product,",
        "*tf32* one. A dash: not measured, or not recordable as a graph. Every form was compared with the float64",
        "recurrence on the batch that was timed, before that. Heads 8, head dim 64, state 64, one group a head, 4",
        "taps. The naive forms and those of torch.compile have no packed sequences: they run padded, as 1024 × 20.",
        "mamba-ssm's block knows no time factor, and would take one norm a group: it gates, and its norm follows.",
        "simple_gla 0.6 refuses its backward pass on these cards with this Triton, so 0.2.2 is timed too. A cold",
        "first call is one in a fresh process with an empty cache of kernels (`python kernels/benchmarks/cold.py`).",
        "The goals were set for an H200. *commit* is the state of our kernels that a row, and the ratio in it, was",
        "measured with. Rows that another process disturbed are marked so in the files and left out here.",
        "",
    ]
    for device in dict.fromkeys(row["device"] for row in undisturbed):
        lines += of_device(list(select(undisturbed, device=device)), device, list(select(cold, device=device)))
    lines += ["## CPU: the scan, `torch` beside the naive form (`cpu_scan.py`)", "", *on_cpu(cpu)]
    for name, found in others.items():
        lines += [f"## Other runs: {name}", "", *other_runs(found)]
    return "\n".join(lines).rstrip() + "\n"


def measured_rows(folder: Path, names: Iterable[str] = ROWS) -> list[Row]:
    """The rows of every card, those of an H200 first."""
    return [row for name in names if (folder / name).exists() for row in read(folder / name)]


def beside(folder: Path) -> dict[str, list[Row]]:
    """The rows of OTHER_RUNS by their names."""
    return {name: read(folder / name) for name in OTHER_RUNS if (folder / name).exists()}


def written(folder: Path) -> str:
    """The page of a folder of results."""
    cold, cpu = (measured_rows(folder, names) for names in (COLD_ROWS, ("cpu_scan.jsonl",)))
    return page(measured_rows(folder), beside(folder), cold, cpu)


if __name__ == "__main__":
    sys.stdout.write(written(RESULTS))
