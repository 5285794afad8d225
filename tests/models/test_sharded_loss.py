"""The full loss with the item table in slices over processes, against one process with all of it."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from mmm4rec_cli.data.sequences import Windows
from mmm4rec_cli.models import sharded_loss
from mmm4rec_cli.models.mmm4rec import MMM4Rec
from mmm4rec_cli.settings import Settings
from mmm4rec_cli.world import World

ITEMS, USERS = 23, 7


def model_of(fusion, padding):
    config = Settings().model.model_copy(
        update={"hidden_size": 8, "inner_size": 8, "d_state": 4, "head_dim": 4, "n_groups": 4, "max_len": 5}
        | {"dropout": 0.0, "embedding_dropout": 0.0, "time_dropout": 0.0, "time": "observed"}
        | {"fusion": fusion, "padding_candidate": padding}
    )
    torch.manual_seed(0)
    features = torch.randn(ITEMS + 1, 6)
    features[0] = 0
    model = MMM4Rec(config, features, features.flip(1)).double()
    with torch.no_grad():
        model.text.item_bias.normal_()
    return model


def windows_of():
    generator = torch.Generator().manual_seed(1)
    lengths_B = torch.randint(1, 6, (USERS,), generator=generator)
    real_BT = torch.arange(5) < lengths_B[:, None]
    return Windows(
        torch.randint(1, ITEMS + 1, (USERS, 5), generator=generator) * real_BT,
        lengths_B,
        torch.randint(0, 10**6, (USERS, 5), generator=generator).cumsum(1) * real_BT,
        torch.randint(1, ITEMS + 1, (USERS,), generator=generator),
    )


def part(windows, share):
    names = ("items_BT", "lengths_B", "timestamps_BT", "target_B")
    own = replace(windows, **{name: getattr(windows, name)[share] for name in names})
    return own.among(windows.target_B, share.start)


def one_of_two(rank, path, fusion, padding):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    sharded_loss._BLOCK_ELEMENTS = {"cpu": 30}  # several blocks a slice
    world, model, windows = World(rank, 2), model_of(fusion, padding), windows_of()
    share = world.share(USERS)
    loss = model.sharded_loss(part(windows, share), world) * (share.stop - share.start) / USERS
    loss.backward()
    total = loss.detach().clone()
    world.add_up(total)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        world.add_up(gradient)
        gradients[name] = gradient
    if rank == 0:
        torch.save({"loss": total, "gradients": gradients}, f"{path}/found.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("fusion", "padding"), [("static", False), ("instance", True)])
def test_two_processes_find_the_loss_and_gradients_of_one(tmp_path, fusion, padding):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path), fusion, padding), nprocs=2)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    model = model_of(fusion, padding)
    loss = model.training_loss(windows_of())
    loss.backward()
    torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-10, atol=1e-12)
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found["gradients"][name], expected, rtol=1e-8, atol=1e-11)
