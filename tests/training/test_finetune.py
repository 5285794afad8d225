"""Fine-tuning and pre-training end to end on a small domain."""

import json
import signal

import pyarrow.parquet as pq
import pytest
import torch

from mmm4rec_cli.errors import DataError, RunError, UsageError
from mmm4rec_cli.evaluation.evaluate_run import evaluate_run
from mmm4rec_cli.models.mmm4rec import MMM4Rec
from mmm4rec_cli.runs import all_runs, find_run, newest_run, read_weights
from mmm4rec_cli.training import finetune as finetune_module
from mmm4rec_cli.training.finetune import finetune
from mmm4rec_cli.training.pretrain import pretrain


class Notes:
    """A reporter that keeps what it is told."""

    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)

    warn = note

    def stage(self, name, total=None, unit=""):
        from mmm4rec_cli.reporter import SilentReporter

        return SilentReporter().stage(name, total, unit)


def test_a_run_learns_and_leaves_every_file(workspace, make_domain, small_settings):
    make_domain()
    settings = small_settings(finetune={"epochs": 12})
    result = finetune(workspace, "ring", settings, pretrained="none")
    popular = result["yardsticks"]["popularity"]["test"]["Hit@5"]
    assert result["metrics"]["test"]["Hit@5"] > popular + 0.2
    run = find_run(workspace, result["run"])
    assert run.result == result
    names = {p.name for p in run.path.iterdir() if not p.name.startswith((".", "events"))}
    assert names == {
        *("run.json", "settings.json", "model.safetensors", "catalogue.parquet", "metrics.jsonl"),
        *("output.log", "result.json", "ranks.parquet"),
    }
    assert list(run.path.glob("events.*"))
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    best = max(rows, key=lambda row: (row["valid"]["Hit@5"], row["epoch"]))
    assert result["best_epoch"] == best["epoch"]
    assert result["metrics"]["valid"]["Hit@5"] == best["valid"]["Hit@5"]
    assert run.settings == settings
    ranks = pq.read_table(run.path / "ranks.parquet")
    assert ranks.schema.names == ["user_id", "item_id", "rank0", "split"]
    assert ranks.num_rows == 2 * result["n_users"]


