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
        for rows in (64, 48, 37, 1):
            fused.unit_sum(x[:rows], x[:rows], 1.0, 0.0)
        fused.unit_sum(x.bfloat16(), x.bfloat16(), 1.0, 0.0)
    kernel = "unit_sum_forward"
    assert compiled.count((kernel, torch.float32)) == 1
    assert compiled.count((kernel, torch.bfloat16)) == 1
    assert len(compiled) == 2


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

    for kind, rows in (("a", 64), ("a", 37), ("b", 48), ("a", 35)):
        compile_once(kind, torch.device("cuda"), lambda rows=rows: work(rows))
    compile_once("c", torch.device("cpu"), lambda: work(3))
    assert calls == [64, 48]
    assert len(compiled) == 2


def _work(rows, width=64, heads=4):
    """Launches of one kind of work on so many rows, each a sequence of its own."""
    from mmm4rec_kernels import ahead
    from mmm4rec_kernels.block import fused as blocks
    from mmm4rec_kernels.block import short, tail_fused
    from mmm4rec_kernels.rows import fused
    from mmm4rec_kernels.scoring import fused as scoring
    from mmm4rec_kernels.windows import fused as windows

    x, vector, head = torch.empty(rows, width), torch.empty(width), torch.empty(heads)
    weights, index = torch.empty(1, width), torch.zeros(rows, dtype=torch.int64)
    taps, taps_bias, steps = torch.empty(3 * width, 4), torch.empty(3 * width), torch.empty(1, rows, heads)
    offsets = torch.arange(rows + 1, dtype=torch.int32)
    parameters = (taps, taps_bias, head, head, head)
    packed = (torch.empty(1, rows, 4 * width + heads), None, None, steps, *parameters, vector, offsets)
    dense = (torch.empty(rows, 20, 4 * width + heads), None, None, torch.empty(rows, 20, heads), *parameters, vector)
    tail = (torch.empty(1, rows, 2 * width + heads), None, torch.empty(rows, 4, width), steps, *parameters, offsets)
    with ahead.recorded() as launches:
        out, total = fused.norm_forward(x[None], None, None, weights, weights, index[:1], 0.1, 1e-5, vector)
        fused.norm_backward(out, total, weights, index[:1], 0.1, 1e-5, True, True, True)
        fused.hardswish_backward(fused.hardswish(x, None, 0.0, vector), x, None, 0.0, vector)
        fused.unit_sum_gradients(fused.unit_sum(x, x, 1.0, 0.0), x, x, 1.0, 0.0)
        fused.sum_rows(x)
        scoring.sum_by_row(x, index, index, 7)
        windows.before(index.int(), index, index, index, 20, True)
        windows.packed(index, 20, 20 * rows)
        out, *saved = short.forward(*packed, True, 20, heads, 1e-12, True)
        short.backward(out, out, *saved, *packed, True, 20, heads, True)
        out, saved = blocks.forward(*dense, None, False, 20, heads, 1e-12, True)
        blocks.backward(out, saved, *dense, None, False, 20, heads, True)
        tail_fused.backward(tail_fused.forward(*tail, index, 20, True), *tail, index, 20, True)
    return launches


def test_kernels_are_compiled_for_no_number_of_rows():
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    def kinds(rows):
        found = set()
        for launch in _work(rows):
            binder = jit.create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
            _, special, options = binder(*launch.arguments, **launch.options)
            found.add((launch.kernel.__name__, str(special), str(options)))
        return found

    backend = make_backend(GPUTarget("cuda", 90, 32))
    assert len(kinds(16)) > 20
    assert kinds(1) == kinds(16) == kinds(33) == kinds(1000)
