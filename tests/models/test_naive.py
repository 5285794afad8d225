"""The model that benchmarks time against gives the published implementation's own numbers."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parents[2] / "kernels" / "benchmarks"


def loaded(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden_module = loaded("golden_of_naive", Path(__file__).with_name("test_golden.py"))
naive_module = loaded("naive_mmm4rec", BENCHMARKS / "naive_mmm4rec.py")


@pytest.mark.parametrize("variant", ["", "_layers1"])
def test_the_naive_model_equals_the_published_numbers(variant):
    golden = golden_module.Golden(variant)
    features = [golden.tensors[f"param/{name}_embedding"].double() for name in ("text", "vision")]
    model = naive_module.NaiveMMM4Rec(SimpleNamespace(**dict(golden.config)), *features).double()
    names = model.state_dict().keys()
    given = {k[6:]: v.double() for k, v in golden.tensors.items() if k.startswith("param/")}
    missing, _ = model.load_state_dict({k: v for k, v in given.items() if k in names}, strict=False)
    assert all(".ssd." in name for name in missing)  # the decoder's second name of the encoder's tensors
    labels = golden.tensors["in/labels"]
    user = model(*golden.inputs())
    loss = model.loss(user, labels)
    got = {"seq_output": user, "scores": model.scores(user), "loss_full": loss}
    for name, value in got.items():
        assert golden_module.deviation(value, golden.tensors[f"out/{name}"]) < 1e-9, name
    loss.backward()
    wanted = {k.removeprefix("grad/"): v for k, v in golden.tensors.items() if k.startswith("grad/") and v.any()}
    named = dict(model.named_parameters())
    assert wanted.keys() <= named.keys()
    assert max(golden_module.deviation(named[name].grad, want) for name, want in wanted.items()) < 1e-6
