"""The examples run as they stand."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmm4rec_cli.app import main
from mmm4rec_cli.published import published_domains, published_result
from mmm4rec_cli.settings import Settings, load

EXAMPLES = Path(__file__).parents[1] / "examples"


def module(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("domain", published_domains())
def test_a_settings_file_a_domain_is_the_preset_spelled_out(domain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load(EXAMPLES / "settings" / f"{domain}.toml")
    assert settings == load(domain=domain)
    assert settings.finetune.metric == published_result(domain, item_bias=True).valid_metric
    assert settings.model_copy(update={"finetune": Settings().finetune}) == Settings()


def test_own_data_runs_as_its_readme_says(tmp_path, monkeypatch, capsys):
    for name in ("sales.csv", "products.jsonl", "mmm4rec.toml"):
        shutil.copy(EXAMPLES / "own_data" / name, tmp_path)
    module(EXAMPLES / "own_data" / "make_pictures.py").main(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["--domain", "tea", "--interactions", "sales.csv", "--items", "products.jsonl"]
    assert main(["preprocess", *words]) == 0
    assert "k-core" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "data/processed/tea/manifest.json").read_text())
    assert manifest["text_share"] == 1
    assert 0.7 < manifest["image_share"] < 0.9
    assert main(["finetune", "--domain", "tea", "--pretrained", "none", "--epochs", "3"]) == 0
    assert main(["evaluate", "--k", "5,10", "--mask-seen"]) == 0
    assert "Hit@5" in capsys.readouterr().out


def test_quickstart_ends_with_a_metric(tmp_path, capsys):
    result = module(EXAMPLES / "quickstart.py").main(tmp_path, epochs=2)
    assert "NDCG@10 on test" in capsys.readouterr().out
    popular = result["yardsticks"]["popularity"]["test"]["NDCG@10"]
    assert result["metrics"]["test"]["NDCG@10"] > popular


def test_the_benchmark_of_the_tables_ends_with_equal_rows(tmp_path):
    script = EXAMPLES / "benchmarks" / "preprocess.py"
    words = [sys.executable, str(script), "--share", "0.001", "--folder", str(tmp_path / "mix")]
    done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "rows equal" in done.stdout


@pytest.mark.slow
def test_the_comparison_of_the_baselines_ends_in_a_table_with_its_commands(workspace, make_domain, tmp_path):
    make_domain()
    inputs, out, page = tmp_path / "inputs.npz", tmp_path / "out", tmp_path / "page.md"

    def script(*words: object) -> None:
        command = [sys.executable, EXAMPLES / "benchmarks" / "baselines.py", *map(str, words)]
        subprocess.run(command, check=True, timeout=200)

    script("prepare", workspace.root, "ring", "--encoder", "test", "--out", inputs)
    models = ["gru4rec", "mmm4rec"]
    small = ["--processes", 1, "--epochs", 1, "--points", 1, "--seconds", 150, "--device", "cpu", "--models", *models]
    script("run", inputs, "--out", out, *small)
    script("page", out, "--out", page)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert {(row["model"], row["seed"]) for row in rows} == {(m, s) for m in models for s in (1, 2, 3)}
    text = page.read_text()
    assert all(f"| {name} | 3 |" in text for name in models)
    assert text.count("mmm4rec finetune --domain ring --model") == 2
