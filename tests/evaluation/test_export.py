"""What is exported computes what the model computes."""

import json

import faiss
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from mmm4rec_cli.errors import UsageError
from mmm4rec_cli.evaluation import export as module
from mmm4rec_cli.evaluation.export import check_format, example_windows, export_run
from mmm4rec_cli.evaluation.recommend import load_recommender
from mmm4rec_cli.models.mmm4rec import MMM4Rec
from mmm4rec_cli.runs import load_weights, newest_run, read_catalogue
from mmm4rec_cli.training.finetune import finetune


@pytest.fixture
def trained(workspace, make_domain, small_settings):
    def make(time="observed"):
        make_domain()
        settings = small_settings(model={**small_settings().model.model_dump(), "time": time}, finetune={"epochs": 1})
        finetune(workspace, "ring", settings, pretrained="none")
        return newest_run(workspace, "finetune"), settings

    return make


def test_safetensors_hold_all_that_the_model_needs(workspace, trained, tmp_path):
    run, settings = trained()
    document = export_run(workspace, run, settings, "safetensors", tmp_path / "out")
    original = load_recommender(workspace, run, settings)
    weights = load_file(tmp_path / "out" / "user_encoder.safetensors")
    features = [weights.pop(f"{name}.features") for name in ("text", "image")]
    model = MMM4Rec(settings.model, *features).eval()
    load_weights(model, weights, tmp_path)
    windows = example_windows(25, 6)
    with torch.no_grad():
        assert torch.equal(model(*windows), original.model(*windows))
    assert torch.equal(load_file(tmp_path / "out" / "item_table.safetensors")["item_table"], original.item_VD)
    assert read_catalogue(tmp_path / "out" / "items.parquet") == original.dataset.raw_item_ids
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == document
    assert (tmp_path / "out" / "settings.json").is_file()


@pytest.mark.parametrize("time", ["observed", "published", "none"])
def test_the_exported_program_agrees_with_the_model_for_any_number_of_users(workspace, trained, tmp_path, time):
    run, settings = trained(time)
    export_run(workspace, run, settings, "torch", tmp_path / "out")
    program = torch.export.load(tmp_path / "out" / "user_encoder.pt2").module()
    model = load_recommender(workspace, run, settings).model
    for users in (1, 2, 3, 50):
        windows = [window.repeat(20, *[1] * (window.dim() - 1))[:users] for window in example_windows(25, 6)]
        with torch.no_grad():
            assert torch.allclose(program(*windows), model(*windows), rtol=1e-5, atol=1e-6)


def test_the_onnx_program_agrees_with_the_model(workspace, trained, tmp_path):
    run, settings = trained()
    export_run(workspace, run, settings, "onnx", tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "user_encoder.onnx")
    model = load_recommender(workspace, run, settings).model
    for users in (1, 50):
        windows = [window.repeat(20, *[1] * (window.dim() - 1))[:users] for window in example_windows(25, 6)]
        given = dict(zip(module.INPUTS, (window.numpy() for window in windows), strict=True))
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(session.run(None, given)[0]), model(*windows), rtol=1e-4, atol=1e-5)


def test_the_index_finds_what_the_products_say(workspace, trained, tmp_path):
    run, settings = trained()
    export_run(workspace, run, settings, "faiss", tmp_path / "out")
    index = faiss.read_index(str(tmp_path / "out" / "items.faiss"))
    table = load_recommender(workspace, run, settings).item_VD
    scores, place = index.search(table[4:6].numpy(), 3)
    want = (table[4:6] @ table[1:].T).topk(3)
    assert place.tolist() == want.indices.tolist()
    assert torch.allclose(torch.from_numpy(scores), want.values, rtol=1e-5)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    for name, line in (("faiss", "pip install faiss-cpu"), ("onnx", "pip install onnx onnxscript")):
        with pytest.raises(UsageError) as error:
            check_format(name)
        assert error.value.hint == line
    with pytest.raises(UsageError, match="pickle"):
        check_format("pickle")
