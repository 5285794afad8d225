"""The sampled loss, and item tables that are moved row by row."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mmm4rec_cli.data.dataset import load_dataset
from mmm4rec_cli.errors import UsageError
from mmm4rec_cli.models.registry import build_model
from mmm4rec_cli.runs import find_run, read_weights
from mmm4rec_cli.training.finetune import finetune
from mmm4rec_cli.training.loop import Task, Trainer
from mmm4rec_cli.training.sampled import ItemTables, small_catalogue
from mmm4rec_cli.training.step import MicroBatch

STILL = dict.fromkeys(("dropout", "embedding_dropout", "time_dropout"), 0.0)


@pytest.fixture(params=["static", "instance"])
def plain(request, workspace, make_domain, small_settings):
    """A trainer with the sampled loss in float64, without dropout, its item tables not zero."""
    make_domain(items=40)
    settings = small_settings(model={**STILL, "fusion": request.param}, finetune={"loss": "sampled", "negatives": 7})
    dataset = load_dataset(workspace, ["ring"], "test")
    torch.manual_seed(0)
    model = build_model("mmm4rec", settings.model, dataset.model_features("learned")).double()
    with torch.no_grad():
        for name in ("text.item_bias", "image.item_bias"):
            table = model.get_parameter(name)
            table[1:] = torch.randn_like(table[1:])
    sequences = dataset.sequences
    return trainer_of(model, sequences, settings, negatives=7)


def trainer_of(model, sequences, settings, negatives):
    targets = sequences.split("leave_one_out").train
    task = Task("finetune", settings.finetune, targets=targets, in_batch=False, negatives=negatives)
    return Trainer(model, sequences, task, max_len=settings.model.max_len, runtime=settings.runtime)


def naive_loss(model, windows, negative_N, n_items):
    """The sampled loss written out, on the whole item table."""
    user_BD, table_VD = model(windows.items_BT, windows.lengths_B, windows.timestamps_BT), model.item_table()
    drawn = [*windows.target_B.tolist(), *negative_N.tolist()]
    losses = []
    for user_D, target in zip(user_BD, windows.target_B.tolist(), strict=True):
        own = user_D @ table_VD[target]
        total = own.exp()
        for item in drawn:
            if item != target:
                expected = windows.target_B.tolist().count(item) + len(negative_N) / n_items
                total = total + (user_D @ table_VD[item]).exp() / expected
        losses.append(total.log() - own)
    return torch.stack(losses).mean()


def test_gradients_equal_those_of_the_naive_form(plain):
    model, sequences = plain.model, plain.sequences
    positions = plain.task.targets[:30]
    negative_N = torch.tensor([3, 3, 40, 1, 17, 9, 9])
    lengths = int(sequences.lengths(positions, plain.max_len).sum())
    plain.parameters.clear()
    loss = plain.gradients(MicroBatch(positions, None, lengths, 1.0, negative_N))
    ids, by_table = plain.gradients.take([])
    windows = sequences.windows(positions, plain.max_len, with_target_time=False)
    named = dict(model.named_parameters())
    expected = naive_loss(model, windows, negative_N, 40)
    gradients = dict(zip(named, torch.autograd.grad(expected, named.values(), allow_unused=True), strict=True))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert set(by_table) == {name for name in named if name.endswith("item_bias") or name == "fusion_weight"} - (
        {"fusion_weight"} if model.fusion_weight is None else set()
    )
    for name, gradient in gradients.items():
        got = named[name].grad
        if name in by_table:
            got = torch.zeros_like(named[name]).index_copy(0, ids, by_table[name])
        torch.testing.assert_close(got, torch.zeros_like(got) if gradient is None else gradient, rtol=1e-8, atol=1e-12)


def test_a_small_catalogue_of_fixed_size_is_the_same_with_rows_behind_it(plain):
    windows = plain.sequences.windows(plain.task.targets[:5], plain.max_len, with_target_time=False, rows=30)
    windows = replace(windows, negative_N=torch.tensor([40, 2]), n_items=40)
    ids, small = small_catalogue(windows)
    assert ids[0] == 0
    assert (ids.diff() > 0).all()
    for name in ("items_BT", "target_B", "negative_N"):
        assert torch.equal(ids[getattr(small, name)], getattr(windows, name))
    more, same = small_catalogue(windows, 60)
    assert torch.equal(more, F.pad(ids, (0, 60 - len(ids))))
    assert torch.equal(same.items_BT, small.items_BT)


def test_the_estimated_sum_and_gradient_are_the_full_ones_on_average(plain):
    """With a fixed batch, over many draws; the log of the sum is less biased the more are drawn."""
    model, sequences = plain.model.eval(), plain.sequences
    positions = plain.task.targets[:6]
    windows = sequences.windows(positions, plain.max_len, with_target_time=False)
    with torch.no_grad():
        user_BD, table_VD = model(windows.items_BT, windows.lengths_B, windows.timestamps_BT), model.item_table()
        full_B = (user_BD @ table_VD[1:].T).exp().sum(1)
        own_B = (user_BD * table_VD[windows.target_B]).sum(1)
        generator = torch.Generator().manual_seed(0)
        sums = []
        for _ in range(800):
            drawn = replace(windows, negative_N=torch.randint(1, 41, (20,), generator=generator), n_items=40)
            losses = torch.stack(
                [
                    model.sampled_loss(
                        user_BD[b : b + 1],
                        table_VD,
                        replace(drawn, target_B=windows.target_B[b : b + 1], candidate_C=windows.target_B, own=b),
                    )
                    for b in range(6)
                ]
            )
            sums.append((losses + own_B).exp())
    spread = torch.stack(sums).std(0) / 800**0.5
    assert ((torch.stack(sums).mean(0) - full_B).abs() < 5 * spread).all()

    user = user_BD.clone().requires_grad_()
    full = torch.autograd.grad(model.loss(user, windows.target_B), user)[0]
    many = replace(windows, negative_N=torch.randint(1, 41, (200_000,), generator=generator), n_items=40)
    sampled = torch.autograd.grad(model.sampled_loss(user, table_VD, many), user)[0]
    assert (sampled - full).norm() < 0.02 * full.norm()


def test_a_step_leaves_every_other_row_as_it_is(plain):
    named = dict(plain.model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    for _ in range(2):
        group = next(plain.groups(plain.task.targets[:3]))
        items = torch.cat([plain.sequences.windows(group[0].positions_B, 6, with_target_time=False).items_BT.flatten()])
        touched = torch.cat([items, plain.sequences.items_N[group[0].positions_B].long(), group[0].negative_N]).unique()
        plain.step(group)
        rest = torch.ones(41, dtype=torch.bool)
        rest[touched] = False
        assert rest.any()
        for name in plain.tables.tables:
            assert torch.equal(named[name][rest], before[name][rest])
            assert not torch.equal(named[name][~rest], before[name][~rest])
            assert not named[name].grad
            before[name] = named[name].detach().clone()
    assert not torch.equal(named["text.adapter.weight"], before["text.adapter.weight"])


@pytest.mark.parametrize("optimizer", ["nadam", "adam"])
def test_a_row_moves_as_torch_moves_it_alone(small_settings, optimizer):
    plan = small_settings(finetune={"optimizer": optimizer, "weight_decay": 0.1}).finetune
    torch.manual_seed(0)
    table = torch.nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    rows = [torch.nn.Parameter(row.clone()) for row in table.detach()]
    kind = {"nadam": torch.optim.NAdam, "adam": torch.optim.Adam}[optimizer]
    more = {"momentum_decay": plan.momentum_decay} if optimizer == "nadam" else {}
    theirs = [kind([row], lr=0.01, weight_decay=0.1, **more) for row in rows]
    ours = ItemTables({"table": table}, plan)
    for ids in ([0, 2], [2], [4, 1, 2], [0]):
        gradient = torch.randn(len(ids), 3, dtype=torch.float64)
        ours.step(torch.tensor(ids), {"table": gradient}, 0.01)
        for i, row in enumerate(ids):
            rows[row].grad = gradient[i].clone()
            theirs[row].step()
    # The product of the momenta is kept in float32, by torch too.
    torch.testing.assert_close(table.detach(), torch.stack([row.detach() for row in rows]), rtol=1e-6, atol=1e-8)


def test_it_learns_and_an_interrupted_training_ends_as_an_uninterrupted_one(
    workspace, make_domain, small_settings, monkeypatch
):
    make_domain()
    plan = {"loss": "sampled", "negatives": 12, "epochs": 10, "patience": 100}
    settings = small_settings(finetune=plan, runtime={"save_minutes": 1e-9})
    result = finetune(workspace, "ring", settings, pretrained="none")
    assert result["metrics"]["test"]["Hit@5"] > result["yardsticks"]["popularity"]["test"]["Hit@5"] + 0.2
    whole = find_run(workspace, result["run"])
    step, calls = Trainer.step, []

    def interrupted(self, group):
        calls.append(1)
        if len(calls) == 17:
            raise KeyboardInterrupt
        return step(self, group)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(workspace, "ring", settings, pretrained="none")
    resumed = find_run(workspace, finetune(workspace, "ring", settings, pretrained="none")["run"])
    assert resumed.path != whole.path
    old, new = read_weights(whole.weights), read_weights(resumed.weights)
    assert all(torch.equal(old[name], new[name]) for name in old)
    losses = [
        [json.loads(row)["loss"] for row in (run.path / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, resumed)
    ]
    assert losses[0] == losses[1]


def test_a_baseline_refuses_in_one_line(workspace, make_domain, small_settings):
    make_domain()
    settings = small_settings(finetune={"loss": "sampled"}, model={"num_layers": 1})
    with pytest.raises(UsageError, match=r"finetune.loss = sampled: sasrec computes its whole catalogue") as raised:
        finetune(workspace, "ring", settings, model="sasrec", pretrained="none")
    assert len(raised.value.problems) == 1
    assert not list(workspace.runs.glob("*/*/*"))