def test_evaluate_gives_the_same_figures_again(workspace, make_domain, small_settings):
    make_domain()
    settings = small_settings()
    result = finetune(workspace, "ring", settings, pretrained="none")
    run = newest_run(workspace, "finetune")
    again = evaluate_run(workspace, run, settings)
    assert again["metrics"] == result["metrics"]["test"]
    masked = evaluate_run(workspace, run, settings, mask_seen=True)
    assert masked["metrics_unmasked"] == result["metrics"]["test"]
    assert masked["metrics"]["MRR"] >= masked["metrics_unmasked"]["MRR"]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(workspace, make_domain, small_settings):
    make_domain()
    losses = []
    for seed in (1, 1, 2):
        settings = small_settings(runtime={"seed": seed})
        result = finetune(workspace, "ring", settings, pretrained="none")
        rows = (find_run(workspace, result["run"]).path / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(row)["loss"] for row in rows])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("moment", ["before an epoch", "behind its last step"])
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    command, moment, workspace, make_domain, small_settings, monkeypatch
):
    make_domain()
    kept = {"epochs": 4, "lr_decay": 0.9, "schedule": "cosine", "average": 0.6, "decayed": "matrices"}
    settings = small_settings(finetune=kept, pretrain={"epochs": 4, "loss": "full", "warmup": 1.5})

    def train():
        if command == "pretrain":
            return pretrain(workspace, ["ring"], settings)
        return finetune(workspace, "ring", settings, pretrained="none")

    whole = find_run(workspace, train()["run"])
    from mmm4rec_cli.training import loop

    epoch, calls = loop.train_epoch, []

    def interrupted(trainer, targets, progress, checkpoints, advance):
        calls.append(1)
        if len(calls) == 3 and moment == "before an epoch":
            raise KeyboardInterrupt
        if len(calls) == 3:
            saving = checkpoints.after_step

            def after_step(progress, loss_sum):
                if progress.targets_done == len(targets):
                    checkpoints.interruption.signal = signal.SIGINT
                saving(progress, loss_sum)

            checkpoints.after_step = after_step
        return epoch(trainer, targets, progress, checkpoints, advance)

    monkeypatch.setattr(loop, "train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train()
    result = train()
    assert len(calls) == 3 + 2
    resumed = find_run(workspace, result["run"])
    assert resumed.path != whole.path
    old, new = read_weights(whole.weights), read_weights(resumed.weights)
    assert all(torch.equal(old[name], new[name]) for name in old)
    keys = ("epoch", "loss", "lr", "valid")
    curves = [
        [[json.loads(row)[k] for k in keys] for row in (run.path / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, resumed)
    ]
    assert curves[0] == curves[1]


def test_a_finished_or_foreign_run_is_not_resumed(workspace, make_domain, small_settings):
    make_domain()
    make_domain("other", seed=5)
    settings = small_settings()
    finetune(workspace, "ring", settings, pretrained="none")
    run = newest_run(workspace, "finetune")
    with pytest.raises(RunError, match="is finished"):
        finetune(workspace, "ring", settings, pretrained="none", resume=run)
    (run.path / "result.json").unlink()
    with pytest.raises(RunError, match="other data and domain"):
        finetune(workspace, "other", settings, pretrained="none", resume=run)


def test_pretraining_is_taken_over_but_for_the_item_biases(workspace, make_domain, small_settings):
    make_domain("a")
    make_domain("b", seed=1)
    make_domain("ring", seed=2, users=30)
    settings = small_settings(model={"num_layers": 2})
    pre = pretrain(workspace, ["a", "b"], settings)
    assert pre["domain"] == "a+b"
    assert pre["n_items"] == 50
    weights = read_weights(find_run(workspace, pre["run"]).weights)
    notes = Notes()
    seen = {}
    keep = finetune_module.fit

    def spy(model, *args, **kwargs):
        seen.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return keep(model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_module, "fit", spy)
        result = finetune(workspace, "ring", small_settings(), reporter=notes)
    assert result["pretrained"] == pre["run"]
    assert torch.equal(seen["layers.0.ssd.in_proj.weight"], weights["layers.0.ssd.in_proj.weight"])
    assert not seen["text.item_bias"].any()
    assert seen["text.item_bias"].shape == (26, 16)
    text = "\n".join(notes.lines)
    assert "left behind: image.item_bias, layers.1.*, text.item_bias" in text
    assert "starting fresh: image.item_bias, text.item_bias" in text


@pytest.mark.parametrize("what", ["adapters", "blocks"])
def test_a_part_is_taken_over_and_adapters_stay_frozen_as_long_as_asked(what, workspace, make_domain, small_settings):
    make_domain("a")
    make_domain()
    pre = find_run(workspace, pretrain(workspace, ["a"], small_settings())["run"])
    given = read_weights(pre.weights)
    moved = {}
    for frozen in (1, 2):
        settings = small_settings(finetune={"epochs": 2, "transfer": what, "frozen_epochs": frozen, "patience": 9})
        with pytest.MonkeyPatch.context() as patch:
            starts = {}
            keep = finetune_module.fit

            def spy(model, *args, starts=starts, keep=keep, frozen=frozen, **kwargs):
                starts.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
                keep(model, *args, **kwargs)
                ends = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                moved[frozen] = {name for name in ends if not torch.equal(starts[name], ends[name])}
                raise KeyboardInterrupt

            patch.setattr(finetune_module, "fit", spy)
            with pytest.raises(KeyboardInterrupt):
                finetune(workspace, "ring", settings, pretrained=pre.id)
        taken = {name for name in given if name in starts and torch.equal(given[name], starts[name])}
        assert ("text.adapter.weight" in taken) == (what == "adapters")
        assert ("layers.0.ssd.in_proj.weight" in taken) == (what == "blocks")
    adapters = {f"{m}.adapter.{p}" for m in ("text", "image") for p in ("weight", "bias")}
    assert adapters <= moved[1]
    assert not adapters & moved[2]
    assert "layers.0.ssd.in_proj.weight" in moved[2]


def test_pretraining_of_another_width_is_refused_if_named_and_passed_over_if_not(
    workspace, make_domain, small_settings
):
    make_domain("a")
    make_domain()
    run = pretrain(workspace, ["a"], small_settings(model={"hidden_size": 32}))["run"]
    with pytest.raises(RunError, match=r"the model takes \["):
        finetune(workspace, "ring", small_settings(), pretrained=run)
    assert not list(workspace.runs.glob("finetune/ring/*")), "a failed start leaves nothing behind"
    notes = Notes()
    assert finetune(workspace, "ring", small_settings(), reporter=notes)["pretrained"] is None
    assert any("from scratch: no pre-training run fits" in line for line in notes.lines)


def test_several_seeds_give_mean_and_deviation(workspace, make_domain, small_settings):
    make_domain()
    result = finetune(workspace, "ring", small_settings(), pretrained="none", seeds=[3, 4])
    run = find_run(workspace, result["run"])
    hits = [member.result["metrics"]["test"]["Hit@5"] for member in run.members]
    assert result["seeds"] == [3, 4]
    assert result["metrics"]["test"]["Hit@5"] == pytest.approx(sum(hits) / 2)
    assert result["metrics_sd"]["test"]["Hit@5"] == pytest.approx(abs(hits[0] - hits[1]) / 2**0.5)
    evaluated = evaluate_run(workspace, run, small_settings())
    assert evaluated["seeds"] == [3, 4]
    assert evaluated["metrics_mean"]["Hit@5"] == pytest.approx(sum(hits) / 2)


def test_a_loss_that_is_not_finite_stops_before_the_step(workspace, make_domain, small_settings, monkeypatch):
    make_domain()
    loss = MMM4Rec.training_loss
    calls = []

    def broken(self, *args, **kwargs):
        calls.append(1)
        return loss(self, *args, **kwargs) * (float("nan") if len(calls) > 40 else 1)

    monkeypatch.setattr(MMM4Rec, "training_loss", broken)
    with pytest.raises(RunError, match="the loss became nan"):
        finetune(workspace, "ring", small_settings(finetune={"epochs": 30}), pretrained="none")
    run = next(all_runs(workspace, "finetune"))
    assert not run.finished
    assert all(torch.isfinite(t).all() for t in read_weights(run.weights).values())


def test_item_biases_follow_their_raw_ids_onto_a_newer_catalogue(workspace, make_domain, small_settings):
    make_domain()
    settings = small_settings()
    finetune(workspace, "ring", settings, pretrained="none")
    run = newest_run(workspace, "finetune")
    make_domain(items=30)
    notes = Notes()
    document = evaluate_run(workspace, run, settings, reporter=notes)
    assert document["n_items"] == 30
    assert any("25 items kept, 5 new (item bias zero), 0 gone" in line for line in notes.lines)


def test_what_does_not_fit_is_said_with_its_kind_of_error(workspace, make_domain, small_settings):
    settings = small_settings()
    with pytest.raises(DataError):
        finetune(workspace, "ring", settings)
    make_domain()
    with pytest.raises(UsageError, match="gru"):
        finetune(workspace, "ring", settings, model="gru")
    with pytest.raises(RunError, match="not a run"):
        finetune(workspace, "ring", settings, pretrained="nothing")
    finetune(workspace, "ring", settings, pretrained="none")
    run = newest_run(workspace, "finetune")
    make_domain(widths=(7, 5))
    with pytest.raises(RunError, match="another encoder"):
        evaluate_run(workspace, run, settings)
    make_domain()
    run.weights.write_bytes(run.weights.read_bytes()[:1000])
    with pytest.raises(RunError, match="cannot be read"):
        evaluate_run(workspace, run, settings)


@pytest.mark.parametrize("missing", ["zero", "mean", "learned"])
@pytest.mark.parametrize("time", ["observed", "published", "none"])
def test_every_treatment_of_missing_vectors_and_time_trains(workspace, make_domain, small_settings, missing, time):
    make_domain(users=20)
    settings = small_settings(
        protocol="published", features={"missing": missing}, model={"time": time}, finetune={"epochs": 1}
    )
    result = finetune(workspace, "ring", settings, pretrained="none")
    assert 0 <= result["metrics"]["test"]["MRR"] <= 1
    names = read_weights(find_run(workspace, result["run"]).weights).keys()
    assert ("image.missing" in names) == (missing == "learned")


def test_an_unseeded_pretraining_runs(workspace, make_domain, small_settings, monkeypatch):
    make_domain()
    monkeypatch.setattr(torch, "seed", lambda: 2**64 - 5)
    settings = small_settings(protocol="published", pretrain={"epochs": 1})
    assert not settings.pretrain.seeded
    assert pretrain(workspace, ["ring"], settings)["epochs"] == 1
