"""Which backends there are, and that looking costs nothing."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from mmm4rec_kernels import Availability, backends, gated_rms_norm
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


def test_import_leaves_triton_alone():
    code = "import sys, mmm4rec_kernels; mmm4rec_kernels.backends(); print('triton' in sys.modules)"
    import mmm4rec_kernels

    root = mmm4rec_kernels.__path__[0].rsplit("/", 1)[0]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r}); {code}"], capture_output=True, text=True
    )
    assert result.stdout.strip() == "False", result.stdout + result.stderr
