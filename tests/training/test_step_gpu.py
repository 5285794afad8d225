"""Recorded steps on a GPU: the same gradients as unrecorded ones, and the same run after an interruption."""

import pytest
import torch

from mmm4rec_cli.data.dataset import load_dataset
from mmm4rec_cli.models.registry import build_model
from mmm4rec_cli.training.loop import Task, Trainer, epoch_targets

pytestmark = pytest.mark.gpu


def trainer(workspace, settings, *, graphs, in_batch=False):
    dataset = load_dataset(workspace, ["ring"], "test")
    torch.manual_seed(0)
    device = torch.device("cuda")
    model = build_model("mmm4rec", settings.model, dataset.model_features("mean")).to(device).train()
    sequences = dataset.sequences.to(device)
    targets = sequences.split("leave_one_out").train
    task = Task("finetune", settings.finetune, targets=targets, in_batch=in_batch)
    runtime = settings.runtime.model_copy(update={"cuda_graphs": graphs, "precision": "fp32"})
    failed = []
    made = Trainer(model, sequences, task, max_len=6, runtime=runtime, say=failed.append)
    return made, epoch_targets(sequences, task, 0, 1), failed


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("time", ["observed", "published", "none", "buckets", "decay"])
def test_a_recorded_step_has_the_gradients_of_an_unrecorded_one(workspace, make_domain, small_settings, time, in_batch):
    make_domain(users=200)
    still = {"dropout": 0.0, "embedding_dropout": 0.0, "time_dropout": 0.0, "time": time}
    settings = small_settings(model=still, finetune={"batch_size": 64, "accumulation": 2})
    seen = []
    for graphs in (False, True):
        made, order, failed = trainer(workspace, settings, graphs=graphs, in_batch=in_batch)
        gradients = []
        for group in made.groups(order):
            made.step(group)
            gradients.append(made.parameters.gradient.clone())
        assert not failed
        assert bool(made.gradients._recorded) == graphs
        seen.append(gradients)
    for plain, recorded in zip(*seen, strict=True):
        assert float((plain - recorded).norm() / plain.norm()) < 1e-4


def test_dropout_draws_anew_at_every_replay(workspace, make_domain, small_settings):
    make_domain(users=200)
    settings = small_settings(model={"dropout": 0.5}, finetune={"batch_size": 64, "accumulation": 1})
    made, order, failed = trainer(workspace, settings, graphs=True)
    group = next(iter(made.groups(order)))
    losses = []
    for _ in range(3):
        losses.append(made.gradients(group[0]).item())
    assert not failed
    assert len(set(losses)) == 3
    state = torch.cuda.get_rng_state()
    again = [made.gradients(group[0]).item()]
    torch.cuda.set_rng_state(state)
    again.append(made.gradients(group[0]).item())
    assert again[0] == again[1]
