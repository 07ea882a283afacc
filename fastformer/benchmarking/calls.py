"""Calls of functions that studies time, forward or forward and backward, and whether those who make them agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.timing import Run

Function = Callable[..., Any]
"""Of tensors, or of whatever it is called with, to a tensor or a sequence of tensors and None."""

# Norm of the difference of two results beside the norm of one: what float32's order of sums and the rounding of
# 16-bit intermediates come to.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Sizes that one function is compiled for in a run of all studies; beyond its limit torch.compile gives up silently.
_RECOMPILATIONS = 1000


def forward(function: Function, inputs: Sequence[object]) -> Run:
    """A run of `function` without gradients; its result is the outputs."""

    def run() -> list[Tensor]:
        with torch.no_grad():
            return tensors(function(*inputs))

    return run


def forward_backward(function: Function, inputs: Sequence[object], gradients: Sequence[Tensor]) -> Run:
    """A run of `function` and its backward; its result is the outputs and the gradients of what requires them.

    Args:
        gradients: of the outputs that are floating.
    """
    leaves = [each for each in inputs if isinstance(each, Tensor) and each.requires_grad]

    def run() -> list[Tensor]:
        outputs = [each for each in tensors(function(*inputs)) if each.is_floating_point()]
        found = torch.autograd.grad(outputs, leaves, gradients)
        return [*(each.detach() for each in outputs), *found]

    return run


def tensors(result: object) -> list[Tensor]:
    """Those of a function's result."""
    several: Iterable[object] = result if isinstance(result, (tuple, list)) else (result,)
    return [each for each in several if isinstance(each, Tensor)]


def compiled(function: Function) -> Function:
    """`function` as torch.compile makes it for each of the very sizes that it is called with."""
    torch._dynamo.config.recompile_limit = _RECOMPILATIONS
    return torch.compile(function, dynamic=False)


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
                error = ((mine - other).norm() / mine.norm().clamp_min(1e-30)).item()
                assert error <= _TOLERANCES[dtype], f"{name}, tensor {place}: {error:.2g} beside {OURS}'s"

    return agree
