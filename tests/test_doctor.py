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


def test_the_weightless_encoder_is_always_there(found):
    assert found["encoders"]["sketch"]["available"] is True
    assert all(state["why"] for state in found["encoders"].values())
