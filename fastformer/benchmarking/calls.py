"""Calls of functions that studies time, forward or forward and backward, and whether those who make them agree."""

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
"""Of tensors, or of whatever it is called with, to a tensor or a sequence of tensors and None."""

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The most that `distance` may be of two right results: what float32's order of sums and the rounding of 16-bit
intermediates come to."""

# Sizes that one function is compiled for in a run of all studies; beyond its limit torch.compile gives up silently.
_RECOMPILATIONS = 1000
_compiler = "inductor"


@dataclass(frozen=True)
class Call:
    """A call of a function, and of its backward where its outputs' gradients are given. It is a run: see `__call__`.

    Attributes:
        function: what is called.
        inputs: with what; those that require a gradient get one.
        gradients: of the floating outputs; None: there is no backward.
    """

    function: Function
    inputs: Sequence[Any]
    gradients: Sequence[Tensor] | None = None

    def __call__(self) -> list[Tensor]:
        """Outputs, and with a backward the gradients."""
        if self.gradients is None:
            return self.forward()
        outputs = self.forward()
        return [*(each.detach() for each in outputs), *self._backward(outputs)]

    def forward(self) -> list[Tensor]:
        """Outputs; with a backward the floating ones, and what it needs is kept."""
        with torch.set_grad_enabled(self.gradients is not None):
            outputs = tensors(self.function(*self.inputs))
        return outputs if self.gradients is None else [each for each in outputs if each.is_floating_point()]

    def backward(self) -> Run:
        """Does the forward, and returns the run of the backward alone, which can be done once."""
        outputs = self.forward()
        return lambda: self._backward(outputs)

    def elsewhere(self) -> Call:
        """The same call of copies of its tensors."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)

        return replace(self, inputs=tree_map_only(Tensor, copy, list(self.inputs)))

    @property
    def nbytes(self) -> int:
        """Of the inputs' tensors."""
        return sum(each.nbytes for each in tree_leaves(list(self.inputs)) if isinstance(each, Tensor))

    def _backward(self, outputs: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, self._leaves, self.gradients)

    @cached_property
    def _leaves(self) -> list[Tensor]:
        """Found once: to look for them takes time that is not the function's."""
        return [each for each in tree_leaves(list(self.inputs)) if isinstance(each, Tensor) and each.requires_grad]


def tensors(result: object) -> list[Tensor]:
    """Those of a function's result."""
    several: Iterable[object] = result if isinstance(result, (tuple, list)) else (result,)
    return [each for each in several if isinstance(each, Tensor)]


def compiled(function: Function) -> Function:
    """`function` as torch.compile makes it for each of the very sizes that it is called with."""
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
    """Norm of their difference beside the norm of `exact`; NaN where one of them has a NaN."""
    exact = exact.double()
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def same(
    dtype: torch.dtype, select: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Callable[[dict[str, object]], None]:
    """A check that all results, lists of tensors, are ours but for the rounding of `dtype`.

    Args:
        select: picks of each tensor what is comparable.
    """

    def agree(results: dict[str, object]) -> None:
        for name, theirs in results.items():
            for place, pair in enumerate(zip(results[OURS], theirs, strict=True)):  # type: ignore[call-overload]
                mine, other = (torch.nan_to_num(select(each).double()) for each in pair)
                error = distance(other, mine)
                assert error <= TOLERANCES[dtype], f"{name}, tensor {place}: {error:.2g} beside {OURS}'s"

    return agree
