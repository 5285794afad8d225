"""What was measured, the page about it, and the choices that go by it say the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from mmm4rec_kernels import crossovers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("page", ROOT / "kernels" / "benchmarks" / "page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(page):
    return page.read(ROOT / crossovers.SOURCE)


def test_the_page_is_made_of_the_rows(page, rows):
    assert (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8") == page.page(
        rows, page.beside(ROOT / crossovers.SOURCE)
    )


def test_auto_takes_what_was_fastest(rows):
    """Forward and backward on the device, of our own backends wherever both were timed in one process."""
    fastest: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row.get("direction") == "forward+backward" and row.get("us") and row["form"] in ("triton", "torch"):
            key = (row["operation"], row["products"], row["batch"], row["length"], row["packed"], row["peer"])
            fastest.setdefault(key, {})[row["form"]] = row["us"]
    for (operation, products, _, length, _, _), found in fastest.items():
        if len(found) == 2:
            spans = crossovers.FASTEST[operation][products]
            assert next(name for longest, name in spans if length <= longest) == min(found, key=found.get)


def test_ratios_are_taken_within_one_process(page):
    shape = {"operation": "ssd", "batch": 1024, "length": 20, "packed": False, "places": 20480, "products": "tf32"}
    rows = [
        {
            **shape,
            "form": form,
            "peer": peer,
            "direction": "forward+backward",
            "us": us,
            "call_us": 9.0,
            "floor_us": 10.0,
        }
        for form, peer, us in (("triton", "triton", 10.0), ("triton", "naive", 20.0), ("naive", "naive", 100.0))
    ]
    assert page.ratio(rows, rows[2], "us") == 5
    (line,) = [goal for goal in (judge(rows) for judge in page.GOALS) if goal[1] == "≥ 10 × naive"]
    assert line[2:] == ["5.0 ×", "1.0 ×", "no: 0.50 of the goal"]


def test_rows_that_failed_are_kept_on_the_page(page):
    about = {"device": "D", "commit": "c", "torch": "t", "triton": "r"}
    shape = {"operation": "ssd", "batch": 8, "length": 4096, "packed": False, "places": 32768, "products": "tf32"}
    rows = [
        about | shape | {"form": "naive", "peer": "naive", "direction": "forward+backward", "error": "out of memory"},
        about | {"operation": "ssd", "form": "simple_gla", "peer": "fla", "error": "missing: no module"},
    ]
    made = page.page(rows, {"older.jsonl": [about | shape | {"form": "slow", "direction": "forward", "us": 7.0}]})
    assert "| `ssd` | slow | 8 × 4096 | tf32 | 7 | – | c |" in made
    assert "out of memory" in made
    assert "Not there: simple_gla: missing: no module" in made
