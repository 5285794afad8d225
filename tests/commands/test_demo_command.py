"""The demo, whole."""

import json
import subprocess
import sys

import pytest

from mmm4rec_cli.app import main


@pytest.mark.slow
def test_the_demo_ranks_popularity_below_scratch_below_pretrained(tmp_path):
    words = [sys.executable, "-m", "mmm4rec_cli", "demo", "--workspace", str(tmp_path), "--seed", "11", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [row["model"] for row in document["rows"]] == ["popularity", "from scratch", "pre-trained"]
    for metric in ("Hit@10", "NDCG@10", "MRR"):
        popular, scratch, pretrained = (row[metric] for row in document["rows"])
        assert popular < scratch < pretrained
    assert document["rows"][2]["best_epoch"] < document["rows"][1]["best_epoch"]
    assert len(document["recommended"]["items"]) == 5
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")[:200]
    again = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True)
    assert json.loads(again.stdout)["runs"] == document["runs"]
    assert json.loads(again.stdout)["rows"] == document["rows"]
    assert again.stderr.count("has the same data and settings, kept") == 3


def test_the_demo_does_not_overwrite_settings_that_are_not_its_own(tmp_path, capsys):
    (tmp_path / "mmm4rec.toml").write_text("[finetune]\nlr = 1e-3\n")
    assert main(["demo", "--workspace", str(tmp_path)]) == 2
    assert "is not the demo's" in capsys.readouterr().err
    assert (tmp_path / "mmm4rec.toml").read_text() == "[finetune]\nlr = 1e-3\n"
    assert not (tmp_path / "data").exists()
