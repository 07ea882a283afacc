"""Registration of a function as an operator of PyTorch, with little cost before a call starts its work.

The operator itself is defined in PyTorch's library, where modes, fake tensors and profilers see it as one node.
torch.compile and torch.export see one node too, or the operator's decomposition, which they can fuse. Its derivative is
an `autograd.Function` that calls the operator. The usual way, `torch.library.custom_op` with `register_autograd`, means
the same. It handles each argument in Python several times, and so takes about a hundred microseconds for an operator of
twenty arguments; this module takes about fifteen.

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
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from fastformer.backends import selected_backend, use_triton
from fastformer.ops.autocast import without_autocast

# One implementation is registered for every device: it chooses its backend itself.
_ALL_DEVICES = "CompositeExplicitAutograd"

Implementation = Callable[..., Any]


def operator(
    name: str, *, mutates_args: Sequence[str] = (), schema: str | None = None
) -> Callable[[Implementation], Operator]:
    """Make a function the implementation of PyTorch's operator `name`, on all devices.

    If it returns several tensors, some may be None: a caller of the operator gets None or an empty tensor for them.
    If it takes one named tuple, the operator's arguments are the tuple's fields. The functions for its shapes and its
    formula then take that tuple too, so that a long list of arguments is written once.

    Args:
        name: "namespace::name".
        mutates_args: names of the arguments that the implementation changes.
        schema: "(Tensor input, ...) -> ..."; by default derived from the function's annotations.
    """

    def define(implementation: Implementation) -> Operator:
        bundle = None if schema else _bundle(implementation)
        return Operator(name, schema or _schema(implementation, bundle, mutates_args), implementation, bundle)

    return define


def schema_of_fields(kind: type) -> str:
    """Write the fields of a named tuple as arguments of a schema: "Tensor? mask, SymInt left, ..."."""
    return _inferred(get_type_hints(kind), None, ()).removeprefix("(").removesuffix(") -> ()")


def _bundle(implementation: Implementation) -> Any:
    """Return the named tuple that is a function's only argument; None if it takes several or other arguments."""
    kinds = [kind for name, kind in get_type_hints(implementation).items() if name != "return"]
    return kinds[0] if len(kinds) == 1 and hasattr(kinds[0], "_fields") else None


def _of_fields(function: Implementation, bundle: Any) -> Implementation:
    """Turn a function of a named tuple into a function of the tuple's fields."""
    return function if bundle is None else lambda *arguments: function(bundle._make(arguments))


