"""The examples run as they stand."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmm4rec_cli.app import main
from mmm4rec_cli.data.dataset import load_dataset
from mmm4rec_cli.models.registry import MODELS
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


@pytest.mark.parametrize(
    ("size", "arm"),
    [
        ("large", "optimisation-ml100k-1024,_1e-3,_average_.99"),
        ("small", "optimisation-office-512,_3e-4,_cosine_30"),
        ("tiny", "optimisation-magazine-256,_3e-4,_cosine_30"),
    ],
)
def test_a_settings_file_a_size_is_a_plan_that_was_measured(size, arm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = load(EXAMPLES / "settings" / "sizes" / f"{size}.toml")
    arms = module(EXAMPLES / "studies" / "arms.py")
    assert settings == load(overrides=arms.written(arms.ARMS[arm].sets))


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
def test_a_killed_training_ends_as_one_that_was_left_alone(tmp_path):
    script, out = EXAMPLES / "benchmarks" / "kills.py", tmp_path / "rows.jsonl"
    words = ["--kills", "1", "--epochs", "1", "--commands", "pretrain", "--device", "cpu", "--out", str(out)]
    subprocess.run([sys.executable, str(script), *words], check=True, capture_output=True, timeout=300)
    row = json.loads(out.read_text())
    assert (row["kills"], row["unequal"]) == (1, 0)


@pytest.mark.parametrize("model", sorted(MODELS.keys() - {"mmm4rec"}))
def test_a_tuned_settings_file_lies_over_the_preset_of_its_model(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tuned, preset = load(EXAMPLES / "settings" / "baselines" / f"{model}.toml", model=model), load(model=model)
    assert tuned != preset
    for name in ("hidden_size", "inner_size", "num_layers"):
        assert getattr(tuned.model, name) == getattr(preset.model, name)
    for name in ("optimizer", "weight_decay"):
        assert getattr(tuned.finetune, name) == getattr(preset.finetune, name)
    assert (tuned.finetune.metric, tuned.finetune.batch_size) == ("NDCG@10", 512)


def test_the_rows_of_mmm4rec_do_not_rest_on_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = module(EXAMPLES / "benchmarks" / "baselines.py")
    dropouts = {"dropout", "embedding_dropout", "time_dropout"}
    for name, kind in (("mmm4rec", "observed"), (study.NO_TIME, "none")):
        assert load(EXAMPLES / "settings" / "baselines" / f"{name}.toml").model.time == kind
        said = study.chosen_settings(name, 0)
        ours = set(Settings().model.model_dump()) - set(said["model"])
        protocol = {"padding_candidate", "mask_duplicate_labels"}
        assert ours == {"norm_eps", "baseline", *protocol}, "a new setting of the model belongs into the rows"
        assert dropouts < set(said["model"])
        assert set(Settings().finetune.model_dump()) - set(said["finetune"]) == {
            *("mean_over_group", "stop_on_nonfinite", "shuffle_validation"),
            *("negatives", "transfer", "frozen_epochs"),
        }


@pytest.mark.slow
def test_the_comparison_of_the_baselines_ends_in_a_table_with_its_commands(workspace, make_domain, tmp_path):
    make_domain()
    inputs, out, page = tmp_path / "inputs.npz", tmp_path / "out", tmp_path / "page.md"

    def script(*words: object) -> None:
        command = [sys.executable, EXAMPLES / "benchmarks" / "baselines.py", *map(str, words)]
        subprocess.run(command, check=True, timeout=200)

    script("prepare", workspace.root, "ring", "--encoder", "test", "--out", inputs)
    models = ["gru4rec", "mmm4rec"]
    small = ["--processes", 1, "--epochs", 1, "--points", 1, "--device", "cpu", "--models", *models]

    def run(*words: object) -> list[dict[str, object]]:
        script("run", inputs, "--out", out, "--seconds", 150, *small, *words)
        return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]

    first = run("--seeds", 1)
    assert [(row["model"], row["seed"]) for row in first] == [(m, 1) for m in models]
    rows = run("--seeds", 3)
    assert rows[:2] == first, "what was trained is not trained again"
    assert [(row["model"], row["seed"]) for row in rows[2:]] == [(m, s) for s in (2, 3) for m in models]
    script("alone", inputs, "--out", out, "--epochs", 1, "--device", "cpu")
    script("page", out, "--out", page, "--settings", tmp_path / "tuned")
    text = page.read_text()
    assert page.with_suffix(".jsonl").read_text() == (out / "rows.jsonl").read_text()
    assert all(f"| {name} | 3 |" in text for name in models)
    assert text.count("mmm4rec finetune --domain ring --model") == 2
    for name in models:
        tuned = load(tmp_path / "tuned" / f"{name}.toml", model=name)
        assert (tuned.finetune.lr, tuned.model.max_len, tuned.finetune.metric) == (1e-3, 20, "NDCG@10")


@pytest.mark.slow
def test_the_studies_end_in_a_page_with_intervals_and_commands(workspace, make_domain, tmp_path):
    for seed, name in enumerate(("industrial", "magazine")):
        make_domain(name, seed=seed, users=30)
        out = tmp_path / f"{name}.npz"
        words = ["prepare", workspace.root, name, "--encoder", "test", "--out", out]
        subprocess.run([sys.executable, EXAMPLES / "benchmarks" / "baselines.py", *map(str, words)], check=True)
    script, rows = EXAMPLES / "studies" / "study.py", tmp_path / "rows"
    small = {"hidden_size": 16, "inner_size": 16, "head_dim": 8, "n_groups": 1, "d_state": 4}
    sets = [f"--set=model.{name}={value}" for name, value in small.items()]
    sets += ["--set=finetune.epochs=2", "--set=pretrain.epochs=1"]
    arms = ["time-magazine-none:1,2", "time-magazine-published:1,2", "transfer-magazine-pre-trained,_with_"]
    words = [tmp_path / "industrial.npz", tmp_path / "magazine.npz", "--out", rows, "--workspace", tmp_path / "ws"]
    words += ["--processes", 1, "--device", "cpu", "--seconds", 150, *sets, "--arms", *arms]
    subprocess.run([sys.executable, script, "run", *map(str, words)], check=True, timeout=200)
    alone = [*words[: words.index("--processes")], "--device", "cpu", *sets[:-2], "--arms", "time-magazine-published"]
    subprocess.run([sys.executable, script, "pace", *map(str, alone)], check=True, timeout=200)
    page = tmp_path / "docs" / "measurements.md"
    subprocess.run([sys.executable, script, "page", rows, "--out", page], check=True)
    text = page.read_text()
    kept = [json.loads(line) for line in page.with_suffix(".jsonl").read_text().splitlines()]
    assert sorted((r["arm"], r["seed"]) for r in kept if "arm" in r) == [
        *(("time-magazine-none", seed) for seed in (1, 2)),
        *(("time-magazine-published", seed) for seed in (1, 2)),
        ("transfer-magazine-pre-trained,_with_ID", 1),
    ]
    (pace,) = (row for row in kept if "pace" in row)
    best = sum(row["best_epoch"] for row in kept if row.get("arm") == "time-magazine-published") / 2
    (row,) = (line for line in text.splitlines() if line.startswith("| published | 2 |") and "±" in line[20:])
    assert row.endswith(f"| {best:.0f} | {best * pace['seconds']:.1f} |")
    assert "mmm4rec pretrain --domain industrial --seed 1" in text
    assert "mmm4rec finetune --domain magazine --pretrained RUN --seed 1" in text
    assert page.with_name("measurements-magazine.svg").stat().st_size > 1000


def test_a_study_joins_domains_as_pretraining_does(workspace, make_domain, tmp_path):
    names = ("industrial", "magazine")
    for seed, name in enumerate(names):
        make_domain(name, seed=seed, users=30)
        module(EXAMPLES / "benchmarks" / "baselines.py").prepare(workspace, name, "test", tmp_path / f"{name}.npz")
    study = module(EXAMPLES / "studies" / "study.py")
    study.start([tmp_path / f"{name}.npz" for name in names], tmp_path, torch.get_num_threads())
    joined, expected = study.source_of("industrial+magazine"), load_dataset(workspace, names, "test")
    assert (joined.name, joined.domains) == (expected.name, expected.domains)
    assert (joined.n_items, joined.n_users) == (expected.n_items, expected.n_users)
    for name in ("items_N", "times_N", "offsets_U1"):
        assert torch.equal(getattr(joined.sequences, name), getattr(expected.sequences, name))
    assert np.allclose(joined.features.text, expected.features.text, atol=1e-3), "files hold half precision"
    assert not joined.features.has_image.any(), "pictures are left out"


def test_a_study_cuts_a_source_to_what_training_may_see_and_a_target_to_some_users(workspace, make_domain, tmp_path):
    make_domain("magazine", users=30)
    module(EXAMPLES / "benchmarks" / "baselines.py").prepare(workspace, "magazine", "test", tmp_path / "magazine.npz")
    study = module(EXAMPLES / "studies" / "study.py")
    study.start([tmp_path / "magazine.npz"], tmp_path, torch.get_num_threads())
    whole, known = (study.source_of(name).sequences for name in ("magazine", "magazine-known"))
    long = whole.counts_U >= 3
    assert long.any()
    assert torch.equal(known.counts_U[long], whole.counts_U[long] - 2)
    for user in range(30):
        begin, count = whole.offsets_U1[user], known.counts_U[user]
        own = known.items_N[known.offsets_U1[user] : known.offsets_U1[user + 1]]
        assert torch.equal(own, whole.items_N[begin : begin + count])
    some = study.with_fewer_users(study.source_of("magazine"), 0.3)
    assert (some.n_users, some.n_items) == (9, study.source_of("magazine").n_items)
    histories = [h.tolist() for h in whole.items_N.split(whole.counts_U.tolist())]
    kept = [h.tolist() for h in some.sequences.items_N.split(some.sequences.counts_U.tolist())]
    assert len(kept) == 9
    assert all(h in histories for h in kept)


def test_the_interval_of_a_difference_holds_users_and_seeds(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "studies")
    pages = module(EXAMPLES / "studies" / "pages.py")
    found, missed = torch.zeros(200).double(), torch.full((200,), 50.0).double()
    seeds_alone = pages.interval([found, missed], [missed, missed])
    assert seeds_alone["difference"] == 0.5
    assert seeds_alone["low"] == pytest.approx(0.5 - 0.5 * 2**0.5)
    assert seeds_alone["high"] == pytest.approx(0.5 + 0.5 * 2**0.5)
    half = torch.where(torch.arange(200) % 2 == 0, found, missed)
    users_alone = pages.interval([half], [missed])
    deviation = (0.25 / 200) ** 0.5
    for side, sign in (("low", -1), ("high", 1)):
        assert users_alone[side] == pytest.approx(0.5 + sign * 1.96 * deviation, abs=0.01)
    assert pages.interval([half, half], [missed, missed]) == pytest.approx(users_alone)


def test_the_published_time_branch_has_next_to_no_gradient(workspace, make_domain, tmp_path, capsys):
    make_domain()
    module(EXAMPLES / "benchmarks" / "baselines.py").prepare(workspace, "ring", "test", tmp_path / "ring.npz")
    small = {"hidden_size": 16, "inner_size": 16, "head_dim": 8, "n_groups": 1, "d_state": 4, "max_len": 6}
    words = ["--steps", "1", "2", "--batch", "8", *(f"--set=model.{name}={value}" for name, value in small.items())]
    rows = module(EXAMPLES / "studies" / "time_gradients.py").main([str(tmp_path / "ring.npz"), *words])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    found = {(row["step"], row["parameters"]): row for row in rows}
    assert len(found) == len(rows) == 8
    for step in (1, 2):
        maps, rest = (found[step, kind] for kind in ("step-size maps of the time branch", "all others"))
        assert maps["gradient"] < maps["pull of weight decay"] / 100
        assert rest["gradient"] > rest["pull of weight decay"]


@pytest.mark.slow
def test_the_benchmark_of_the_encoding_gives_the_loops_vectors(tmp_path):
    script, out = EXAMPLES / "benchmarks" / "embed.py", tmp_path / "out.jsonl"
    sizes = ["--items", "80", "--pictures", "70", "--loop-items", "65", "--side", "60", "--tiny"]
    words = [*sizes, "--device", "cpu", "--runs", "fp32:fork", "--out", str(out)]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loop, ours = (json.loads(line) for line in out.read_text().splitlines())
    assert (loop["items"], ours["items"], ours["pictures"]) == (65, 80, 70)
    assert ours["image_least_cosine_to_loop"] > 0.999999
    assert ours["text_least_cosine_to_loop"] > 0.999999


def test_the_study_of_new_items_measures_every_way(workspace, make_domain, small_settings, capsys):
    make_domain(users=40)
    model = small_settings().model
    names = ("hidden_size", "inner_size", "d_state", "head_dim", "max_len")
    words = [f"--set=model.{name}={getattr(model, name)}" for name in names]
    words += ["--set=finetune.epochs=1", "--set=runtime.device=cpu", "--seeds=3", "--share=0.2"]
    before = sorted(workspace.root.rglob("*"))
    found = module(EXAMPLES / "new_items_study.py").main([str(workspace.root), "ring", *words])
    assert [row["model"] for row in found] == [
        f"{bias} item bias, {how}" for bias in ("without", "with") for how in ("as scored", "fair share")
    ]
    for row in found:
        assert row["hidden items"] == 0.2
        assert 0 < row["hidden targets"] < 1
        assert 0 <= row["hidden in top 10"] <= 1
        of_all = row["hidden targets"] * row["Hit@10, hidden"] + (1 - row["hidden targets"]) * row["Hit@10, others"]
        assert row["Hit@10"] == pytest.approx(of_all)
    assert sorted(workspace.root.rglob("*")) == before
    assert "hidden in top 10" in capsys.readouterr().out


def test_the_benchmark_of_answers_measures_every_path(tmp_path, capsys):
    sizes = ["--items", "300", "--users", "40", "--hidden", "32", "--batch", "16", "--seconds", "0.01"]
    out = tmp_path / "serve.jsonl"
    found = module(EXAMPLES / "benchmarks" / "serve.py").main([*sizes, "--device", "cpu", "--out", str(out)])
    assert [json.loads(line) for line in out.read_text().splitlines()] == found
    names = ["item table, once", "one history", "evaluate", "recommend", "argsort of all scores"]
    assert [row["what"] for row in found] == names
    assert all(row["users_per_second"] > 0 for row in found[2:])
    assert capsys.readouterr().out.count("300 items") == len(names)
