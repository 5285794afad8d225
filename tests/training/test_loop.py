"""One epoch: which steps are taken, and on which gradient."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmm4rec_cli.data.dataset import load_dataset
from mmm4rec_cli.models.registry import build_model
from mmm4rec_cli.settings import Settings
from mmm4rec_cli.training.interrupt import Interruption
from mmm4rec_cli.training.loop import Checkpoints, Task, Trainer, epoch_targets, learning_rate, train_epoch
from mmm4rec_cli.training.optimizer import FlatParameters, NAdam, is_matrix
from mmm4rec_cli.training.state import Progress


class Recording:
    """Keeps each step's gradient and does not move."""

    def __init__(self, model):
        self.lr, self.named = 0.0, dict(model.named_parameters())
        self.steps, self.rates = [], []

    def step(self):
        self.rates.append(self.lr)
        self.steps.append({name: p.grad.clone() for name, p in self.named.items()})


@pytest.fixture
def plain(workspace, make_domain, small_settings):
    """A model without dropout, its sequences and training targets, and the settings."""
    make_domain()
    still = {"dropout": 0.0, "embedding_dropout": 0.0, "time_dropout": 0.0}
    settings = small_settings(model=still, finetune={"batch_size": 32, "accumulation": 4})
    dataset = load_dataset(workspace, ["ring"], "test")
    torch.manual_seed(0)
    model = build_model("mmm4rec", settings.model, dataset.model_features("mean")).double()
    return model, dataset.sequences, dataset.sequences.split("leave_one_out").train, settings


def epoch(plain, **plan):
    model, sequences, targets, settings = plain
    task = Task("finetune", settings.finetune.model_copy(update=plan), targets=targets, in_batch=False)
    trainer = Trainer(model, sequences, task, max_len=settings.model.max_len, runtime=settings.runtime)
    trainer.optimizer = optimizer = Recording(model)
    order = epoch_targets(sequences, task, 5, 1)
    checkpoints = Checkpoints(Path("unused"), trainer, minutes=1e9, interruption=Interruption())
    loss = train_epoch(trainer, order, Progress(), checkpoints, lambda n: None)
    return loss, optimizer.steps, order


def gradient(plain, positions):
    model, sequences, _, settings = plain
    windows = sequences.windows(positions, settings.model.max_len, with_target_time=False)
    model.zero_grad()
    loss = model.loss(model(windows.items_BT, windows.lengths_B, windows.timestamps_BT), windows.target_B)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal(a, b):
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-12)


def test_the_corrected_step_is_the_mean_over_its_group(plain):
    loss, steps, order = epoch(plain)
    groups = order.split(32 * 4)
    assert len(steps) == len(groups) == math.ceil(math.ceil(len(order) / 32) / 4)
    assert len(groups[-1]) % 32, "the last micro-batch is meant to be partial here"
    means = []
    for step, group in zip(steps, groups, strict=True):
        mean, expected = gradient(plain, group)
        assert_equal(step, expected)
        means.append(mean * len(group))
    assert loss == pytest.approx(sum(means) / len(order), rel=1e-9)


def test_the_published_step_adds_up_the_means_of_its_micro_batches(plain):
    _, steps, order = epoch(plain, mean_over_group=False)
    for step, group in zip(steps, order.split(32 * 4), strict=True):
        parts = [gradient(plain, micro)[1] for micro in group.split(32)]
        assert_equal(step, {name: sum(part[name] for part in parts) for name in step})


def test_nadam_moves_as_the_published_formula(plain):
    model, _, _, settings = plain
    plan = settings.finetune
    parameter = dict(model.named_parameters())["text.adapter.weight"]
    theta = parameter.detach().clone()
    flat = FlatParameters(model)
    optimizer = NAdam(flat.values, plan)
    m, v, product = torch.zeros_like(theta), torch.zeros_like(theta), 1.0
    for k in range(1, 4):
        grad = torch.randn_like(theta)
        flat.clear()
        parameter.grad.copy_(grad)
        optimizer.step()
        g = grad + plan.weight_decay * theta
        mu, following = (0.9 * (1 - 0.5 * 0.96 ** (j * 0.004)) for j in (k, k + 1))
        product *= mu
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        n = (v / (1 - 0.999**k)).sqrt() + 1e-8
        theta = theta - plan.lr * ((1 - mu) / (1 - product) * g + following / (1 - product * following) * m) / n
        # torch keeps the product of the momenta in float32.
        torch.testing.assert_close(parameter.detach(), theta, rtol=0, atol=1e-7 * plan.lr)


