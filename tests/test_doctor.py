"""What `doctor` says must be what it tried."""

from pathlib import Path

import pytest
import torch

from mmm4rec_cli import doctor
from mmm4rec_cli.workspace import Workspace


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return doctor.examine(Workspace(tmp_path_factory.mktemp("w") / "not" / "there"))


def test_every_operation_and_backend_is_answered_with_a_reason(found):
    from mmm4rec_kernels import backends

    assert {op: set(states) for op, states in found["backends"].items()} == {
        op: set(states) for op, states in backends().items()
    }
    for states in found["backends"].values():
        assert all(state["why"] for state in states.values())
        assert states["torch"]["available"] is True
        assert "ran on" in states["torch"]["why"]


def test_every_operation_is_tried(found):
    assert set(doctor._trials(torch.device("cpu"))) == set(found["backends"])


def test_a_backend_that_computes_something_else_is_not_live():
    reference = torch.ones(3)
    assert doctor._tried(lambda backend: reference, "torch")[0]
    live, why = doctor._tried(lambda backend: reference * (1 if backend == "reference" else 1.1), "torch")
    assert not live
    assert why.startswith("wrong")
    live, why = doctor._tried(lambda backend: reference * (1 if backend == "reference" else torch.nan), "torch")
    assert not live


def test_a_backend_that_fails_is_not_live():
    def run(backend):
        if backend != "reference":
            raise RuntimeError("no such symbol\nsecond line")
        return torch.ones(1)

    assert doctor._tried(run, "mamba_ssm") == (False, "failed: no such symbol")


def test_disk_space_is_that_of_the_nearest_folder_that_is_there(found):
    assert 0 < found["disk"]["free_bytes"] <= found["disk"]["total_bytes"]


def test_optional_packages_say_what_for_and_how(found, monkeypatch):
    assert found["optional"]["faiss-cpu"]["version"]
    assert all(about["for"] and about["install"].startswith("pip install") for about in found["optional"].values())
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    monkeypatch.setattr(doctor, "_backends", lambda reporter: {})
    assert doctor.examine(Workspace(Path()))["optional"]["onnx"]["version"] is None


def test_what_auto_takes_is_said_for_every_operation(found):
    assert found["choices"].keys() == found["backends"].keys()
    assert all(places["cpu"] == "torch" for places in found["choices"].values())


def test_pairs_of_encoders_are_there_when_both_sides_are(found, monkeypatch, tmp_path):
    from mmm4rec_cli.features.store import PAIRS, PRESETS

    assert set(found["encoders"]) == {*PRESETS, *PAIRS}
    text, image = PAIRS["clip+bert"]
    for here, expected in (({text}, False), ({text, image}, True)):
        monkeypatch.setattr(
            "huggingface_hub.try_to_load_from_cache",
            lambda model, file, here=here: str(tmp_path / model / file) if model in here else None,
        )
        state = doctor._encoders()["clip+bert"]
        assert state["available"] is expected
        assert f"{text} in {tmp_path}" in state["why"]
        assert ("is not on the disk" in state["why"]) is not expected


def test_the_weightless_encoder_is_always_there(found):
    assert found["encoders"]["sketch"]["available"] is True
    assert all(state["why"] for state in found["encoders"].values())
