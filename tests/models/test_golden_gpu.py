"""The golden numbers on a GPU, through whatever kernels `auto` chooses there, in every number format."""

import importlib.util
from pathlib import Path

import pytest
import torch

from mmm4rec_cli.data.sequences import Windows
from mmm4rec_cli.device import precision
from mmm4rec_cli.models import blocks

_spec = importlib.util.spec_from_file_location("golden", Path(__file__).with_name("test_golden.py"))
golden_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden_module)

pytestmark = pytest.mark.gpu
BOUNDS = {"fp32": (2e-6, 2e-4), "tf32": (6e-3, 8e-2), "bf16": (5e-2, 5e-1)}
"""Largest deviation of an output, and of a parameter's gradient, from the published float64 run.

What an H100 gave: fp32 7e-7 and 8e-5, TF32 2.7e-3 and 3e-2, bf16 1.8e-2 and .32; the bias of the time gate, whose
gradient is nearly 0, is allowed five times as much (TF32 .09, bf16 .5).
"""
GATE = "time_gate_residual.1.bias"


@pytest.mark.parametrize("path", ["all places", "read places", "read places, tails"])
@pytest.mark.parametrize("number_format", BOUNDS)
@pytest.mark.parametrize("variant", golden_module.VARIANTS)
def test_outputs_and_gradients_stay_close_to_the_published_float64(variant, number_format, path, monkeypatch):
    if path == "read places, tails":
        monkeypatch.setattr(blocks, "TAILS_FROM", 0)
    allowed, allowed_gradient = BOUNDS[number_format]
    golden = golden_module.Golden(variant)
    model = golden.model(torch.float32).eval().cuda()
    items, lengths, times = (tensor.cuda() for tensor in golden.inputs())
    golden.tensors["in/labels"] = labels = golden.tensors["in/labels"].cuda()
    with precision(number_format, torch.device("cuda")):
        if path == "all places":
            user = model(items, lengths, times)
        else:
            user = model.users(Windows(items, lengths, times, labels, rows=int(lengths.sum()) + 5))
        got = golden_module.outputs(model, golden, user)
    outputs = {k: golden_module.deviation(v.cpu(), golden.tensors[f"out/{k}"]) for k, v in got.items()}
    wanted = {k.removeprefix("grad/"): v for k, v in golden.tensors.items() if k.startswith("grad/") and v.any()}
    gradients = golden_module.gradients(model, got["loss_full"])
    worst = {k: golden_module.deviation(gradients[k].cpu(), v) for k, v in wanted.items()}
    assert max(outputs.values()) < allowed, outputs
    for name, error in worst.items():
        assert error < allowed_gradient * (5 if name.endswith(GATE) else 1), (name, error)


@pytest.mark.filterwarnings("ignore")  # torch's own tracer and compiler
@pytest.mark.parametrize("variant", ["", "_notime"])
def test_compiled_by_torch_outputs_and_gradients_equal_the_published_ones(variant):
    golden = golden_module.Golden(variant)
    model = golden.model(torch.float32).eval().cuda()
    golden.tensors |= {k: v.cuda() for k, v in golden.tensors.items() if k.startswith("in/")}
    with precision("fp32", torch.device("cuda")):
        got = golden_module.compiled_losses(model, golden, "inductor")
        gradients = golden_module.gradients(model, got["loss_full"])
    allowed, allowed_gradient = BOUNDS["fp32"]
    outputs = {k: golden_module.deviation(v.cpu(), golden.tensors[f"out/{k}"]) for k, v in got.items()}
    assert max(outputs.values()) < allowed, outputs
    wanted = {k.removeprefix("grad/"): v for k, v in golden.tensors.items() if k.startswith("grad/") and v.any()}
    for name, want in wanted.items():
        error = golden_module.deviation(gradients[name].cpu(), want)
        assert error < allowed_gradient * (5 if name.endswith(GATE) else 1), (name, error)
