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

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from fastformer.backends import use_triton

# One implementation serves every device: it chooses its backend itself.
_ALL_DEVICES = "CompositeExplicitAutograd"

Implementation = Callable[..., Any]


def operator(
    name: str, *, mutates_args: Sequence[str] = (), schema: str | None = None
) -> Callable[[Implementation], Operator]:
    """Make a function the implementation of PyTorch's operator `name`, on all devices.

    One that returns several tensors may return None for some: whoever calls the operator gets None or an empty tensor.

    Args:
        name: "namespace::name".
        mutates_args: names of the arguments that the implementation changes.
        schema: "(Tensor input, ...) -> ..."; by default it follows from the function's annotations.
    """

    def define(implementation: Implementation) -> Operator:
        return Operator(name, schema or _schema(implementation, mutates_args), implementation)

    return define


def schema_of_fields(kind: type) -> str:
    """The fields of a named tuple as the arguments of a schema: "Tensor? mask, SymInt left, ..."."""
    return _inferred(get_type_hints(kind), None, ()).removeprefix("(").removesuffix(") -> ()")


def _schema(implementation: Implementation, mutates_args: Sequence[str]) -> str:
    """The schema of a function, from its annotations; in it no output may be missing."""
    hints = get_type_hints(implementation)
    result = hints.pop("return")
    if get_origin(result) is tuple:
        parts = [torch.Tensor if part == torch.Tensor | None else part for part in get_args(result)]
        result = tuple.__class_getitem__(tuple(parts))
    return _inferred(hints, None if result is type(None) else result, mutates_args)


def _inferred(arguments: dict[str, Any], result: Any, mutates_args: Sequence[str]) -> str:
    def probe() -> None: ...

    by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, by_position, annotation=hint) for name, hint in arguments.items()]
    probe.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    return torch.library.infer_schema(probe, mutates_args=mutates_args)


