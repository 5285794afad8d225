"""Published checkpoints in: taken over by fine-tuning, and evaluated as they are."""

import pytest
import torch

from mmm4rec_cli.data.dataset import load_dataset
from mmm4rec_cli.errors import RunError
from mmm4rec_cli.evaluation.adopt import adopt_checkpoint, published_settings
from mmm4rec_cli.evaluation.evaluate_run import evaluate_run
from mmm4rec_cli.models.published import read_checkpoint, sizes
from mmm4rec_cli.models.registry import build_model
from mmm4rec_cli.runs import load_model, newest_run
from mmm4rec_cli.training.finetune import finetune


@pytest.fixture
def checkpoint(workspace, make_domain, small_settings, tmp_path):
    """A fine-tuned model in the published format, and the figures that it had."""
    make_domain()
    settings = small_settings(model={"time": "published", "num_layers": 2})
    result = finetune(workspace, "ring", settings, pretrained="none")
    dataset = load_dataset(workspace, ["ring"], "test")
    model, _ = load_model(newest_run(workspace, "finetune"), dataset, torch.device("cpu"))
    path = tmp_path / "best_epoch_model.ckpt"
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    document = {
        "model": model.published_state(),
        "optimizer": optimizer,
        "epoch": 3,
        "best_val_score": torch.tensor(0.5),
    }
    torch.save(document, path)
    return path, settings, dataset, result


def test_sizes_are_read_from_the_tensors(checkpoint):
    path, settings, _, _ = checkpoint
    found = sizes(read_checkpoint(path))
    model = settings.model.model_dump()
    assert found == {name: model[name] for name in found}
    assert {"max_len", "inner_size", "time", "d_state", "n_groups"} <= found.keys()


def test_a_published_checkpoint_is_evaluated_to_the_same_figures(checkpoint, workspace, small_settings):
    path, _settings, dataset, result = checkpoint
    adopted = published_settings(path, small_settings())
    assert adopted.model.time == "published"
    run = adopt_checkpoint(workspace, path, dataset, adopted)
    assert run.path.parent.parent.name == "evaluate"
    assert evaluate_run(workspace, run, adopted)["metrics"] == result["metrics"]["test"]


def test_fine_tuning_takes_a_published_checkpoint_over_and_with_it_its_time(checkpoint, workspace, small_settings):
    path, _, _, _ = checkpoint
    settings = small_settings(finetune={"epochs": 1})
    result = finetune(workspace, "ring", settings, pretrained=str(path))
    assert result["pretrained"] == path.name
    assert newest_run(workspace, "finetune").settings.model.time == "published"
    explicit = finetune(workspace, "ring", settings, pretrained=str(path), time_is_set=True)
    assert newest_run(workspace, "finetune").settings.model.time == "observed"
    assert explicit["pretrained"] == path.name


def test_damaged_and_foreign_checkpoints_are_refused_in_one_line(checkpoint, workspace, small_settings, tmp_path):
    path, _, dataset, _ = checkpoint
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(RunError, match="not a published checkpoint"):
        read_checkpoint(cut)
    harmful = tmp_path / "harmful.ckpt"
    torch.save({"model": print}, harmful)
    with pytest.raises(RunError, match="not a published checkpoint"):
        read_checkpoint(harmful)
    wider = small_settings(model={"hidden_size": 32})
    with pytest.raises(RunError, match=r"holds \[.*the model takes \["):
        finetune(workspace, "ring", wider, pretrained=str(path))
    other = build_model("mmm4rec", wider.model, dataset.model_features("zero"))
    torch.save({"model": {"x": torch.zeros(1)}}, tmp_path / "else.ckpt")
    with pytest.raises(RunError, match="lacks text_adapter"):
        sizes(read_checkpoint(tmp_path / "else.ckpt"))
    assert other.published_state()["fusion_factor"].item() == 1
