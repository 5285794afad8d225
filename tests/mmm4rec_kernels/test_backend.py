"""Which backends there are, and that looking costs nothing."""

from __future__ import annotations

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mmm4rec_kernels import Availability, backend, backends, crossovers, gated_rms_norm
from mmm4rec_kernels.backend import OPERATIONS, _announce, availability


def test_every_backend_has_a_reason():
    found = backends()
    assert found.keys() == OPERATIONS.keys()
    for states in found.values():
        assert all(isinstance(state, Availability) and state.why for state in states.values())
        assert states["reference"].available
        assert states["torch"].available


def test_triton_without_a_gpu_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    state = availability("triton")
    assert not state.available
    assert "CUDA" in state.why or "not installed" in state.why


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no backend is called"):
        availability("cuda")


def test_the_choice_is_logged_once(caplog):
    _announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="mmm4rec_kernels"):
        for _ in range(3):
            gated_rms_norm(torch.ones(1, 4), torch.ones(1, 4), torch.ones(4), eps=1e-5)
    assert [record.getMessage() for record in caplog.records] == ["gated_rms_norm on cpu: backend torch"]


@pytest.mark.parametrize(
    ("length", "dtype", "precision", "expected"),
    [
        (64, torch.float32, "high", "triton"),
        (65, torch.float32, "high", "torch"),
        (65, torch.float32, "highest", "triton"),
        (4096, torch.bfloat16, "high", "triton"),
        (None, torch.float32, "high", "triton"),
    ],
)
def test_the_fastest_goes_by_length_and_products(monkeypatch, length, dtype, precision, expected):
    spans = {"tf32": ((64, "triton"), (float("inf"), "torch"))}
    monkeypatch.setattr(crossovers, "FASTEST", {"ssd": spans})
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert crossovers.fastest("ssd", dtype, length) == expected
    assert crossovers.fastest("lookup", dtype, length) == "triton"
    assert crossovers.in_words("ssd") == "triton up to 64 places, torch beyond 64"
    assert crossovers.in_words("lookup") == "triton"


def test_auto_on_a_gpu_takes_the_fastest_and_says_so_once(monkeypatch, caplog):
    tensor = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cuda"))
    monkeypatch.setattr(crossovers, "products", lambda dtype: "tf32x3")  # whatever precision is set
    monkeypatch.setattr(crossovers, "FASTEST", {"ssd": {"tf32x3": ((64, "triton"), (float("inf"), "torch"))}})
    monkeypatch.setattr(backend, "availability", lambda name: Availability(True, "here"))
    _announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="mmm4rec_kernels"):
        taken = [backend.choose("ssd", "auto", tensor, length=length) for length in (20, 20, 500)]
        taken.append(backend.choose("ssd", "auto", tensor, fits=False, unfit="too wide", length=20))
    assert taken == ["triton", "triton", "torch", "torch"]
    assert [record.getMessage() for record in caplog.records] == [
        "ssd on cuda, float32: backend triton",
        "ssd on cuda, float32: backend torch",
        "ssd on cuda, float32, too wide: backend torch",
    ]


def test_a_gpu_is_told_what_auto_takes_there(monkeypatch):
    assert "cuda" not in backend.choices()["ssd"] or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "availability", lambda name: Availability(True, "here"))
    assert backend.choices()["lookup"] == {"cuda": "triton; torch in float64", "cpu": "torch"}
    monkeypatch.setattr(backend, "availability", lambda name: Availability(False, "too old"))
    assert backend.choices()["lookup"]["cuda"] == "torch: too old"


def test_import_leaves_triton_alone():
    code = "import sys, mmm4rec_kernels; mmm4rec_kernels.backends(); print('triton' in sys.modules)"
    import mmm4rec_kernels

    root = mmm4rec_kernels.__path__[0].rsplit("/", 1)[0]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}); {code}"], capture_output=True, text=True
    )
    assert result.stdout.strip() == "False", result.stdout + result.stderr
