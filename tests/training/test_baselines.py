"""Baselines through the same commands as MMM4Rec: train, resume, evaluate, recommend, export, report."""

import json
import os
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mmm4rec_cli.app import main
from mmm4rec_cli.data.dataset import load_dataset
from mmm4rec_cli.data.tables import read_tables, write_tables
from mmm4rec_cli.evaluation.evaluate_run import evaluate_run
from mmm4rec_cli.models.registry import MODELS
from mmm4rec_cli.runs import find_run, newest_run, read_weights
from mmm4rec_cli.settings.schema import Optimisation, Settings
from mmm4rec_cli.training.finetune import finetune
from mmm4rec_cli.training.loop import Task, Trainer, epoch_targets
from mmm4rec_cli.training.optimizer import optimizer_of
from mmm4rec_cli.training.pretrain import pretrain

SMALL = [
    "model.hidden_size=16",
    "model.inner_size=16",
    "model.max_len=6",
    "finetune.epochs=2",
    "finetune.batch_size=64",
]
SMALL += ["features.encoder=test", "runtime.device=cpu", "evaluate.k=5"]
FEW = ["model.head_dim=8", "model.baseline.clusters=4", "model.baseline.experts=3", "model.baseline.experts_used=2"]


def run(capsys, workspace, *words):
    code = main([*words, "--workspace", str(workspace.root), "--json"])
    out = capsys.readouterr().out
    return code, json.loads(out)


@pytest.mark.parametrize("model", sorted(MODELS.keys() - {"mmm4rec"}))
def test_the_commands_take_a_baseline(workspace, make_domain, capsys, model):
    make_domain(users=30)
    small = [word for one in [*SMALL, *FEW] for word in ("--set", one)]
    code, trained = run(capsys, workspace, "finetune", "--domain", "ring", "--model", model, *small)
    assert (code, trained["model"]) == (0, model)
    saved = newest_run(workspace, "finetune").settings
    assert saved.finetune.optimizer == "adam"
    code, again = run(capsys, workspace, "evaluate", "--run", trained["run"], "--k", "5")
    assert (code, again["metrics"]) == (0, trained["metrics"]["test"])
    code, answer = run(capsys, workspace, "recommend", "--run", trained["run"], "--user", "u003", "--k", "3")
    assert (code, len(answer["users"][0]["items"])) == (0, 3)
    # torch.export warns about the flat weights of its own GRU.
    form = "safetensors" if model == "gru4rec" else "torch"
    out = str(workspace.root / "served")
    code, made = run(capsys, workspace, "export", "--run", trained["run"], "--format", form, "--out", out)
    assert code == 0, made
    assert (code, made["width"]) == (0, 48 if model in ("m3rec", "hm4sr", "athwe") else 16)
    code, _ = run(capsys, workspace, "report", "--run", trained["run"])
    assert code == 0


def test_what_follows_a_pretraining_is_of_the_same_model(workspace, make_domain, capsys):
    make_domain()
    small = [word for one in [*SMALL, *FEW, "pretrain.epochs=1"] for word in ("--set", one)]
    assert main(["pretrain", "--domain", "ring", "--model", "unisrec", *small, "--workspace", str(workspace.root)]) == 0
    assert "next: mmm4rec finetune --domain ring --model unisrec" in capsys.readouterr().out


