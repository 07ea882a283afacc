"""Calls of functions that studies time, with or without backward, and the check that the peers' results agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.timing import Run

Function = Callable[..., Any]
"""A function of tensors and other arguments that returns a tensor, or a sequence of tensors and None."""

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The largest `distance` of two correct results: sums may have different orders, and intermediates may be rounded."""

# The number of sizes that a function may be compiled for in a run. Beyond this limit torch.compile gives up silently.
_RECOMPILATIONS = 1000
_compiler = "inductor"


@dataclass(frozen=True)
class Call:
    """A call of a function, and of its backward if `gradients` are given. It can be used as a `Run`: see `__call__`.

    Attributes:
        function: the function to call.
        inputs: its arguments. Those that require a gradient get one.
        gradients: the gradients of the floating-point outputs; None for no backward.
    """

    function: Function
    inputs: Sequence[Any]
    gradients: Sequence[Tensor] | None = None

    def __call__(self) -> list[Tensor]:
        """Make the call. Returns the outputs and, with a backward, the gradients."""
        if self.gradients is None:
            return self.forward()
        outputs = self.forward()
        return [*(each.detach() for each in outputs), *self._backward(outputs)]

    def forward(self) -> list[Tensor]:
        """Make the forward. Returns the outputs; with a backward, only the floating-point ones with their graph."""
        with torch.set_grad_enabled(self.gradients is not None):
            outputs = tensors(self.function(*self.inputs))
        return outputs if self.gradients is None else [each for each in outputs if each.is_floating_point()]

    def backward(self) -> Run:
        """Make the forward, and return a run of the backward alone, which can be used once."""
        outputs = self.forward()
        return lambda: self._backward(outputs)

    def elsewhere(self) -> Call:
        """The same call with copies of its tensors."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)

        return replace(self, inputs=tree_map_only(Tensor, copy, list(self.inputs)))

    @property
    def nbytes(self) -> int:
        """Bytes of the input tensors."""
        return sum(each.nbytes for each in tree_leaves(list(self.inputs)) if isinstance(each, Tensor))

    def _backward(self, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, self._leaves, self.gradients)

    @cached_property
    def _leaves(self) -> list[Tensor]:
        """The inputs that require a gradient. They are found once, because a search would count as the call's time."""
        return [each for each in tree_leaves(list(self.inputs)) if isinstance(each, Tensor) and each.requires_grad]


def tensors(result: object) -> list[Tensor]:
    """The tensors of a function's result."""
    several: Iterable[object] = result if isinstance(result, (tuple, list)) else (result,)
    return [each for each in several if isinstance(each, Tensor)]


def compiled(function: Function) -> Function:
    """Return `function` with torch.compile, which compiles it separately for each size of its arguments."""
    torch._dynamo.config.recompile_limit = _RECOMPILATIONS
    return torch.compile(function, dynamic=False, backend=_compiler)


@contextmanager
def compiler(name: str) -> Iterator[None]:
    """Let `compiled` use another one of torch.compile's backends within a ``with`` block."""
    global _compiler
    before, _compiler = _compiler, name
    try:
        yield
    finally:
        _compiler = before


def distance(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference divided by the norm of `exact`; NaN if a tensor has a NaN."""
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def same(
    dtype: torch.dtype, select: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Callable[[dict[str, object]], None]:
    """Return a check that the peers' results, lists of tensors, equal ours except for the rounding of `dtype`.

    Args:
        dtype: the dtype that the results were computed in.
        select: selects the comparable part of each tensor.
    """

    def agree(results: dict[str, object]) -> None:
        for name, theirs in results.items():
            for place, pair in enumerate(zip(results[OURS], theirs, strict=True)):  # type: ignore[call-overload]
                mine, other = (torch.nan_to_num(select(each).double()) for each in pair)
                error = distance(other, mine)
                assert error <= TOLERANCES[dtype], f"{name}, tensor {place}: differs from {OURS}'s by {error:.2g}"

    return agree