class Operator:
    """A function that PyTorch knows as an operator.

    A call takes the shortest way that means the same:

    - by the dispatcher, where PyTorch has to see the operator (`_is_seen`), else straight to the implementation;
    - through the `autograd.Function` where somebody may want a derivative, else past it.
    """

    def __init__(self, name: str, schema: str, implementation: Implementation) -> None:
        self.name = name
        namespace, base = name.split("::")
        self._library = _library(namespace)
        self._library.define(base + schema, tags=torch.Tag.pt2_compliant_tag)
        self._dispatched = getattr(getattr(torch.ops, namespace), base).default
        arguments = self._dispatched._schema.arguments
        self._tensors = tuple(i for i, argument in enumerate(arguments) if "Tensor" in str(argument.type))
        changed = tuple(i for i in self._tensors if arguments[i].is_write)
        self._direct = _counting_changes(implementation, changed)
        self._library.impl(base, _with_every_output(_below_autograd(self._direct)), _ALL_DEVICES)
        if not self._dispatched._schema.returns:
            self.register_fake(_nothing)
        self._derivative: _Derivative | None = None

    def __call__(self, *arguments: Any) -> Any:
        derivative = self._derivative
        if torch.compiler.is_compiling() or _is_seen():
            if derivative is None:
                return self._dispatched(*arguments)
            if torch.compiler.is_compiling():
                arguments = self._for_compiler(arguments)
            if torch._C._are_functorch_transforms_active():
                return derivative.transformed.apply(*arguments)
            if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and self._learns(arguments)):
                return derivative.dispatched.apply(*arguments)
            return self._dispatched(*arguments)
        plain, learns = self._kinds(arguments)
        call = self._direct if plain else self._dispatched
        if not (learns and torch.is_grad_enabled()):
            return call(*arguments)
        if derivative is not None:
            return derivative.apply_direct(*arguments) if plain else derivative.dispatched.apply(*arguments)
        # Autograd must not follow what an implementation does.
        with torch.no_grad():
            return call(*arguments)

    def register_fake(self, shapes: Implementation) -> Implementation:
        """Say what the operator returns for tensors without data; where it returns nothing, nothing need be said."""
        torch.library.register_fake(self.name, _with_every_output(shapes), lib=self._library)
        return shapes

    def register_autograd(
        self,
        backward: Callable[..., Any],
        *,
        setup_context: Callable[[Any, tuple[Any, ...], Any], None],
        twice: bool = False,
    ) -> None:
        """Give the operator a derivative, as `torch.library.register_autograd` does.

        Args:
            backward: takes the context and the outputs' gradients; returns a gradient, or None, for each argument.
            setup_context: takes the context, the arguments and what the operator returned; keeps what `backward` needs.
            twice: whether `backward` is made of functions that have derivatives themselves; else its gradients raise an
                error where somebody differentiates them again.
        """
        backward = backward if twice else _once_differentiable(self.name, backward)
        self._derivative = _Derivative(self._direct, self._dispatched, backward, setup_context)

    def _for_compiler(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same arguments as torch.compile takes them: no tensor twice, and numbers that it has met before, which
        it may keep as symbols."""
        found: list[Any] = []
        for place, argument in enumerate(arguments):
            if place in self._tensors and argument is not None and any(argument is each for each in found):
                argument = argument.view_as(argument)
            elif isinstance(argument, float):
                argument = argument * 1.0
            found.append(argument)
        return tuple(found)

    def _learns(self, arguments: tuple[Any, ...]) -> bool:
        """Whether autograd follows one of the arguments."""
        for place in self._tensors:
            argument = arguments[place]
            if argument is not None and argument.requires_grad:
                return True
        return False

    def _kinds(self, arguments: tuple[Any, ...]) -> tuple[bool, bool]:
        """Whether all tensors are plain, and whether autograd follows one of them."""
        plain, learns = _direct_on_meta or not arguments[0].is_meta, False
        for place in self._tensors:
            argument = arguments[place]
            if argument is not None:
                # A subclass has a dispatch of its own; a view may stand for its negative.
                plain = plain and type(argument) in _PLAIN and not argument.is_neg()
                learns = learns or argument.requires_grad
        return plain, learns


def runs_in_pytorch(tensor: torch.Tensor) -> bool:
    """Whether a call with `tensor` may be PyTorch's own function in place of an operator that would only run it.

    So it is on a CPU where nothing looks at the operators that are called: a derivative in C++ takes a third of the
    time of one in Python, and has a derivative of its own.
    """
    return (
        tensor.is_cpu
        and type(tensor) in _PLAIN
        and not use_triton(tensor)
        and not torch.compiler.is_compiling()
        and not _is_seen()
    )


_PLAIN = {torch.Tensor, torch.nn.Parameter}
# torch.autograd.grad(is_grads_batched=True) hides its batches from Python.
_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")


def _is_seen() -> bool:
    """Whether something looks at the operators that are called: a mode, a transform, a trace or a profiler."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


# A tensor on meta has no data for an implementation.
_direct_on_meta = False


@contextmanager
def direct_on_meta() -> Iterator[None]:
    """Call implementations for tensors on meta within the block as for those on a GPU, which they stand for."""
    global _direct_on_meta
    previous, _direct_on_meta = _direct_on_meta, True
    try:
        yield
    finally:
        _direct_on_meta = previous


class _Derivative:
    """The `autograd.Function`s in front of an operator."""

    def __init__(
        self,
        direct: Implementation,
        dispatched: Implementation,
        backward: Callable[..., Any],
        setup_context: Callable[..., None],
    ) -> None:
        self.dispatched = _function(dispatched, backward, setup_context)
        self.transformed = _transformed_function(dispatched, backward, setup_context)
        # What PyTorch's own `apply` ends in: before it, it looks at each argument for a transform's.
        of_operator: Any = super(torch.autograd.Function, _function(direct, backward, setup_context))
        self.apply_direct = of_operator.apply


def _function(
    call: Implementation, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> type[torch.autograd.Function]:
    # With a method for the context PyTorch binds the arguments by name, which takes ten microseconds.
    def forward(ctx: Any, *arguments: Any) -> Any:
        outputs = call(*arguments)
        setup_context(ctx, arguments, outputs)
        return outputs

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type("Gradient", (torch.autograd.Function,), members)


def _transformed_function(
    call: Implementation, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> type[torch.autograd.Function]:
    """As the transforms of `torch.func` want it."""
    members = {
        "forward": staticmethod(call),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    return type("TransformedGradient", (torch.autograd.Function,), members)


@cache
def _library(namespace: str) -> torch.library.Library:
    return torch.library.Library(namespace, "FRAGMENT")


def _with_every_output(implementation: Implementation) -> Implementation:
    """`implementation` for the dispatcher, to which an output that is None is an empty tensor: no transform knows
    outputs that may be missing."""

    def run(*arguments: Any) -> Any:
        outputs = implementation(*arguments)
        if not isinstance(outputs, tuple):
            return outputs
        return tuple([arguments[0].new_empty(0) if output is None else output for output in outputs])

    return run


def _below_autograd(implementation: Implementation) -> Implementation:
    """`implementation` for the dispatcher, where somebody may have called the operator without the function in front of
    it: autograd does not follow what it does."""

    def run(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return implementation(*arguments)

    return run


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