def test_help_names_every_model(capsys):
    assert main(["finetune", "--help"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    assert not [name for name in MODELS if name not in shown.replace("│", "")]


def test_the_same_seed_gives_the_same_run(workspace, make_domain, small_settings):
    make_domain()
    settings = small_settings(model={"baseline": {"clusters": 4, "experts": 3, "experts_used": 2}})
    results = [finetune(workspace, "ring", settings, model="athwe") for _ in range(2)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert (
        evaluate_run(workspace, newest_run(workspace, "finetune"), settings)["metrics"] == results[1]["metrics"]["test"]
    )


@pytest.mark.parametrize("model", sorted(MODELS.keys() - {"mmm4rec"}))
def test_an_interrupted_baseline_ends_as_an_uninterrupted_one(
    workspace, make_domain, small_settings, monkeypatch, model
):
    make_domain(users=30)
    few = {"baseline": {"clusters": 4, "experts": 3, "experts_used": 2}}
    settings = small_settings(model={**small_settings().model.model_dump(), **few}, finetune={"epochs": 2})

    def train():
        return find_run(workspace, finetune(workspace, "ring", settings, model=model)["run"])

    step, steps, interrupt_at = Trainer.step, [], -1

    def interrupted(*args):
        steps.append(1)
        if len(steps) == interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(Trainer, "step", interrupted)
    whole, in_all = train(), len(steps)
    steps.clear()
    interrupt_at = in_all // 2 + 1  # the first step of the second epoch
    with pytest.raises(KeyboardInterrupt):
        train()
    resumed = train()
    assert len(steps) == in_all > 3
    assert resumed.path != whole.path
    old, new = read_weights(whole.weights), read_weights(resumed.weights)
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert resumed.result["metrics"] == whole.result["metrics"]


def test_unisrec_takes_its_pretraining_along_but_for_the_id_vectors(workspace, make_domain, small_settings):
    make_domain("one")
    make_domain("two", items=20, seed=4)
    settings = small_settings(model={"temperature": 0.07})
    first = pretrain(workspace, ["one"], settings, model="unisrec")
    second = finetune(workspace, "two", settings, model="unisrec")
    assert second["pretrained"] == first["run"]


def test_items_without_categories_are_said(workspace, make_domain, small_settings):
    class Notes:
        def __init__(self):
            self.lines = []

        def note(self, text):
            self.lines.append(text)

        def stage(self, name, total=None, unit=""):
            from mmm4rec_cli.reporter import SilentReporter

            return SilentReporter().stage(name, total, unit)

    make_domain()
    finetune(workspace, "ring", small_settings(finetune={"epochs": 1}), model="hm4sr", reporter=(notes := Notes()))
    assert "no item has categories: trained without the category loss" in notes.lines


def test_categories_lie_in_the_items_table_where_there_are_any(workspace, make_domain):
    make_domain()
    old = read_tables(workspace, "ring")
    assert load_dataset(workspace, ["ring"], "test").model_features("zero").category_counts() is None
    folder = workspace.processed("ring")
    names = pa.array([["toys", "red"], None] + [["toys"]] * (old.n_items - 2), pa.list_(pa.string()))
    write_tables(
        workspace,
        "ring",
        interactions=pq.read_table(folder / "interactions.parquet"),
        items=old.items.append_column("categories", names),
        users=pq.read_table(folder / "users.parquet"),
        manifest={},
    )
    assert read_tables(workspace, "ring").fingerprint != old.fingerprint
    counts = load_dataset(workspace, ["ring"], "test").model_features("zero").category_counts()
    assert counts[:4].tolist() == [[0, 0], [1, 1], [0, 0], [0, 1]]


@pytest.mark.parametrize("name", ["adam", "nadam"])
def test_an_optimiser_moves_as_torchs(name):
    generator = torch.Generator().manual_seed(0)
    values, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    ours = optimizer_of(values, Optimisation(optimizer=name, lr=0.1, weight_decay=0.5))
    kind = {"adam": torch.optim.Adam, "nadam": torch.optim.NAdam}[name]
    other = kind([theirs], lr=0.1, weight_decay=0.5, foreach=name == "nadam")
    for _ in range(4):
        values.grad = torch.randn(7, generator=generator)
        theirs.grad = values.grad.clone()
        ours.step()
        other.step()
    assert torch.equal(values, theirs)
    assert all(torch.equal(tensor, other.state[theirs][name]) for name, tensor in ours.state.items())


def test_adam_moves_as_its_formula():
    values = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = optimizer_of(values, Optimisation(optimizer="adam", lr=0.1, weight_decay=0.5))
    values.grad = torch.tensor([0.3, 0.0])
    optimizer.step()
    # One step of Adam is the learning rate in the direction of the gradient, decay included.
    assert torch.allclose(values, torch.tensor([0.9, -1.9]))


def test_targets_may_stay_in_their_order(workspace, make_domain):
    make_domain()
    sequences = load_dataset(workspace, ["ring"], "test").sequences
    targets = sequences.split("leave_one_out").train

    def order(**plan):
        task = Task("finetune", Optimisation(**plan), targets, in_batch=False)
        return epoch_targets(sequences, task, 1, 1)

    assert torch.equal(order(shuffle=False), targets)
    assert not torch.equal(order(), targets)
    few = order(shuffle=False, prefixes=1)
    assert torch.equal(few, few.sort().values)
    assert len(few) == len(sequences.users_of(targets).unique())
    assert Settings().finetune.shuffle
