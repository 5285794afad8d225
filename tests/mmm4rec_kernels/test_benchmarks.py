"""What was measured, the page about it, and the choices that go by it say the same."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from mmm4rec_kernels import crossovers, ssd, ssd_block

ROOT = Path(__file__).parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "kernels" / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page():
    return load("page")


def test_a_form_is_checked_forward_alone_where_no_gradients_are_asked_for():
    load("peers")
    outcome, tensors = load("run").outcome, {"input": torch.arange(3.0)}
    assert outcome(torch.square, tensors, None)["y"].tolist() == [0, 1, 4]
    assert outcome(torch.square, tensors, torch.ones(3))["d_input"].tolist() == [0, 2, 4]


@pytest.mark.parametrize("scan", ["naive_scan", "quadratic_scan"])
def test_the_plain_forms_mean_the_same(scan):
    peers = load("peers")
    torch.manual_seed(0)
    heads, width, state, time = (torch.randn(2, 9, peers.H, n) for n in (1, peers.P, peers.N, 1))
    inputs = {"x": width, "dt": heads[..., 0], "A": -torch.rand(peers.H) * 15, "B": state, "C": torch.randn_like(state)}
    inputs |= {"D": torch.randn(peers.H), "dt_bias": torch.randn(peers.H) - 3}
    form = getattr(peers, scan)
    torch.testing.assert_close(form(**inputs), ssd(**inputs, backend="reference"), rtol=1e-4, atol=1e-4)
    channels = peers.E + 2 * peers.GN
    block = {
        "projected": torch.randn(2, 9, peers.E + channels + peers.H),
        "conv_weight_CK": torch.randn(channels, peers.K) / 2,
        "conv_bias_C": torch.randn(channels),
        "A_log_H": torch.randn(peers.H),
        "D_H": torch.randn(peers.H),
        "dt_bias_H": torch.randn(peers.H) - 3,
        "norm_weight_E": torch.randn(peers.E),
        "time_factor_BLH": time[..., 0],
    }
    expected = ssd_block(**block, n_groups=peers.H, eps=peers.EPS, skip="x", backend="reference")
    torch.testing.assert_close(peers.chain(form)(**block), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def rows(page):
    return page.measured_rows(page.RESULTS)


def test_the_page_is_made_of_the_rows(page):
    assert (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8") == page.written(page.RESULTS)


def test_a_later_row_takes_the_place_of_an_earlier_one(page):
    shape = {"operation": "ssd", "batch": 1024, "length": 20, "packed": False, "places": 20480, "products": "tf32"}
    about = {"device": "D", "torch": "t", "triton": "r", "form": "triton", "peer": "triton", "direction": "forward"}
    rows = [{**shape, **about, "commit": commit, "us": us} for commit, us in (("0ld", 93.0), ("new", 71.0))]
    made = page.page(rows, {})
    assert "| triton | tf32 | 71 |" in made
    assert "0ld" not in made
    elsewhere = {**rows[0], "device": "E"}
    assert "| triton | tf32 | 93 |" in page.page([*rows, elsewhere], {})


def test_auto_takes_what_was_fastest(page, rows):
    """Forward and backward on the device, of our own backends wherever both were timed in one process."""
    names = ("device", "operation", "products", "batch", "length", "packed", "peer", "commit")
    fastest: dict[tuple, dict[str, float]] = {}
    for row in page.latest(rows):
        if row.get("direction") == "forward+backward" and row.get("us") and row["form"] in ("triton", "torch"):
            fastest.setdefault(tuple(row[name] for name in names), {})[row["form"]] = row["us"]
    for (_, operation, products, _, length, *_), found in fastest.items():
        if len(found) == 2:
            spans = crossovers.FASTEST[operation][products]
            assert next(name for longest, name in spans if length <= longest) == min(found, key=found.get)


def test_goals_and_tables_are_of_the_newest_state(page):
    shape = {"operation": "ssd", "batch": 1024, "length": 20, "packed": False, "places": 20480, "products": "tf32"}
    about = {"device": "D", "torch": "t", "triton": "r", "direction": "forward+backward", "call_us": 9.0}
    measured = (("triton", "triton", "old", 20.0), ("triton", "naive", "new", 12.0), ("naive", "naive", "new", 60.0))
    rows = [
        {**shape, **about, "form": f, "peer": p, "commit": c, "us": us, "floor_us": 9.0} for f, p, c, us in measured
    ]
    made = page.page(rows, {})
    assert "| triton | tf32 | – | 12 |" in made
    assert "≤ 1.5 × byte floor | 12 µs | 9 µs | yes | new |" in made
    assert "≥ 10 × naive | 5.0 × | 1.0 × | no: 0.50 of the goal | new |" in made


def test_cold_first_calls_are_on_the_page(page):
    about = {"device": "D", "commit": "c", "torch": "t", "triton": "r", "operation": "ssd", "batch": 8}
    cold = about | {"length": 64, "packed": False, "first_s": 3.21, "process_s": 9.0}
    row = about | {"length": 20, "packed": False, "products": "tf32", "form": "triton", "peer": "triton", "us": 7.0}
    made = page.page([row], {}, [cold, cold | {"operation": "ssd_block", "first_s": 16.0}])
    assert "| `ssd` | 8 × 64 | 3.2 | 9.0 | yes |  | c |" in made
    assert "| `ssd_block` | 8 × 64 | 16.0 | 9.0 | no |  | c |" in made


def test_ratios_are_taken_within_one_process(page):
    shape = {"operation": "ssd", "batch": 1024, "length": 20, "packed": False, "places": 20480, "products": "tf32"}
    rows = [
        {
            **shape,
            "commit": "c",
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
    assert line[2:] == ["5.0 ×", "1.0 ×", "no: 0.50 of the goal", "c"]


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
