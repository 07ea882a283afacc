"""How an operator becomes one of PyTorch's, so that a call costs little before any work is done.

The operator itself is defined in PyTorch's library, where torch.compile, fake tensors, profilers and export see it as
one node. Its derivative stands in front of it: an `autograd.Function` that calls the operator. The usual way,
`torch.library.custom_op` with `register_autograd`, means the same and takes about a hundred microseconds for an
operator of twenty arguments, because it handles each argument in Python several times; this takes about fifteen.

>>> @operator("fastformer::twice")
... def twice(input: Tensor) -> Tensor:
...     return input + input
>>> @twice.register_fake
... def _(input: Tensor) -> Tensor:
...     return torch.empty_like(input)
>>> twice.register_autograd(lambda ctx, grad: 2 * grad, setup_context=lambda ctx, inputs, output: None)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

# One implementation serves every device: it chooses its backend itself.
_ALL_DEVICES = "CompositeExplicitAutograd"

Implementation = Callable[..., Any]


def operator(
    name: str, *, mutates_args: Sequence[str] = (), schema: str | None = None
) -> Callable[[Implementation], Operator]:
    """Make a function the implementation of PyTorch's operator `name`, on all devices.

    Args:
        name: "namespace::name".
        mutates_args: names of the arguments that the implementation changes.
        schema: "(Tensor input, ...) -> ..."; by default it follows from the function's annotations.
    """

    def define(implementation: Implementation) -> Operator:
        inferred = schema or torch.library.infer_schema(implementation, mutates_args=mutates_args)
        return Operator(name, inferred, implementation)

    return define


class Operator:
    """A function that PyTorch knows as an operator.

    Where autograd, forward-mode differentiation or a transform of `torch.func` may want a derivative, a call goes
    through the `autograd.Function` in front of the operator; else straight to the operator.
    """

    def __init__(self, name: str, schema: str, implementation: Implementation) -> None:
        self.name = name
        namespace, base = name.split("::")
        self._library = _library(namespace)
        self._library.define(base + schema, tags=torch.Tag.pt2_compliant_tag)
        self._overload = getattr(getattr(torch.ops, namespace), base).default
        arguments = self._overload._schema.arguments
        self._tensors = tuple(i for i, argument in enumerate(arguments) if "Tensor" in str(argument.type))
        changed = tuple(i for i in self._tensors if arguments[i].is_write)
        self._library.impl(base, _counting_changes(implementation, changed), _ALL_DEVICES)
        if not self._overload._schema.returns:
            self.register_fake(_nothing)
        self._eager: type[torch.autograd.Function] | None = None
        self._transformed: type[torch.autograd.Function] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self._eager is None or self._transformed is None:
            return self._overload(*arguments)
        if torch._C._are_functorch_transforms_active():
            return self._transformed.apply(*arguments)
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and self._learns(arguments)):
            return self._eager.apply(*arguments)
        return self._overload(*arguments)

    def register_fake(self, shapes: Implementation) -> Implementation:
        """Say what the operator returns for tensors without data; where it returns nothing, nothing need be said."""
        return torch.library.register_fake(self.name, shapes, lib=self._library)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[[Any, tuple[Any, ...], Any], None]
    ) -> None:
        """Give the operator a derivative, as `torch.library.register_autograd` does.

        Args:
            backward: takes the context and the outputs' gradients; returns a gradient, or None, for each argument.
            setup_context: takes the context, the arguments and what the operator returned; keeps what `backward` needs.
        """
        call, once = self._overload, _once_differentiable(self.name, backward)

        class Eager(torch.autograd.Function):
            """Keeps the context within its forward: with a method for that, PyTorch binds the arguments by name."""

            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                outputs = call(*arguments)
                setup_context(ctx, arguments, outputs)
                return outputs

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                return once(ctx, *gradients)

        class Transformed(torch.autograd.Function):
            """As the transforms of `torch.func` want it."""

            generate_vmap_rule = True

            @staticmethod
            def forward(*arguments: Any) -> Any:
                return call(*arguments)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
                setup_context(ctx, inputs, output)

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                return once(ctx, *gradients)

        self._eager, self._transformed = Eager, Transformed

    def _learns(self, arguments: tuple[Any, ...]) -> bool:
        """Whether autograd follows one of the arguments."""
        for place in self._tensors:
            argument = arguments[place]
            if argument is not None and argument.requires_grad:
                return True
        return False


@cache
def _library(namespace: str) -> torch.library.Library:
    return torch.library.Library(namespace, "FRAGMENT")


def _nothing(*_: Any) -> None:
    """What an operator that only changes its arguments returns for tensors without data."""


def _counting_changes(implementation: Implementation, changed: tuple[int, ...]) -> Implementation:
    """`implementation`, telling autograd afterwards that these arguments have changed."""
    if not changed:
        return implementation

    def run(*arguments: Any) -> Any:
        outputs = implementation(*arguments)
        increment_version([arguments[place] for place in changed if arguments[place] is not None])
        return outputs

    return run


def _once_differentiable(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward`, with gradients that raise an error where somebody differentiates them again."""

    def run(ctx: Any, *gradients: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            found = backward(ctx, *gradients)
        sources = (*gradients, *ctx.saved_tensors)
        found = found if isinstance(found, tuple) else (found,)
        return tuple(grad if grad is None else _LastDerivative.apply(name, grad, *sources) for grad in found)

    return run


class _LastDerivative(torch.autograd.Function):
    """A gradient that depends on `sources` in a way that nobody can differentiate.

    `torch.autograd.function.once_differentiable` forgets the sources: it gives zeros where a second derivative is
    asked for with respect to one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, gradient: torch.Tensor, *sources: torch.Tensor | None) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(f"{ctx.name} has no second derivative: its gradients cannot be differentiated again")
