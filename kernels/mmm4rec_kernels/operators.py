"""Operators of torch, some of which are called without its dispatcher where nobody would notice.

An operator can be traced, compiled, recorded and transformed, and costs the host a hundred microseconds a call for it,
twice with gradients. Short sequences take the device no longer than that. So with `operator` an ordinary call of
ordinary tensors goes straight to the function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cached_property
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


class Dispatched:
    """A function of tensors as an operator of torch, for every device.

    Not `torch.library.custom_op`: the first call of one of those imports torch's compiler, which takes a second or
    more. Nor does it look at every call whether a result shares memory with an argument; `torch.library.opcheck` does.

    `overload` is the operator as torch knows it.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.__doc__ = function.__doc__
        self.name, self._function = name, function
        self._setup_context: Callable[..., None] | None = None
        self._backward: Callable[..., Any] | None = None
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, "default", self._untraced)
        torch.library.register_autograd(name, self._gradients, setup_context=self._save)
        namespace, short = name.split("::")
        self.overload = getattr(getattr(torch.ops, namespace), short).default

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        return self.overload(*arguments)

    def register_fake(self, shapes: Callable[..., Any]) -> Callable[..., Any]:
        """As of a custom operator."""
        torch.library.register_fake(self.name, shapes)
        return shapes

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As of a custom operator."""
        self._backward, self._setup_context = backward, setup_context

    def _untraced(self, *arguments: Any) -> Any:
        # A compiler that is about looks into whatever Python calls, also below the dispatcher.
        return (self._opaque if "torch._dynamo" in sys.modules else self._function)(*arguments)

    @cached_property
    def _opaque(self) -> Callable[..., Any]:
        opaque: Callable[..., Any] = torch.compiler.disable(self._function)  # type: ignore[no-untyped-call]
        return opaque

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if self._setup_context is not None:
            self._setup_context(ctx, inputs, output)

    def _gradients(self, ctx: Any, *grads: Any) -> Any:
        if self._backward is None:
            raise RuntimeError(f"{self.name} has no autograd formula: its gradient is not defined")
        return self._backward(ctx, *grads)


class Operator(Dispatched):
    """The same; what it is called with decides whether a call goes through the dispatcher."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        super().__init__(name, function)
        self._graph: type[torch.autograd.Function] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """The function's result."""
        if _unobserved(arguments):
            if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*arguments):
                return self._function(*arguments)
            if self._graph is not None:
                return self._graph.apply(*arguments)  # type: ignore[no-untyped-call]
        return self.overload(*arguments)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As of a custom operator."""
        super().register_autograd(backward, setup_context=setup_context)
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


def dispatched(name: str) -> Callable[[Callable[..., Any]], Dispatched]:
    """Decorates a function of annotated positional arguments, none of which it changes; `name` is namespace::name."""
    return lambda function: Dispatched(name, function)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """The same for calls that go around the dispatcher.

    Lists hold numbers: autograd does not look for tensors in them.
    """
    return lambda function: Operator(name, function)