def _schema(implementation: Implementation, bundle: Any, mutates_args: Sequence[str]) -> str:
    """Derive the schema of a function from its annotations; an output that may be None becomes a tensor."""
    hints = get_type_hints(implementation)
    result = hints.pop("return")
    hints = hints if bundle is None else get_type_hints(bundle)
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
    """A function registered as an operator of PyTorch.

    A call takes the shortest equivalent path:

    - through the dispatcher if PyTorch has to see the operator (`_is_seen`), else directly to the implementation;
    - through the `autograd.Function` if a derivative may be needed, else without it;
    - as its formula in forward mode;
    - as its decomposition while torch.compile or torch.export traces, unless somebody has chosen a backend.
    """

    def __init__(self, name: str, schema: str, implementation: Implementation, bundle: Any) -> None:
        self.name = name
        self._bundle = bundle
        namespace, base = name.split("::")
        self._library = _library(name)
        self._library.define(base + schema, tags=torch.Tag.pt2_compliant_tag)
        self._dispatched = getattr(getattr(torch.ops, namespace), base).default
        arguments = self._dispatched._schema.arguments
        self._tensors = tuple(i for i, argument in enumerate(arguments) if "Tensor" in str(argument.type))
        changed = tuple(i for i in self._tensors if arguments[i].is_write)
        self._direct = _counting_changes(_of_fields(implementation, bundle), changed)
        self._library.impl(base, _with_every_output(_below_autograd(self._direct)), _ALL_DEVICES)
        if not self._dispatched._schema.returns:
            self.register_fake(_no_outputs)
        self._formula: Implementation | None = None
        # An operator that only changes its arguments needs no derivative: the caller knows of the change.
        self._derivative: _Derivative | None = None
        if self._dispatched._schema.returns:
            self._derivative = _no_derivative(name, self._direct, self._dispatched)
        self._has_backward = False
        self._decomposition: Implementation | None = None
        self._decomposed: type[torch.autograd.Function] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._call_compiling(arguments)
        if _is_seen():
            return self._call_seen(arguments)
        plain, learns = self._kinds(arguments)
        call = self._direct if plain else self._dispatched
        if not (learns and torch.is_grad_enabled()):
            return call(*arguments)
        derivative = self._derivative
        if derivative is not None:
            return derivative.apply_direct(*arguments) if plain else derivative.dispatched.apply(*arguments)
        # Autograd must not record what an implementation does.
        with torch.no_grad():
            return call(*arguments)

    def _call_seen(self, arguments: tuple[Any, ...]) -> Any:
        """Call under a mode, a transform, a trace or a profiler."""
        derivative = self._derivative
        if forward_ad._current_level >= 0:
            return self._call_forward_mode(arguments)
        if derivative is not None and torch._C._are_functorch_transforms_active():
            return derivative.transformed.apply(*arguments)
        if derivative is not None and torch.is_grad_enabled() and self._learns(arguments):
            return derivative.dispatched.apply(*arguments)
        return self._dispatched(*arguments)

    def _call_forward_mode(self, arguments: tuple[Any, ...]) -> Any:
        """Call in forward mode, where PyTorch's own functions propagate the tangents."""
        if self._formula is not None:
            return self._formula(*arguments)
        tensors = [arguments[place] for place in self._tensors if arguments[place] is not None]
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise NotImplementedError(f"{self.name} has no derivative in forward mode")
        return self._dispatched(*arguments)

    def _call_compiling(self, arguments: tuple[Any, ...]) -> Any:
        if self._decomposition is not None and selected_backend() == "auto":
            return self._call_decomposed(self._decomposition, arguments)
        return self.call_as_one_node(*arguments)

    def _call_decomposed(self, decomposition: Implementation, arguments: tuple[Any, ...]) -> Any:
        """Call the decomposition, with its own derivative if it has one and no transform needs another."""
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        if self._decomposed is None or transformed or not (torch.is_grad_enabled() and self._learns(arguments)):
            return decomposition(*arguments)
        return self._decomposed.apply(*self._for_compiler(arguments))

    def call_as_one_node(self, *arguments: Any) -> Any:
        """Call so that torch.compile sees one operator, even if it has a decomposition."""
        derivative = self._derivative
        if derivative is None or not self._has_backward:
            return self._dispatched(*arguments)
        arguments = self._for_compiler(arguments)
        if torch._C._are_functorch_transforms_active():
            return derivative.transformed.apply(*arguments)
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and self._learns(arguments)):
            return derivative.dispatched.apply(*arguments)
        return self._dispatched(*arguments)

    def register_fake(self, shapes: Implementation) -> Implementation:
        """Register the operator's results for tensors without data; not needed if it returns nothing."""
        torch.library.register_fake(self.name, _with_every_output(_of_fields(shapes, self._bundle)), lib=self._library)
        return shapes

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[[Any, tuple[Any, ...], Any], None]
    ) -> None:
        """Give the operator a derivative, as `torch.library.register_autograd` does.

        Args:
            backward: takes the context and the outputs' gradients; returns a gradient, or None, for each argument. It
                is made of functions and operators that can be differentiated again.
            setup_context: takes the context, the arguments and the operator's results; saves what `backward` needs.
        """
        self._derivative = _Derivative(self._direct, self._dispatched, backward, setup_context)
        self._has_backward = True

    def register_formula(self, formula: Implementation) -> Implementation:
        """Register what the operator computes, as a formula of differentiable functions of PyTorch.

        The formula takes the operator's arguments and returns its outputs. It is used where the operator's own
        derivative cannot be: in forward mode; and for second derivatives, if the operator computes another one's
        gradients and has no derivative itself.
        """
        self._formula = formula = without_autocast(_of_fields(formula, self._bundle))
        if not self._has_backward:
            self._derivative = _derivative_of_formula(self._direct, self._dispatched, self._tensors, formula)
        return formula

    def register_decomposition(
        self,
        *,
        backward: Callable[..., Any] | None = None,
        setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    ) -> None:
        """Let torch.compile trace the operator's formula in its place, to fuse it with other functions.

        It is traced as long as the backend is "auto". The compiler chooses what it keeps for the backward and what
        it computes again.

        Args:
            backward, setup_context: the derivative, as in `register_autograd`; by default that of the formula.
        """
        self._decomposition = traced = self._formula
        if traced is not None and backward is not None and setup_context is not None:
            self._decomposed = _function(traced, backward, setup_context)

    def _for_compiler(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Prepare arguments for torch.compile: no tensor appears twice, and floats are results of arithmetic.

        It may keep such numbers as symbols.
        """
        found: list[Any] = []
        for place, argument in enumerate(arguments):
            if place in self._tensors and argument is not None and any(argument is each for each in found):
                argument = argument.view_as(argument)
            elif isinstance(argument, float):
                argument = argument * 1.0
            found.append(argument)
        return tuple(found)

    def _learns(self, arguments: tuple[Any, ...]) -> bool:
        """Whether autograd records one of the arguments."""
        for place in self._tensors:
            argument = arguments[place]
            if argument is not None and argument.requires_grad:
                return True
        return False

    def _kinds(self, arguments: tuple[Any, ...]) -> tuple[bool, bool]:
        """Whether all tensors are plain, and whether autograd records one of them."""
        plain, learns = _direct_on_meta or not arguments[0].is_meta, False
        for place in self._tensors:
            argument = arguments[place]
            if argument is not None:
                # A subclass dispatches in its own way; a view may represent the negative of its memory.
                plain = plain and type(argument) in _PLAIN and not argument.is_neg()
                learns = learns or argument.requires_grad
        return plain, learns


def in_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `tensor.to(dtype)`, but skip the call, which costs a microsecond, if the dtype is already right.

    In a decomposition, torch.compile before PyTorch 2.13 loses the gradient of a result that two calls return.
    """
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def runs_in_pytorch(tensor: torch.Tensor) -> bool:
    """Whether PyTorch's own function may replace the operator, which would only call it.

    This is so on a CPU if nothing observes operator calls. PyTorch's derivative in C++ takes a third of the time of
    one in Python, and can be differentiated again.
    """
    return (
        tensor.is_cpu
        and type(tensor) in _PLAIN
        and not use_triton(tensor)
        and not torch.compiler.is_compiling()
        and not _is_seen()
    )


_PLAIN = {torch.Tensor, torch.nn.Parameter}
# torch.autograd.grad(is_grads_batched=True) does not show its batches to Python.
_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")


def _is_seen() -> bool:
    """Whether something observes operator calls: a mode, a transform, a trace or a profiler."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


# A tensor on meta has no data for an implementation; see `direct_on_meta`.
_direct_on_meta = False


@contextmanager
def direct_on_meta() -> Iterator[None]:
    """Return a context that calls implementations directly for meta tensors, as for GPU tensors that they stand for."""
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
        # The last step of PyTorch's own `apply`, without its search of each argument for a transform's tensors.
        of_operator: Any = super(torch.autograd.Function, _function(direct, backward, setup_context))
        self.apply_direct = of_operator.apply


def _function(
    call: Implementation, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> type[torch.autograd.Function]:
    # With a `setup_context` method PyTorch binds the arguments by name, which takes ten microseconds.
    def forward(ctx: Any, *arguments: Any) -> Any:
        outputs = call(*arguments)
        setup_context(ctx, arguments, outputs)
        return outputs

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type("Gradient", (torch.autograd.Function,), members)


def _transformed_function(
    call: Implementation, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> type[torch.autograd.Function]:
    """Make the `autograd.Function` in the form that the transforms of `torch.func` need."""
    members = {
        "forward": staticmethod(call),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    return type("TransformedGradient", (torch.autograd.Function,), members)


_libraries: dict[str, torch.library.Library] = globals().get("_libraries", {})  # survives a reload of this module
"""The library of each operator, by the operator's name."""


def _library(name: str) -> torch.library.Library:
    """Make a library for one operator. If a notebook loads a module again, the old operator is removed."""
    if name in _libraries:
        _libraries.pop(name)._destroy()
    _libraries[name] = torch.library.Library(name.partition("::")[0], "FRAGMENT")
    return _libraries[name]


def _with_every_output(implementation: Implementation) -> Implementation:
    """Wrap `implementation` for the dispatcher: an output that is None becomes an empty tensor.

    Transforms do not support missing outputs.
    """

    def run(*arguments: Any) -> Any:
        outputs = implementation(*arguments)
        if not isinstance(outputs, tuple):
            return outputs
        return tuple([arguments[0].new_empty(0) if output is None else output for output in outputs])

    return run


def _below_autograd(implementation: Implementation) -> Implementation:
    """Wrap `implementation` for the dispatcher so that autograd does not record what it does.

    A caller may have called the operator without the `autograd.Function`.
    """

    def run(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return implementation(*arguments)

    return run


def _no_outputs(*_: Any) -> None:
    """Return nothing: the result, for tensors without data, of an operator that only changes its arguments."""


def _counting_changes(implementation: Implementation, changed: tuple[int, ...]) -> Implementation:
    """Wrap `implementation` so that it tells autograd afterwards that these arguments have changed."""
    if not changed:
        return implementation

    def run(*arguments: Any) -> Any:
        outputs = implementation(*arguments)
        increment_version([arguments[place] for place in changed if arguments[place] is not None])
        return outputs

    return run


def _derivative_of_formula(
    direct: Implementation, dispatched: Implementation, tensors: tuple[int, ...], formula: Implementation
) -> _Derivative:
    """Make the derivative of an operator from its formula."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        ctx.save_for_backward(*[inputs[place] for place in tensors])
        ctx.others = [None if place in tensors else value for place, value in enumerate(inputs)]

    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        arguments: list[Any] = list(ctx.others)
        for place, tensor in zip(tensors, ctx.saved_tensors, strict=True):
            arguments[place] = tensor
        wanted = [place for place in tensors if ctx.needs_input_grad[place]]

        def of_wanted(*values: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            for place, value in zip(wanted, values, strict=True):
                arguments[place] = value
            outputs = formula(*arguments)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        found: list[torch.Tensor | None] = [None] * len(arguments)
        for place, gradient in zip(wanted, vjp(of_wanted, [arguments[i] for i in wanted], gradients), strict=True):
            found[place] = gradient
        return tuple(found)

    return _Derivative(direct, dispatched, backward, setup_context)


def vjp(
    function: Callable[..., tuple[Any, ...]],
    inputs: Sequence[Any],
    gradients: Sequence[Any],
) -> list[torch.Tensor | None]:
    """Gradients of the inputs from the gradients of the outputs, by functions that can be differentiated again.

    Args:
        function: takes the inputs; made of PyTorch's functions.
        gradients: one for each output; None for zeros, and for outputs that the function returns as None.
    """
    places = [place for place, value in enumerate(inputs) if value is not None]
    used: list[int] = []

    def of_tensors(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values: list[torch.Tensor | None] = [None] * len(inputs)
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        outputs = function(*values)
        used[:] = [i for i, output in enumerate(outputs) if output is not None and gradients[i] is not None]
        return tuple([outputs[i] for i in used])

    results: Any = torch.func.vjp(of_tensors, *[inputs[place] for place in places])
    outputs, pull = results
    pulled = pull(tuple([gradients[i].to(output.dtype) for i, output in zip(used, outputs, strict=True)]))
    found: list[torch.Tensor | None] = [None] * len(inputs)
    for place, gradient in zip(places, pulled, strict=True):
        found[place] = gradient
    return found


def _no_derivative(name: str, direct: Implementation, dispatched: Implementation) -> _Derivative:
    """Make the derivative of an operator without one: a backward that reaches it raises an error."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], outputs: Any) -> None: ...

    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        raise RuntimeError(f"{name} has no derivative; detach its inputs, or call it under torch.no_grad()")

    return _Derivative(direct, dispatched, backward, setup_context)
