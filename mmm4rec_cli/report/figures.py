"""The plots of the report, as inline SVG that takes its colours from the page (light and dark alike)."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmm4rec_cli.report.gather import Facts

# Colours that stand for the page's own: each is replaced by a CSS variable once the plot is written.
INK, QUIET, GRID = "#010101", "#010102", "#010103"
SERIES = ("#010111", "#010112", "#010113", "#010114", "#010115", "#010116")
_VARIABLES = {INK: "--ink", QUIET: "--quiet", GRID: "--line", **{c: f"--s{i + 1}" for i, c in enumerate(SERIES)}}

# A run is told by its line and mark, or by its hatching, not by its colour alone.
LINES, MARKS, HATCHES = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v", "P"), ("", "////", "....", "xxxx")
WIDTH, HEIGHT = 4.0, 2.8
"""Inches: at 360 pixels of screen the text still has its size."""


@contextmanager
def _style() -> Iterator[None]:
    options: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "mmm4rec",
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.color": INK,
        "axes.labelcolor": QUIET,
        "axes.edgecolor": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": QUIET,
        "ytick.labelcolor": QUIET,
        "hatch.color": INK,
        "hatch.linewidth": 0.5,
        "legend.frameon": False,
    }
    with matplotlib.rc_context(options):
        yield


def _svg(name: str, label: str, draw: Callable[[Axes], None], height: float = HEIGHT) -> str:
    """Draw one plot; `name` makes its ids its own, `label` says in words what it shows."""
    with _style():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure.add_subplot())
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # Inline in HTML the two namespaces are known; declared, they would read as addresses.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'<svg width="[^"]*" height="[^"]*"', "<svg", svg, count=1)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{_attribute(label)}"', 1).strip()


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def loss_curve(runs: Sequence[Facts]) -> str:
    """Training loss by epoch, all runs and seeds."""

    def draw(axes: Axes) -> None:
        _curves(axes, runs, "loss")
        axes.set_ylabel("training loss")

    return _svg("loss", f"Training loss by epoch. {_ends(runs, 'loss')}", draw)


def valid_curve(runs: Sequence[Facts]) -> str:
    """The validation metric by epoch, the best epoch ringed."""

    def draw(axes: Axes) -> None:
        _curves(axes, runs, "valid")
        axes.set_ylabel(f"validation {' / '.join(dict.fromkeys(run.metric for run in runs))}")

    return _svg("valid", f"Validation metric by epoch, best epoch ringed. {_ends(runs, 'valid')}", draw)


def _curves(axes: Axes, runs: Sequence[Facts], what: str) -> None:
    for i, run in enumerate(runs):
        for j, curve in enumerate(run.curves):
            values = curve.loss if what == "loss" else curve.valid
            colour, mark = SERIES[i % len(SERIES)], MARKS[i % len(MARKS)]
            axes.plot(
                curve.epochs,
                values,
                color=colour,
                linestyle=LINES[i % len(LINES)],
                marker=mark,
                markersize=3.5,
                markevery=max(1, len(values) // 8),
                label=run.label if j == 0 else None,
            )
            if curve.best_epoch in curve.epochs:
                best = values[curve.epochs.index(curve.best_epoch)]
                axes.plot(
                    [curve.best_epoch], [best], "o", markersize=10, markerfacecolor="none", markeredgecolor=colour
                )
                if j == 0 and len(runs) == 1:
                    right = curve.best_epoch > curve.epochs[len(curve.epochs) // 2]
                    axes.annotate(
                        f"best: epoch {curve.best_epoch}",
                        (curve.best_epoch, best),
                        xytext=(4 if right else -4, 10),  # above the ring, where neither curve comes back
                        textcoords="offset points",
                        ha="right" if right else "left",
                    )
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(0.06, 0.2)
    if len(runs) > 1:
        axes.legend()


def _ends(runs: Sequence[Facts], what: str) -> str:
    said = []
    for run in runs:
        curve = run.curves[0]
        values = curve.loss if what == "loss" else curve.valid
        if values:
            said.append(
                f"Run {run.label}: from {values[0]:.4f} to {values[-1]:.4f} over {len(values)} epochs, "
                f"best epoch {curve.best_epoch}."
            )
    return " ".join(said)


def segment_bars(kind: str, runs: Sequence[Facts], metric: str) -> str:
    """A metric by group of users, runs side by side; under each group its number of users where the runs agree."""
    groups = list(dict.fromkeys(group for run in runs for group in run.segments[kind]))
    heights = {run.label: [run.segments[kind].get(g, {}).get(metric) for g in groups] for run in runs}
    users = [{int(run.segments[kind][g]["n_users"]) if g in run.segments[kind] else 0 for run in runs} for g in groups]

    def draw(axes: Axes) -> None:
        _bars(
            axes,
            [f"{g}\n{max(n):,}" if len(n) == 1 else g for g, n in zip(groups, users, strict=True)],
            heights,
            "{:.3f}",
        )
        axes.set_ylabel(metric)

    said = "; ".join(
        f"{run.label}: "
        + ", ".join(f"{g} {v:.4f}" for g, v in zip(groups, heights[run.label], strict=True) if v is not None)
        for run in runs
    )
    return _svg(f"segment-{kind}", f"{metric} by {kind}. {said}", draw)


def ablation_bars(runs: Sequence[Facts], metric: str) -> str:
    """A metric with each part of the model switched off."""
    weighed = [run for run in runs if run.weighing is not None]
    parts = list(dict.fromkeys(part for run in weighed if run.weighing for part in run.weighing.without))
    heights = {
        run.label: [run.weighing.without.get(part, {}).get(metric) for part in parts] for run in weighed if run.weighing
    }
    names = ["whole\nmodel" if part == "nothing" else f"no {part}".replace(" ", "\n") for part in parts]

    def draw(axes: Axes) -> None:
        _bars(axes, names, heights, "{:.4f}" if len(weighed) == 1 else "{:.3f}")
        axes.set_ylabel(metric)

    said = "; ".join(
        f"{label}: " + ", ".join(f"without {p} {v:.4f}" for p, v in zip(parts, values, strict=True) if v is not None)
        for label, values in heights.items()
    )
    return _svg("ablation", f"{metric} with parts switched off. {said}", draw)


def _bars(axes: Axes, names: Sequence[str], heights: Mapping[str, Sequence[float | None]], shape: str) -> None:
    width = 0.72 / max(len(heights), 1)
    for i, (label, values) in enumerate(heights.items()):
        places = [x + (i - (len(heights) - 1) / 2) * width for x in range(len(names))]
        bars = axes.bar(
            places,
            [value or 0.0 for value in values],
            width * 0.92,
            color=SERIES[i % len(SERIES)],
            hatch=HATCHES[i % len(HATCHES)],
            label=label,
        )
        if len(heights) * len(names) <= 6:
            texts = ["" if value is None else shape.format(value) for value in values]
            axes.bar_label(bars, texts, padding=2, fontsize=8.5)
    axes.set_xticks(range(len(names)), names)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.14)
    if len(heights) > 1:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(3, len(heights)))
