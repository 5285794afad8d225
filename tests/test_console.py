"""What is shown where."""

import io
import math

import pytest
from rich.console import Console

from mmm4rec_cli import console
from mmm4rec_cli.console import BarReporter, LineReporter


def test_a_stage_is_one_plain_line(capsys):
    reporter = LineReporter()
    with reporter.stage("read", total=3, unit="files") as stage:
        for _ in range(3):
            stage.advance(status="fine")
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("read: 3 files, ")
    assert line.endswith(" s, fine")


def test_an_epoch_is_one_plain_line(capsys):
    with LineReporter().stage("fine-tune", total=2, unit="epochs") as stage:
        stage.advance(status="loss 2.0")
        stage.advance(status="loss 1.5")
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["fine-tune epoch 1/2 loss 2.0", "fine-tune epoch 2/2 loss 1.5"]
    assert len(lines) == 3


def test_a_stage_that_fails_claims_nothing(capsys):
    with pytest.raises(ValueError, match="broken"), LineReporter().stage("read", total=3):
        raise ValueError("broken")
    assert capsys.readouterr().err == ""


def test_warnings_are_marked(capsys):
    LineReporter().warn("careful")
    assert capsys.readouterr().err == "warning: careful\n"


def test_elsewhere_than_on_a_terminal_there_are_no_bars(monkeypatch):
    assert isinstance(console.reporter(), LineReporter)

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    assert isinstance(console.reporter(), BarReporter)


def test_nested_stages_share_one_display(monkeypatch, capsys):
    reporter = BarReporter()
    with reporter.stage("epochs", total=2, unit="epochs") as outer:
        for _ in range(2):
            with reporter.stage("batches", total=3) as inner:
                inner.advance(3)
                reporter.note("[not markup] 50 %")
            outer.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("[not markup] 50 %") == 2
    assert "epochs: 2 epochs" in err


def test_tables_show_numbers_plainly():
    made = console.table(
        "scores", ("name", "n", "Hit@10", "ok"), [("[a]", 12345, 0.12345, True), ("b", None, 0.5, False)]
    )
    page = io.StringIO()
    Console(file=page, width=100).print(made)
    text = page.getvalue()
    for part in ("[a]", "12,345", "0.1235", "yes", "–", "0.5000", "no"):
        assert part in text


def test_results_are_not_cut_where_there_is_no_terminal(capsys):
    console.show("x" * 300, console.table("", ("a",), [("y" * 150,)]), next_command="mmm4rec runs")
    out = capsys.readouterr().out
    assert "x" * 300 in out
    assert "y" * 150 in out
    assert out.endswith("next: mmm4rec runs\n")


@pytest.mark.parametrize(
    ("values", "width", "drawn"),
    [
        ([], 40, ""),
        ([2.0], 40, "▅"),
        ([1, 1], 40, "▅▅"),
        ([0, 7, 3.5, math.nan], 40, "▁█▅ "),
        (list(range(16)), 8, "▁▂▃▄▅▆▇█"),
        ([1, 3, 9], 2, "▁█"),
    ],
)
def test_a_sparkline_spans_lowest_to_highest_in_the_width(values, width, drawn):
    assert console.sparkline(values, width) == drawn


def test_learning_curves_name_both_ends_and_the_epoch_that_was_kept():
    epochs = [{"epoch": n, "loss": 4.0 - n, "valid": {"MRR": m}} for n, m in ((1, 0.1), (2, 0.3), (3, 0.3), (4, 0.2))]
    assert console.learning_curves(epochs, "MRR", "seed 1  ").splitlines() == [
        "seed 1  loss       █▆▃▁  3.0000 → 0.0000",
        "seed 1  valid MRR  ▁██▅  best 0.3000, epoch 3 of 4",  # of equal ones the later is kept
    ]
    unvalidated = [{"epoch": 1, "loss": 1.0, "valid": {}}]
    assert console.learning_curves(unvalidated, "MRR") == "loss  ▅  1.0000 → 1.0000"
    assert console.learning_curves([]) == ""


def test_json_refuses_what_is_no_json():
    with pytest.raises(ValueError, match="JSON compliant"):
        console.print_json({"metric": float("nan")})
