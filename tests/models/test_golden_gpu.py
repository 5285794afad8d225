"""The golden numbers on a GPU, through whatever kernels `auto` chooses there."""

import importlib.util
from pathlib import Path

import pytest
import torch

_spec = importlib.util.spec_from_file_location("golden", Path(__file__).with_name("test_golden.py"))
golden_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden_module)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", golden_module.VARIANTS)
def test_float32_on_the_gpu_stays_close_to_the_published_float64(variant):
    torch.set_float32_matmul_precision("highest")
    golden = golden_module.Golden(variant)
    model = golden.model(torch.float32).eval().cuda()
    user = model(*(tensor.cuda() for tensor in golden.inputs()))
    golden.tensors["in/labels"] = golden.tensors["in/labels"].cuda()
    got = golden_module.outputs(model, golden, user)
    for name, value in got.items():
        assert golden_module.deviation(value.cpu(), golden.tensors[f"out/{name}"]) < 5e-6, name
    wanted = {k.removeprefix("grad/"): v for k, v in golden.tensors.items() if k.startswith("grad/")}
    gradients = golden_module.gradients(model, got["loss_full"])
    for name, want in wanted.items():
        if want.abs().max() > 0:
            assert golden_module.deviation(gradients[name].cpu(), want) < 1e-3, name
