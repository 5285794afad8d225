"""Operators of torch that are called without its dispatcher where nobody would notice.

A custom operator can be traced, compiled, recorded and transformed, and costs the host a hundred microseconds a call
for it, twice with gradients. Short sequences take the device no longer than that. So an ordinary call of ordinary
tensors goes straight to the function.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch

_ORDINARY = frozenset({torch.Tensor, torch.nn.Parameter, NoneType, bool, int, float, list})
"""Types of arguments that nobody has hooked into."""


def _unobserved(arguments: tuple[Any, ...]) -> bool:
    """Whether nothing looks at the call: no compiler, tracer, profiler, mode, transform or tensor of another kind."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    ) and _ORDINARY.issuperset(map(type, arguments))


class Operator:
    """A function of tensors as a custom operator of torch; what it is called with decides which way a call takes.

    `overload` is the operator as torch knows it.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.__doc__ = function.__doc__
        self._function = function
        self._definition = torch.library.custom_op(name, function, mutates_args=())
        namespace, short = name.split("::")
        self.overload = getattr(getattr(torch.ops, namespace), short).default
        self._graph: type[torch.autograd.Function] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        if _unobserved(arguments):
            if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*arguments):
                return self._function(*arguments)
            if self._graph is not None:
                return self._graph.apply(*arguments)  # type: ignore[no-untyped-call]
        return self.overload(*arguments)

    def register_fake(self, shapes: Callable[..., Any]) -> Callable[..., Any]:
        """As of a custom operator."""
        return self._definition.register_fake(shapes)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As of a custom operator."""
        self._definition.register_autograd(backward, setup_context=setup_context)
        function = self._function

        class Graph(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                output = function(*arguments)
                setup_context(ctx, arguments, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return backward(ctx, *grads)

        self._graph = Graph


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorates a function of annotated positional arguments, none of which it changes; `name` is namespace::name.

    Its lists hold numbers: autograd does not look for tensors in them.
    """
    return lambda function: Operator(name, function)
