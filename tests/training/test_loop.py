"""One epoch: which steps are taken, and on which gradient."""

import math

import pytest
import torch

from mmm4rec_cli.data.dataset import load_dataset
from mmm4rec_cli.models.registry import build_model
from mmm4rec_cli.training.loop import Task, nadam, train_epoch


class Recording(torch.optim.SGD):
    """Keeps each step's gradient and does not move."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)
        self.named = dict(model.named_parameters())
        self.steps = []

    def step(self, closure=None):
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
    optimizer = Recording(model)
    torch.manual_seed(5)
    loss = train_epoch(model, sequences, task, optimizer, settings.model.max_len, "fp32", lambda n: None)
    torch.manual_seed(5)
    return loss, optimizer.steps, targets[torch.randperm(len(targets))]


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
    optimizer = nadam(model, plan)
    m, v, product = torch.zeros_like(theta), torch.zeros_like(theta), 1.0
    for k in range(1, 4):
        grad = torch.randn_like(theta)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        parameter.grad = grad.clone()
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
