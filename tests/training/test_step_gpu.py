"""Recorded steps on a GPU: the same gradients as unrecorded ones, and the same run after an interruption."""

import numpy as np
import pytest
import torch

from mmm4rec_cli.data.dataset import ModelFeatures
from mmm4rec_cli.data.sequences import Sequences
from mmm4rec_cli.models.registry import build_model
from mmm4rec_cli.settings.schema import Optimisation
from mmm4rec_cli.training.loop import Task, Trainer, epoch_targets
from mmm4rec_cli.training.optimizer import optimizer_of

pytestmark = pytest.mark.gpu


def ring(users=200, items=25):
    """Users walk along a ring of items; made in memory, since this machine's pyarrow may read no feature file."""
    random = np.random.default_rng(0)
    counts = random.integers(4, 12, users)
    start = np.repeat(random.integers(0, items, users), counts)
    step = np.concatenate([np.arange(count) for count in counts])
    time = 1_500_000_000 + np.cumsum(random.integers(0, 3, counts.sum())) * 86_400
    item = 1 + (start + step) % items
    sequences = Sequences.of(np.repeat(np.arange(users), counts).astype(np.int32), item.astype(np.int32), time, users)
    angle = torch.arange(items + 1) * (2 * torch.pi / items)
    text, image = (torch.stack([wave(k * angle) for k in range(1, 6)], 1) for wave in (torch.cos, torch.sin))
    text[0] = image[0] = 0
    return sequences, ModelFeatures(text, image, None, None)


def trainer(settings, *, graphs, in_batch=False, negatives=0, items=25):
    sequences, features = ring(items=items)
    torch.manual_seed(0)
    device = torch.device("cuda")
    model = build_model("mmm4rec", settings.model, features).to(device).train()
    sequences = sequences.to(device)
    targets = sequences.split("leave_one_out").train
    task = Task("finetune", settings.finetune, targets=targets, in_batch=in_batch, negatives=negatives)
    runtime = settings.runtime.model_copy(update={"cuda_graphs": graphs, "precision": "fp32"})
    failed = []
    made = Trainer(model, sequences, task, max_len=6, runtime=runtime, say=failed.append)
    return made, epoch_targets(sequences, task, 0, 1), failed


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("time", ["observed", "published", "none", "buckets", "decay"])
def test_a_recorded_step_has_the_gradients_of_an_unrecorded_one(small_settings, time, in_batch):
    still = {"dropout": 0.0, "embedding_dropout": 0.0, "time_dropout": 0.0, "time": time}
    settings = small_settings(model=still, finetune={"batch_size": 64, "accumulation": 2})
    seen = []
    for graphs in (False, True):
        made, order, failed = trainer(settings, graphs=graphs, in_batch=in_batch)
        gradients = []
        for group in made.groups(order):
            made.step(group)
            gradients.append(made.parameters.gradient.clone())
        assert not failed
        assert bool(made.gradients._recorded) == graphs
        seen.append(gradients)
    for plain, recorded in zip(*seen, strict=True):
        assert float((plain - recorded).norm() / plain.norm()) < 1e-4


def test_recorded_steps_of_the_sampled_loss_move_as_unrecorded_ones(small_settings):
    still = {"dropout": 0.0, "embedding_dropout": 0.0, "time_dropout": 0.0}
    settings = small_settings(model=still, finetune={"batch_size": 64, "accumulation": 2, "loss": "sampled"})
    seen = []
    for graphs in (False, True):
        made, order, failed = trainer(settings, graphs=graphs, negatives=11, items=60)
        made.draws.manual_seed(5)
        losses = [made.step(group).item() for group in made.groups(order)]
        assert not failed
        assert bool(made.gradients.inner._recorded) == graphs
        seen.append(
            (losses, made.parameters.values.detach(), *(table.detach() for table in made.tables.tables.values()))
        )
    assert seen[1][0] == pytest.approx(seen[0][0], rel=1e-4)
    for plain, recorded in zip(seen[0][1:], seen[1][1:], strict=True):
        assert (
            float((plain - recorded).norm() / plain.norm()) < 1e-2
        )  # a first step divides small gradients by themselves


def test_dropout_draws_anew_at_every_replay(small_settings):
    settings = small_settings(model={"dropout": 0.5}, finetune={"batch_size": 64, "accumulation": 1})
    made, order, failed = trainer(settings, graphs=True)
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


@pytest.mark.parametrize("name", ["adam", "nadam"])
def test_an_optimiser_moves_as_torchs_on_a_gpu(name):
    torch.manual_seed(0)
    values, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 3000, device="cuda")) for _ in range(2))
    ours = optimizer_of(values, Optimisation(optimizer=name, lr=0.1, weight_decay=0.5))
    kind, options = {"adam": (torch.optim.Adam, {"fused": True}), "nadam": (torch.optim.NAdam, {})}[name]
    other = kind([theirs], lr=0.1, weight_decay=0.5, **options)
    for _ in range(3):
        values.grad = torch.randn(3000, device="cuda")
        theirs.grad = values.grad.clone()
        ours.step()
        other.step()
    torch.testing.assert_close(values, theirs, rtol=1e-5, atol=1e-5)
