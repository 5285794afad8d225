"""Windows from the host's memory: the same micro-batches in the same order, and the same steps."""

import pytest
import torch

from mmm4rec_cli.data import sequences as sequences_module
from mmm4rec_cli.data.dataset import load_dataset
from mmm4rec_cli.data.sequences import placed
from mmm4rec_cli.models.registry import build_model
from mmm4rec_cli.training.delivery import Delivery
from mmm4rec_cli.training.loop import Task, Trainer, epoch_targets
from mmm4rec_cli.training.step import MicroBatch, windows_of


def trainer(workspace, settings, *, delivered, in_batch=False, negatives=0):
    dataset = load_dataset(workspace, ["ring"], "test")
    torch.manual_seed(0)
    model = build_model("mmm4rec", settings.model, dataset.model_features("mean"))
    targets = dataset.sequences.split("leave_one_out").train
    task = Task("finetune", settings.finetune, targets=targets, in_batch=in_batch, negatives=negatives)
    made = Trainer(model, dataset.sequences, task, max_len=settings.model.max_len, runtime=settings.runtime)
    if delivered:
        made.delivery = Delivery(dataset.sequences, made.device, made.max_len, made.world, with_target_time=False)
    return made, epoch_targets(dataset.sequences, task, 0, 1)


@pytest.mark.parametrize("how", [{}, {"in_batch": True}, {"negatives": 9}], ids=["full", "in batch", "sampled"])
def test_both_deliveries_are_the_same_batches_and_steps(workspace, make_domain, small_settings, how):
    make_domain()
    settings = small_settings(finetune={"batch_size": 32, "accumulation": 2})
    seen = []
    for delivered in (False, True):
        made, order = trainer(workspace, settings, delivered=delivered, **how)
        steps = []
        for group in made.groups(order):
            for batch in group:
                assert (batch.windows is not None) == delivered
                here = windows_of(made.sequences, batch, made.max_len, made.world, with_target_time=False)
                if delivered:
                    assert all(torch.equal(t, here.tensors()[n]) for n, t in batch.windows.tensors().items())
            steps.append((*(batch.positions_B.tolist() for batch in group), made.step(group).item()))
        seen.append((steps, made.parameters.values.detach().clone()))
    assert len(seen[0][0]) > 3
    assert seen[0][0] == seen[1][0]
    assert torch.equal(seen[0][1], seen[1][1])


def test_a_micro_batch_is_filled_with_the_next_one(workspace, make_domain, small_settings):
    """What a recorded graph reads: memory that stays, with the content of whatever micro-batch comes."""
    make_domain()
    settings = small_settings(finetune={"batch_size": 32, "accumulation": 2})
    for delivered in (False, True):
        made, order = trainer(workspace, settings, delivered=delivered, negatives=9)
        first, second = next(made.groups(order))
        held = first.cloned()
        places = [tensor.data_ptr() for tensor in held.inputs()]
        held.fill(second)
        assert [tensor.data_ptr() for tensor in held.inputs()] == places
        assert all(torch.equal(a, b) for a, b in zip(held.inputs(), second.inputs(), strict=True))
        assert not any(a.data_ptr() == b.data_ptr() for a, b in zip(held.inputs(), first.inputs(), strict=True))


def test_a_failure_in_the_thread_is_raised_where_the_batch_is_asked_for(workspace, make_domain, small_settings):
    make_domain()
    made, order = trainer(workspace, small_settings(), delivered=True)
    groups = [[MicroBatch(order[:2], None, 2, 1.0)], [MicroBatch(torch.tensor([10**9]), None, 1, 1.0)]]
    delivered = made.delivery.ahead(iter(groups))
    assert len(next(delivered)) == 1
    with pytest.raises(IndexError):
        next(delivered)


class Notes:
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


def test_what_would_fill_the_gpu_stays_with_the_host_and_that_is_said(workspace, make_domain, monkeypatch):
    make_domain()
    sequences, notes = load_dataset(workspace, ["ring"], "test").sequences, Notes()
    assert placed(sequences, torch.device("cpu"), notes).items_N.device.type == "cpu"

    class Properties:
        total_memory = 4 * (sequences.nbytes - 1)

    monkeypatch.setattr(sequences_module.torch.cuda, "get_device_properties", lambda device: Properties)
    assert placed(sequences, torch.device("cuda"), notes) is sequences
    assert notes.lines == ["interactions stay in the host's memory: 0.0 GiB"]