def test_only_the_published_validation_draws_from_the_training_stream(
    workspace, make_domain, small_settings, monkeypatch
):
    from mmm4rec_cli.training import finetune as module

    make_domain(users=20)
    draws = {}
    for shuffled in (False, True):
        states = []
        keep = module.rank_split

        def spy(*args, order=None, states=states, keep=keep, **kwargs):
            states.append((order is not None, torch.get_rng_state()))
            return keep(*args, order=order, **kwargs)

        monkeypatch.setattr(module, "rank_split", spy)
        settings = small_settings(finetune={"epochs": 1, "shuffle_validation": shuffled})
        draws[shuffled] = module.finetune(workspace, "ring", settings, pretrained="none"), states
        monkeypatch.setattr(module, "rank_split", keep)
    (corrected, plain_states), (published, shuffled_states) = draws[False], draws[True]
    assert [ordered for ordered, _ in plain_states] == [False, False, False]
    assert [ordered for ordered, _ in shuffled_states] == [True, False, False]
    assert not torch.equal(plain_states[0][1], shuffled_states[0][1])
    assert corrected["metrics"] == published["metrics"]


def test_flat_parameters_are_the_models_own(plain):
    model = plain[0]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat = FlatParameters(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        flat.values.add_(1)
    assert all(torch.equal(p, before[name] + 1) for name, p in model.named_parameters())
    model.load_state_dict(before, strict=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert float(flat.values.detach().sum()) != 0
    sum(p.sum() for p in model.parameters()).backward()
    assert int(flat.gradient.sum()) == sum(size for _, size in flat.layout)


def test_flat_nadam_moves_every_parameter_as_torch_does_one_by_one(plain, small_settings):
    from copy import deepcopy

    model, plan = plain[0], plain[3].finetune
    other = deepcopy(model)
    flat = FlatParameters(model)
    ours = NAdam(flat.values, plan)
    theirs = torch.optim.NAdam(
        other.parameters(), lr=plan.lr, weight_decay=plan.weight_decay, momentum_decay=plan.momentum_decay
    )
    for _ in range(3):
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            a.grad.copy_(torch.randn_like(a))
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_number_of_prefixes_draws_that_many_targets_of_each_user(plain):
    _, sequences, targets, settings = plain
    whole = Task("finetune", settings.finetune, targets=targets, in_batch=False)
    drawn = Task("finetune", settings.finetune.model_copy(update={"prefixes": 2}), targets=targets, in_batch=False)
    assert torch.equal(epoch_targets(sequences, whole, 1, 1).sort().values, targets)
    first, again, later = (epoch_targets(sequences, drawn, 1, e) for e in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    counts = sequences.users_of(targets).bincount()
    for order in (first, later):
        assert len(order.unique()) == len(order)
        assert torch.isin(order, targets).all()
        assert torch.equal(sequences.users_of(order).bincount(minlength=len(counts)), counts.clamp(max=2))
    assert not torch.equal(first, first.sort().values), "users are meant to be mixed"


def test_prefixes_are_a_number_or_all():
    assert Settings.model_validate({"finetune": {"prefixes": 3}}).finetune.prefixes == 3
    with pytest.raises(ValueError):
        Settings.model_validate({"finetune": {"prefixes": "some"}})
    with pytest.raises(ValueError):
        Settings.model_validate({"finetune": {"prefixes": 0}})


def test_the_catalogue_shared_by_both_ends_changes_no_gradient(plain):
    model, sequences, targets, settings = plain
    windows = sequences.windows(targets[:40], settings.model.max_len, with_target_time=False)
    flat = FlatParameters(model)
    losses = []
    for rows in (None, int(windows.lengths_B.sum()), int(windows.lengths_B.sum()) + 7):
        flat.clear()
        loss = model.training_loss(
            sequences.windows(targets[:40], settings.model.max_len, with_target_time=False, rows=rows)
        )
        loss.backward()
        losses.append((loss.item(), flat.gradient.clone()))
    flat.clear()
    plain_loss = model.loss(model(windows.items_BT, windows.lengths_B, windows.timestamps_BT), windows.target_B)
    plain_loss.backward()
    for loss, gradient in losses:
        assert loss == pytest.approx(plain_loss.item(), rel=1e-12)
        torch.testing.assert_close(gradient, flat.gradient, rtol=1e-9, atol=1e-13)


def test_the_learning_rate_is_that_of_the_middle_of_each_step(plain):
    model, sequences, targets, settings = plain
    plan = settings.finetune.model_copy(update={"schedule": "linear", "epochs": 2, "warmup": 0.5, "lr": 1.0})
    task = Task("finetune", plan, targets=targets, in_batch=False)
    trainer = Trainer(model, sequences, task, max_len=settings.model.max_len, runtime=settings.runtime)
    trainer.optimizer = optimizer = Recording(model)
    checkpoints = Checkpoints(Path("unused"), trainer, minutes=1e9, interruption=Interruption())
    order = epoch_targets(sequences, task, 5, 1)
    train_epoch(trainer, order, Progress(), checkpoints, lambda n: None)
    expected, done = [], 0
    for group in order.split(32 * 4):
        middle = (done + len(group) / 2) / len(order)
        expected.append((1 - middle / 2) * min(1, middle / 0.5))
        done += len(group)
    assert optimizer.rates == pytest.approx(expected)
    assert expected[0] < expected[1] > expected[2], "both the rise and the fall are meant to be met"


def test_schedules_fall_to_nothing_over_all_epochs(plain):
    plan = plain[3].finetune.model_copy(update={"lr": 2.0, "epochs": 10})
    at = {name: plan.model_copy(update={"schedule": name}) for name in ("constant", "cosine", "linear")}
    assert [learning_rate(at[name], 0, 0.0) for name in at] == [2, 2, 2]
    assert [learning_rate(at[name], 5, 0.0) for name in at] == pytest.approx([2, 1, 1])
    assert [learning_rate(at[name], 9, 1.0) for name in at] == pytest.approx([2, 0, 0])
    assert learning_rate(at["cosine"], 2, 0.5) == pytest.approx(1 + math.cos(math.pi / 4))
    assert learning_rate(plan.model_copy(update={"lr_decay": 0.5}), 3, 0.7) == 0.25


def test_decay_of_matrices_leaves_norms_biases_and_the_scan_alone(plain):
    model = plain[0]
    decays = {name: is_matrix(name, p) for name, p in model.named_parameters()}
    assert decays["text.adapter.weight"]
    assert decays["layers.0.ssd.conv.weight"]
    for name in ("text.item_bias", "text.adapter.bias", "text.norm.weight", "layers.0.ssd.A_log", "layers.0.ssd.D"):
        assert not decays[name]
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, (plainly, *_), _ = epoch(plain, weight_decay=0.0)
    _, (ours, *_), _ = epoch(plain, weight_decay=0.3, decayed="matrices")
    for name, gradient in plainly.items():
        expected = gradient + 0.3 * start[name] if decays[name] else gradient
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-14)
    assert start["text.norm.weight"].any(), "a norm is meant to have something to decay"


def test_the_mean_of_the_weights_follows_the_steps_and_stands_in_for_them(plain):
    model, sequences, targets, settings = plain
    plan = settings.finetune.model_copy(update={"average": 0.3, "accumulation": 1})
    task = Task("finetune", plan, targets=targets, in_batch=False)
    trainer = Trainer(model, sequences, task, max_len=settings.model.max_len, runtime=settings.runtime)
    expected = trainer.parameters.values.detach().clone()
    for step, group in enumerate(trainer.groups(targets)):
        trainer.step(group)
        keep = min(0.3, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * trainer.parameters.values.detach()
    assert step > 4, "the mean is meant to come of age"
    last = trainer.parameters.values.detach().clone()
    with trainer.averaged():
        own = dict(model.named_parameters())["text.adapter.weight"]
        inside = own.detach().clone()
        torch.testing.assert_close(trainer.parameters.values.detach(), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(trainer.parameters.values.detach(), last)
    assert not torch.equal(own, inside)


@pytest.mark.parametrize("optimizer", ["nadam", "adam"])
def test_training_and_evaluating_import_no_compiler(workspace, make_domain, small_settings, optimizer):
    make_domain()
    code = """
import sys
from pathlib import Path
from mmm4rec_cli.evaluation.evaluate_run import evaluate_run
from mmm4rec_cli.runs import newest_run
from mmm4rec_cli.settings import Settings
from mmm4rec_cli.training.finetune import finetune
from mmm4rec_cli.workspace import Workspace

workspace, settings = Workspace(Path(sys.argv[1])), Settings.model_validate_json(sys.argv[2])
finetune(workspace, "ring", settings)
evaluate_run(workspace, newest_run(workspace, "finetune"), settings)
assert "torch._dynamo" not in sys.modules
"""
    settings = small_settings(finetune={"optimizer": optimizer, "epochs": 1})
    subprocess.run([sys.executable, "-c", code, workspace.root, settings.model_dump_json()], check=True)
