"""The report page: facts in, one self-contained HTML file out."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mmm4rec_cli import __version__
from mmm4rec_cli.errors import UsageError
from mmm4rec_cli.evaluation.segments import SEGMENTS
from mmm4rec_cli.files import written_whole
from mmm4rec_cli.report import figures
from mmm4rec_cli.report.gather import Facts, gather
from mmm4rec_cli.reporter import Reporter, SilentReporter
from mmm4rec_cli.runs import Run
from mmm4rec_cli.settings.schema import RuntimeSettings
from mmm4rec_cli.workspace import Workspace

SEGMENT_TITLES = {
    "length": "History length",
    "popularity": "Popularity of the target",
    "modality": "Vectors of the target",
    "novelty": "New and known targets",
}
SEGMENT_WORDS = {
    "length": "events before the target",
    "popularity": "interactions of the target that training saw",
    "modality": "which vectors the target item has",
    "novelty": "whether training saw the target at all",
}


def write_report(
    workspace: Workspace,
    runs: Sequence[Run],
    out: Path,
    runtime: RuntimeSettings,
    *,
    segments: Sequence[str] = SEGMENTS,
    reporter: Reporter | None = None,
) -> list[Facts]:
    """Write one HTML page on the runs, side by side where there are several.

    Args:
        workspace: where data and runs lie.
        runs: finished fine-tuning runs.
        out: the page's file.
        runtime: the device to compute on.
        segments: kinds of segments to show (`mmm4rec_cli.evaluation.segments`).
        reporter: progress.

    Returns:
        what was shown of each run.

    Raises:
        RunError: a run is unfinished, damaged, no fine-tuning, or of a domain that is gone.
        DataError: a run's domain is not whole.
        UsageError: the same run twice, or `out` is a folder.
    """
    if len({run.path for run in runs}) < len(runs):
        raise UsageError("--run: the same run is named twice", hint="name each run once")
    if out.is_dir():
        raise UsageError(f"--out {out}: is a folder", hint="name a file, such as report.html")
    facts = [gather(workspace, run, runtime, reporter or SilentReporter()) for run in runs]
    html = render(facts, segments)
    with written_whole(out) as part:
        part.write_text(html, encoding="utf-8")
    return facts


def render(runs: Sequence[Facts], segments: Sequence[str] = SEGMENTS) -> str:
    """The page as text, with the kinds of segments that are asked for."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    here = files(__package__)
    script = here.joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.from_string(here.joinpath("page.html.jinja").read_text(encoding="utf-8"))
    metric = runs[0].metric if runs[0].metric in runs[0].metrics["test"] else next(iter(runs[0].metrics["test"]))
    groups = {kind: list(dict.fromkeys(group for run in runs for group in run.segments[kind])) for kind in segments}
    kinds = [kind for kind in segments if len(groups[kind]) > 1]
    return template.render(
        runs=runs,
        metric=metric,
        version=__version__,
        style=Markup(here.joinpath("page.css").read_text(encoding="utf-8")),  # noqa: S704 our own file
        script=Markup(script),  # noqa: S704 our own file, its digest is in the page's policy
        digest=digest,
        headline=[_headline(run, metric) for run in runs],
        rows=_metric_rows(runs),
        loss=Markup(figures.loss_curve(runs)),  # noqa: S704 drawn here
        valid=Markup(figures.valid_curve(runs)),  # noqa: S704 drawn here
        segments=[
            (
                kind,
                SEGMENT_TITLES[kind],
                SEGMENT_WORDS[kind],
                Markup(figures.segment_bars(kind, runs, metric)),  # noqa: S704 drawn here
                _segment_rows(kind, groups[kind], runs, metric),
            )
            for kind in kinds
        ],
        segment_metrics=_segment_metrics(runs, metric),
        alone=[(SEGMENT_TITLES[kind], ", ".join(groups[kind])) for kind in segments if kind not in kinds],
        ablation=Markup(figures.ablation_bars(runs, metric))  # noqa: S704 drawn here
        if any(run.weighing for run in runs)
        else None,
        facts=[_facts(run) for run in runs],
    )


def _segment_metrics(runs: Sequence[Facts], metric: str) -> list[str]:
    """What the tables of segments hold: every metric of one run, the page's own of several."""
    return list(runs[0].metrics["test"]) if len(runs) == 1 else [metric]


def _segment_rows(
    kind: str, groups: Sequence[str], runs: Sequence[Facts], metric: str
) -> list[tuple[str, list[list[str]]]]:
    """Group, then a block a run of cells: users and metrics; a dash where a run has nobody in the group."""
    names = _segment_metrics(runs, metric)
    rows = []
    for group in groups:
        blocks = []
        for run in runs:
            found = run.segments[kind].get(group)
            cells = ["0", *("–" for _ in names)]
            if found is not None:
                cells = [f"{int(found['n_users']):,}"]
                cells += ["–" if name not in found else f"{found[name]:.4f}" for name in names]
            blocks.append(cells)
        rows.append((group, blocks))
    return rows


def _headline(run: Facts, metric: str) -> dict[str, Any]:
    ours, popular = run.metrics["test"].get(metric), run.metrics.get("popularity", {}).get(metric)
    published = run.metrics.get("published", {}).get(metric)
    return {
        "published": None if published is None else f"published: {published:.4f}",
        "value": None if ours is None else f"{ours:.4f}",
        "against": f"{ours / popular:.2f} × popularity ({popular:.4f})" if ours is not None and popular else None,
    }


def _metric_rows(runs: Sequence[Facts]) -> list[tuple[str, list[list[tuple[str, bool]]]]]:
    """Metric, then a block a run of cells: text, and whether it is the best of the test columns."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics["test"]))
    rows = []
    for name in names:
        best = max(
            (
                values[name]
                for run in runs
                for column, values in run.metrics.items()
                if column != "valid" and name in values
            ),
            default=None,
        )
        blocks = []
        for run in runs:
            cells = []
            for column, values in run.metrics.items():
                value = values.get(name)
                spread = run.spread.get(column, {}).get(name)
                text = "–" if value is None else f"{value:.4f}" + ("" if spread is None else f" ± {spread:.4f}")
                cells.append((text, column != "valid" and value is not None and value == best))
            blocks.append(cells)
        rows.append((name, blocks))
    return rows


def _facts(run: Facts) -> list[tuple[str, str]]:
    """Name and value of what was run on what."""
    result, about = run.result, run.about
    hardware, versions = result.get("hardware", {}), result.get("versions", {})
    return [
        ("run", run.run.id),
        ("domain", run.domain),
        ("model", str(about["model"])),
        ("started from", about["pretrained"] or "scratch"),
        ("encoder", f"{about['encoder']} ({about['encoder_fingerprint'][:8]})"),
        ("users ranked", f"{result['n_users']:,}"),
        ("catalogue", f"{result['n_items']:,} items"),
        ("targets held out", str(result["split"]).replace("_", "-")),
        ("ties", str(result["ties"])),
        ("seeds", ", ".join(map(str, result["seeds"]))),
        ("epochs", f"{result['epochs']:g}, best {result['best_epoch']:g}"),
        ("training time", f"{result['seconds']:,.1f} s"),
        (
            "hardware",
            ", ".join(
                f"{hardware[key]} {word}".strip()
                for key, word in (("device", ""), ("name", ""), ("cpus", "CPUs"), ("threads", "threads"))
                if key in hardware
            ),
        ),
        ("versions", ", ".join(f"{name} {value}" for name, value in versions.items())),
        ("data", about["data_fingerprint"][:16]),
    ]
