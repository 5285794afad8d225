"""Ordinary calls go around torch's dispatcher; whoever looks at a call sees the operator."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmm4rec_kernels.operators import dispatched, operator


@operator("mmm4rec_tests::scaled")
def scaled(x: torch.Tensor, by: torch.Tensor, bias: torch.Tensor | None, power: int) -> torch.Tensor:
    """x times by to a power, and a bias."""
    y = x * by**power
    return y if bias is None else y + bias


@scaled.register_fake
def _shape(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


@operator("mmm4rec_tests::scaled_backward")
def scaled_backward(grad: torch.Tensor, x: torch.Tensor, by: torch.Tensor, power: int) -> torch.Tensor:
    """Gradient of by."""
    return grad * x * power * by ** (power - 1)


scaled_backward.register_fake(lambda grad, x, by, power: by.new_empty(by.shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.power = inputs[3]
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, by = ctx.saved_tensors
    return grad * by**ctx.power, scaled_backward(grad, x, by, ctx.power), grad.clone(), None


scaled.register_autograd(_backward, setup_context=_save)


class Seen(TorchDispatchMode):
    """Names of the operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def inputs(grad: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple((torch.arange(3.0) + n).requires_grad_(grad) for n in (1, 2, 3))


def test_the_gradient_is_the_same_either_way():
    x, by, bias = inputs(True)
    direct = scaled(x, by, bias, 2)
    assert type(direct.grad_fn).__name__ == "GraphBackward"
    assert direct.tolist() == [1 * 4 + 3, 2 * 9 + 4, 3 * 16 + 5]
    dispatched = torch.ops.mmm4rec_tests.scaled(x, by, bias, 2)
    for y in (direct, dispatched):
        grads = torch.autograd.grad(y.sum(), (x, by, bias))
        assert [g.tolist() for g in grads] == [[4, 9, 16], [4, 12, 24], [1, 1, 1]]


def test_nothing_is_kept_where_no_gradient_is_wanted():
    assert not scaled(*inputs(False), 1).requires_grad
    with torch.no_grad():
        assert not scaled(*inputs(True), 1).requires_grad


def test_a_second_gradient_is_refused():
    x, by, bias = inputs(True)
    (grad,) = torch.autograd.grad(scaled(x, by, bias, 2).sum(), by, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_modes_profilers_and_other_tensors_see_the_operator():
    with Seen() as seen:
        scaled(*inputs(False), 1)
    assert "mmm4rec_tests.scaled.default" in seen.names
    with torch.profiler.profile() as profile:
        scaled(*inputs(True), 1)
    assert "mmm4rec_tests::scaled" in {event.name for event in profile.events()}
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.ones(7))
    assert scaled(fake, fake, None, 1).shape == (7,)


def test_is_one_node_to_the_compiler():
    torch.compiler.reset()
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(lambda *a: scaled(*a, 1), backend=look, fullgraph=True)
    assert compiled(*inputs(True)).tolist() == scaled(*inputs(True), 1).tolist()
    assert seen == ["mmm4rec_tests.scaled.default"]


LOOKED_INTO: list[bool] = []


@dispatched("mmm4rec_tests::twice")
def twice(x: torch.Tensor) -> torch.Tensor:
    """Of x, and whether a compiler reads this."""
    LOOKED_INTO.append(torch.compiler.is_compiling())
    return 2 * x


def test_a_compiler_does_not_look_into_the_function():
    @torch.compiler.disable(recursive=False)  # what this calls is compiled
    def outer(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mmm4rec_tests.twice(x)

    torch.compiler.reset()
    LOOKED_INTO.clear()
    assert torch.compile(lambda x: outer(x) + 1, backend="eager")(torch.ones(2)).tolist() == [3, 3]
    assert LOOKED_INTO == [False]


def test_a_call_imports_no_compiler():
    code = (
        "import sys, torch\n"
        "from mmm4rec_kernels.scoring.ops import lookup\n"
        "lookup(torch.ones(3, 2, requires_grad=True), torch.tensor([1]), None, None)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
