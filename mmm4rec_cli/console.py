"""How progress, results and errors look: bars and notes on standard error, results on standard output.

rich is loaded when something is shown, not when this module is imported.
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mmm4rec_cli.reporter import Progress, Reporter

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID
    from rich.table import Table

_WIDTH_OF_A_FILE = 200
"""Characters a line where the output is no terminal, so that no table is cut."""


def reporter() -> Reporter:
    """Bars where standard error is a terminal, one plain line a stage or epoch elsewhere."""
    return BarReporter() if sys.stderr.isatty() else LineReporter()


class LineReporter:
    """One plain line a stage, or an epoch where a stage counts epochs, on standard error."""

    def note(self, text: str) -> None:
        """Write the line."""
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def warn(self, text: str) -> None:
        """Write the line, marked."""
        self.note(f"warning: {text}")

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Progress]:
        """Run the stage; say how much was done and how long it took when it ends well."""
        progress = _LineProgress(self, name, total, unit)
        start = time.perf_counter()
        yield progress
        done = f"{progress.done:,} {unit}".strip() if progress.done or total is not None else ""
        self.note(": ".join(filter(None, (name, ", ".join(filter(None, (done, _seconds(start), progress.status)))))))


class _LineProgress:
    def __init__(self, reporter: LineReporter, name: str, total: int | None, unit: str) -> None:
        self.done = 0
        self.status = ""
        self._reporter, self._name, self._total = reporter, name, total
        self._counts_epochs = unit in ("epoch", "epochs")

    def advance(self, n: int = 1, status: str = "") -> None:
        self.done += n
        if self._counts_epochs:
            of = f"/{self._total}" if self._total else ""
            self._reporter.note(f"{self._name} epoch {self.done}{of} {status}".rstrip())
        else:
            self.status = status or self.status


class BarReporter:
    """Bars on a terminal; notes appear above them."""

    def __init__(self) -> None:
        self._bars: RichProgress | None = None
        self._open = 0

    def note(self, text: str) -> None:
        """Print the line above the bars."""
        from rich.console import Console

        console = Console(stderr=True) if self._bars is None else self._bars.console
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print the line above the bars, marked."""
        self.note(f"warning: {text}")

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Progress]:
        """Show a bar while the stage runs; leave one line with its time."""
        start = time.perf_counter()
        with self._live() as bars:
            task = bars.add_task(name, total=total, unit=unit, status="")
            progress = _Bar(bars, task)
            try:
                yield progress
            finally:
                bars.remove_task(task)
        done = f"{progress.done:,} {unit}".strip() if progress.done else ""
        self.note(f"{name}: {', '.join(filter(None, (done, _seconds(start), progress.status)))}")

    @contextmanager
    def _live(self) -> Iterator["RichProgress"]:
        """The one display that nested stages share."""
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bars = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                console=Console(stderr=True),
                transient=True,
            )
        bars = self._bars
        if not self._open:
            bars.start()
        self._open += 1
        try:
            yield bars
        finally:
            self._open -= 1
            if not self._open:
                bars.stop()
                self._bars = None


class _Bar:
    def __init__(self, bars: "RichProgress", task: "TaskID") -> None:
        self.done = 0
        self.status = ""
        self._bars, self._task = bars, task

    def advance(self, n: int = 1, status: str = "") -> None:
        self.done += n
        self.status = status or self.status
        self._bars.update(self._task, advance=n, status=self.status)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> "Table":
    """A table of results: numbers to the right, fractions with four places, None as a dash."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        numbers = any(isinstance(row[index], (int, float)) and not isinstance(row[index], bool) for row in rows)
        made.add_column(Text(column), justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(_cell(value)) for value in row))
    return made


_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The run of `values` in one word: the lowest ▁, the highest █; more of them than `width` are averaged in groups.

    A value that is not finite is a blank.
    """
    size = max(1, -(-len(values) // width))
    groups = [values[begin : begin + size] for begin in range(0, len(values), size)]
    heights = [sum(group) / len(group) for group in groups]
    finite = [height for height in heights if math.isfinite(height)]
    low, span = min(finite, default=0.0), max(finite, default=0.0) - min(finite, default=0.0)
    return "".join(
        _BLOCKS[round((len(_BLOCKS) - 1) * ((height - low) / span if span else 0.5))] if math.isfinite(height) else " "
        for height in heights
    )


def learning_curves(epochs: Sequence[Mapping[str, Any]], metric: str | None = None, label: str = "") -> str:
    """A training's curves, a line each: the loss and, where epochs were validated, the metric that chose the best one.

    Args:
        epochs: rows of `metrics.jsonl`; none give an empty text.
        metric: the validation metric, or None.
        label: put before each line, such as the seed.
    """
    if not epochs:
        return ""
    losses = [float(row["loss"]) for row in epochs]
    curves = [("loss", losses, f"{losses[0]:.4f} → {losses[-1]:.4f}")]
    if metric is not None and all(metric in row.get("valid", {}) for row in epochs):
        valid = [float(row["valid"][metric]) for row in epochs]
        best = max(range(len(valid)), key=lambda index: (valid[index], index))
        curves.append(
            (f"valid {metric}", valid, f"best {valid[best]:.4f}, epoch {epochs[best]['epoch']} of {len(valid)}")
        )
    wide = max(len(name) for name, _, _ in curves)
    return "\n".join(f"{label}{name:<{wide}}  {sparkline(values)}  {said}" for name, values, said in curves)


def metric_table(title: str, rows: Mapping[str, tuple[Mapping[str, float], Mapping[str, float] | None]]) -> "Table":
    """A table of metrics, one row a result; a value with a deviation reads "0.1348 ± 0.0012"."""
    names = list(dict.fromkeys(name for values, _ in rows.values() for name in values))
    cells = [
        [label, *(_metric(values.get(name), (deviations or {}).get(name)) for name in names)]
        for label, (values, deviations) in rows.items()
    ]
    return table(title, ["", *names], cells)


def _metric(value: float | None, deviation: float | None) -> float | str | None:
    return value if value is None or deviation is None else f"{value:.4f} ± {deviation:.4f}"


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def show(*shown: "RenderableType", next_command: str | None = None) -> None:
    """Print results on standard output, and the command to type next."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)
    for one in shown:
        console.print(one, markup=False, highlight=False, soft_wrap=isinstance(one, str))
    if next_command is not None:
        console.print(f"next: {next_command}", markup=False, highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """Print one JSON document on standard output; NaN and infinity are refused (ValueError)."""
    sys.stdout.write(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def show_error(problems: Sequence[str], hint: str) -> None:
    """Print a user's error on standard error: one line a problem and one on what to do next."""
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    sys.stderr.write(f"hint: {hint}\n")
    sys.stderr.flush()


def _seconds(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"
