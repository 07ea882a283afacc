"""Which plan is faster for each part of a feed-forward block, class of shapes by class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch
from fastformer_kernels.configurations import class_key
from fastformer_kernels.dropout import Dropout
from fastformer_kernels.feed_forward import hidden_backward, hidden_forward, output_forward
from fastformer_kernels.plans import (
    DEPTH_CLASSES,
    SAVED_PASSES,
    TOKEN_CLASSES,
    Operation,
    Plan,
    forced_plan,
    product_precision,
    shape_class,
)

Timer = Callable[[Callable[[], object]], float]
"""Seconds that a call takes."""

Item = TypeVar("Item")

# Columns of the result for each unit of depth: the hidden layer is by convention four times as wide as the block.
_WIDENING = 4
_ACTIVATION = "gelu"


@dataclass(frozen=True)
class Problem:
    """An operation at a size that stands for a class of shapes.

    Attributes:
        operation: which part of the feed-forward block.
        dtype: of all tensors.
        tokens: rows of the result.
        depth: what the product sums over.
    """

    operation: Operation
    dtype: torch.dtype
    tokens: int
    depth: int

    @property
    def key(self) -> str:
        """The key of the class it stands for."""
        return class_key(self.operation, shape_class(product_precision(self.dtype), self.tokens, self.depth))

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return self.depth // _WIDENING if self.operation == "output_forward" else self.depth * _WIDENING


def problems(dtypes: Iterable[torch.dtype]) -> list[Problem]:
    """One problem for every class of shapes."""
    # A class is represented by its upper end, the open class at the end by twice the last end.
    tokens = (*TOKEN_CLASSES, 4 * TOKEN_CLASSES[-1])
    depths = (*DEPTH_CLASSES, 2 * DEPTH_CLASSES[-1])
    return [Problem(*each) for each in product(SAVED_PASSES, dtypes, tokens, depths)]


def measure(
    problems: Iterable[Problem],
    device: torch.device | str,
    timer: Timer,
    track: Callable[[Iterable[Problem]], Iterable[Problem]] = iter,
) -> Iterator[tuple[Problem, Plan, float]]:
    """For each problem the faster plan, and how many times as long the other takes.

    Args:
        device: where the tensors are made.
        timer: seconds of a call; on a GPU of the work it launches.
        track: wraps the problems as they are worked on, to show progress.
    """
    for problem in track(problems):
        run = _call(problem, device)
        seconds: dict[Plan, float] = {}
        for plan in ("fused", "library"):
            with forced_plan(plan):
                seconds[plan] = timer(run)
        faster, slower = sorted(seconds, key=seconds.__getitem__)
        yield problem, faster, seconds[slower] / seconds[faster]


def _call(problem: Problem, device: torch.device | str) -> Callable[[], object]:
    """The operation on random tensors, with what a training step asks of it."""

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, device=device).to(problem.dtype) / columns**0.5

    tokens, depth, columns = problem.tokens, problem.depth, problem.columns
    gated = problem.operation.startswith("gated")
    input = matrix(tokens, depth)
    if problem.operation in ("hidden_forward", "gated_hidden_forward"):
        up, gate = matrix(columns, depth), matrix(columns, depth) if gated else None
        return lambda: hidden_forward(input, up, None, gate, None, _ACTIVATION, None, True)
    if problem.operation == "output_forward":
        dropout = Dropout(torch.zeros(2, dtype=torch.int64, device=device), 2**32 // 10, 1.0 / 0.9)
        down, residual = matrix(columns, depth), matrix(tokens, columns)
        return lambda: output_forward(input, down, None, residual, dropout)
    down, up = matrix(depth, columns), matrix(tokens, columns)
    return lambda: hidden_backward(input, down, up, up if gated else None, _ACTIVATION, None, True)
