"""A test whether two functions of a module's parameters are equal: both run on random parameters and inputs.

The parameters are random because those of a new model are not: weights of one and biases of zero would hide how they
are used. They replace the module's own parameters only during the call, in float32 on the CPU. So a model on a GPU, in
half precision or on the meta device is probed like any other, and not changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastformer.backends import backend
from fastformer.nn.plain import is_own

_RELATIVE_TOLERANCE = 2e-5
"""Tolerance relative to the largest element: float32 rounding is below a tenth of it, erf and tanh GELU differ more.

The two forms of GELU differ by ten times this tolerance.
"""

_POOL = 1_048_583
"""The number of random numbers in the pool: a prime, so that no matrix has the same row twice."""

Function = Callable[..., Any]
"""A function of a module and tensors."""

ERRORS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError, NotImplementedError)
"""The errors of a forward that does not accept the tensors of a probe."""


class _Call(nn.Module):
    """A function of a module, wrapped as a module whose parameters can be substituted."""

    def __init__(self, module: nn.Module, function: Function) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self.module, *inputs)


@contextmanager
def conditions() -> Iterator[None]:
    """Run everything within the block in float32 on the CPU, with gradients and without autocast.

    Outer settings do not matter, and random generators are restored at the end.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(backend("torch"))
        yield


@contextmanager
def probing(module: nn.Module, training: bool = False) -> Iterator[None]:
    """Put `module` into evaluation (or training) mode within the block."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        for child, _ in modes:
            child.training = training
        # Not torch.manual_seed, which also sets the generators of GPUs.
        torch.default_generator.manual_seed(0)
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def outcome(module: nn.Module, function: Function, *inputs: Any) -> Any:
    """Return ``function(module, *inputs)`` with random parameters of the module."""
    return functional_call(_Call(module, function), _random_tensors(module), inputs)


def _random_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Make a random tensor for each parameter, with variance 1 / (a matrix's inputs); buffers are the module's own."""
    tensors = {}
    for index, (name, parameter) in enumerate(module.named_parameters(remove_duplicate=True)):
        scale = max(1, parameter.shape[-1]) ** -0.5 if parameter.dim() > 1 else 1.0
        tensors[f"module.{name}"] = _random(parameter.shape, index).mul_(scale)
    for name, buffer in module.named_buffers():
        tensors[f"module.{name}"] = buffer.detach().cpu()
    return tensors


def _random(shape: torch.Size, index: int) -> Tensor:
    """Take normal numbers from another place of a pool for each parameter: drawing millions each time takes long."""
    size = shape.numel()
    copies = -(-(size + index) // _POOL)
    return _pool().repeat(copies)[index : index + size].view(shape)


@functools.cache
def _pool() -> Tensor:
    return torch.randn(_POOL, generator=torch.Generator("cpu").manual_seed(1), device="cpu")


def same(module: nn.Module, first: Function, second: Function, inputs: Sequence[tuple[Any, ...]]) -> bool:
    """Whether two functions of `module` agree on all `inputs`: outputs, and gradients of inputs and parameters."""
    tensors = _random_tensors(module)
    for tensor in tensors.values():
        tensor.requires_grad_(tensor.is_floating_point())
    for arguments in inputs:
        expected, actual = (
            _with_gradients(_Call(module, function), tensors, arguments) for function in (first, second)
        )
        if len(expected) != len(actual) or not all(map(close, actual, expected)):
            return False
    return True


def _with_gradients(call: _Call, tensors: dict[str, Tensor], inputs: tuple[Any, ...]) -> list[Tensor | None]:
    leaves = tuple(_leaf(input) for input in inputs)
    output = functional_call(call, tensors, leaves)
    outputs = output if isinstance(output, tuple) else (output,)
    if not all(isinstance(output, Tensor) for output in outputs):
        return []
    wanted = [leaf for leaf in (*tensors.values(), *leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    total = sum(((output * _pattern(output)).sum() for output in outputs), torch.zeros(()))
    if not total.requires_grad:
        return [*outputs]
    return [*outputs, *torch.autograd.grad(total, wanted, allow_unused=True)]


def _leaf(value: Any) -> Any:
    """Make a separate copy of a tensor for each call, with a gradient if possible."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.is_floating_point())


def _pattern(like: Tensor) -> Tensor:
    """A different weight for each element: a sum with these weights has a gradient that no symmetry can hide."""
    return torch.arange(like.numel(), dtype=like.dtype).mul_(0.7).sin_().view(like.shape)


def close(actual: Tensor | None, expected: Tensor | None) -> bool:
    """Whether two tensors are equal up to rounding; None stands for a gradient of zeros."""
    if actual is None or expected is None:
        present = expected if actual is None else actual
        return present is None or not present.any()
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if not expected.numel():
        return True
    error, scale = (actual - expected).abs().max(), expected.abs().max()
    return bool(error <= _RELATIVE_TOLERANCE * scale)


@contextmanager
def marked(module: nn.Module) -> Iterator[None]:
    """Let each dropout in `module` multiply its input by `mark` instead of dropping, within the block.

    The result then shows where the dropout is.
    """
    dropouts = [child for child in module.modules() if isinstance(child, nn.Dropout)]
    handles = [dropout.register_forward_hook(lambda _, inputs, __: mark(inputs[0])) for dropout in dropouts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mark(input: Tensor) -> Tensor:
    """Multiply each element of `input` by a different number, as a dropout's mark."""
    return input * (1.5 + 0.5 * _pattern(input))


def structure_of(module: nn.Module, inside: bool = False) -> tuple[Any, ...]:
    """A key of everything but parameter values that affects `module`'s computation: equal for a model's layers.

    Args:
        inside: `module` is a part of the module under test. Its layer number is ignored: only the cache needs it.
    """
    own = [
        (name, _value(value))
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name != "training" and not (inside and name == "layer_idx")
    ]
    parameters = [(name, tuple(tensor.shape)) for name, tensor in module.named_parameters(recurse=False)]
    buffers = [(name, tuple(tensor.shape)) for name, tensor in module.named_buffers(recurse=False)]
    children = [(name, structure_of(child, inside=True)) for name, child in module.named_children()]
    return type(module), is_own(module), tuple(own), tuple(parameters), tuple(buffers), tuple(children)


def _value(value: Any) -> Any:
    """An attribute's value if it can be compared; otherwise the object's identity."""
    if isinstance(value, tuple | list):
        return tuple(map(_value, value))
    return value if isinstance(value, bool | int | float | str | torch.dtype | torch.device | None) else id(value)
