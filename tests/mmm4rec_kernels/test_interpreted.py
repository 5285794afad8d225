"""The Triton kernels in Triton's interpreter, in a process of their own.

The switch must be set before Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(*selection: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    paths = [str(here.parents[1] / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection]
    names = ("test_fused.py", "test_scoring.py", "test_selective_scan.py", "test_in_torch.py")
    names += ("test_tail.py", "test_windows.py")
    files = [str(here / name) for name in names]
    return subprocess.run([*command, *files], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already inside")
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
class TestInterpreted:
    def test_short_sequences(self):
        pytest.importorskip("triton")
        result = run(
            "-k",
            "test_scan[False-3] or test_convolution[3-4] or test_norm or test_block[self-5] or (triton and not lookup)"
            " or test_the_selective_kernels or test_compiles_in_one_graph[ssd] or test_compiles_in_one_graph[linear]"
            " or test_tail_kernel or test_windows_are or test_a_packing"
            " or test_block_joined[cross-14]",
        )
        assert result.returncode == 0, result.stdout
        assert "48 passed" in result.stdout

    @pytest.mark.slow
    def test_everything_small(self):
        pytest.importorskip("triton")
        result = run("-m", "not gpu")
        assert result.returncode == 0, result.stdout
