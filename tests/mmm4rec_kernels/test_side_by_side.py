"""Which launches are compiled at once, and that none of them runs."""

import os

import pytest
import torch

from mmm4rec_kernels import compile_once, compiled_side_by_side, side_by_side

jit = pytest.importorskip("triton.runtime.jit")


@pytest.fixture
def compiled(monkeypatch):
    """As if a GPU were here; gives the launches that are compiled: kernel, what stands for its first argument."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are compiled where they are not interpreted")
    found = []
    monkeypatch.setattr(side_by_side, "runs", lambda backend: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: index + 0)  # takes a number alone
    warmup = lambda kernel, *arguments, grid, **options: found.append((kernel.__name__, arguments[0]))  # noqa: E731
    monkeypatch.setattr(jit.JITFunction, "warmup", warmup)
    return found


def test_a_kernel_is_compiled_once_for_all_arguments_that_it_serves(compiled):
    from mmm4rec_kernels.rows import fused

    x = torch.randn(64, 32)
    with compiled_side_by_side(torch.device("cuda")):
        for rows in (64, 48, 64, 37):  # a size that 16 does not divide is another kernel
            fused.unit_sum(x[:rows], x[:rows], 1.0, 0.0)
        fused.unit_sum(x.bfloat16(), x.bfloat16(), 1.0, 0.0)
    kernel = "unit_sum_forward"
    assert compiled.count((kernel, torch.float32)) == 2
    assert compiled.count((kernel, torch.bfloat16)) == 1
    assert len(compiled) == 3


def test_kernels_that_say_where_places_lie_are_launched(compiled, monkeypatch):
    from mmm4rec_kernels.windows import fused

    launched = []
    monkeypatch.setattr(jit.JITFunction, "run", lambda kernel, *arguments, **options: launched.append(kernel.__name__))
    with compiled_side_by_side(torch.device("cuda")):
        fused.packed(torch.tensor([2, 1]), 4, 5)
    assert launched == ["place"]
    assert not compiled


def test_without_a_gpu_nothing_changes(compiled):
    with compiled_side_by_side(torch.device("cpu")):
        run = jit.JITFunction.run
    assert run is jit.JITFunction.run


def test_a_kind_of_work_is_compiled_once(compiled, monkeypatch):
    from mmm4rec_kernels.rows import fused

    monkeypatch.setattr(side_by_side, "_done", set())
    x, calls = torch.randn(64, 32), []

    def work(rows):
        calls.append(rows)
        fused.unit_sum(x[:rows], x[:rows], 1.0, 0.0)

    for kind, rows in (("a", 64), ("a", 48), ("b", 48), ("a", 37), ("a", 35)):
        compile_once(kind, (rows,), torch.device("cuda"), lambda rows=rows: work(rows))
    compile_once("c", (), torch.device("cpu"), lambda: work(3))
    assert calls == [64, 48, 37]
    assert len(compiled) == 3
