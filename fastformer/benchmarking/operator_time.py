"""Measure the part of a program's CPU time that Fastformer's operators take, their backward included."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_OPERATORS = "fastformer.ops"
Node = Any  # torch.autograd.graph.Node


class OperatorTime:
    """Measures, within a ``with`` block, the time of Fastformer's operators. Use it on one thread.

    It measures all calls of functions of `fastformer.ops` from other parts of Fastformer, and all steps of the backward
    that belong to these calls.

    Attributes:
        microseconds: CPU time since the block began, or since the last `clear`.
    """

    def __init__(self) -> None:
        self.microseconds = 0.0
        self._inside = False
        self._began = 0.0
        self._replaced: list[tuple[ModuleType, str, FunctionType]] = []

    def clear(self) -> None:
        """Set the count to zero."""
        self.microseconds = 0.0

    def __enter__(self) -> OperatorTime:
        self._replaced = list(_uses())
        for module, name, function in self._replaced:
            setattr(module, name, self._measured(function))
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, function in self._replaced:
            setattr(module, name, function)

    def _measured(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside = True
            first = torch.autograd._get_sequence_nr()
            self._begin()
            try:
                result = function(*args, **kwargs)
            finally:
                self._end()
                self._inside = False
            for node in _nodes(result, first):
                node.register_prehook(self._begin)
                node.register_hook(self._end)
            return result

        return measured

    def _begin(self, *_: object) -> None:
        self._began = time.process_time()

    def _end(self, *_: object) -> None:
        self.microseconds += (time.process_time() - self._began) * 1e6


def _uses() -> Iterator[tuple[ModuleType, str, FunctionType]]:
    """Yield each name by which another module of Fastformer has imported a function of the operators."""
    for place, module in list(sys.modules.items()):
        if place.startswith("fastformer.") and not place.startswith((_OPERATORS, "fastformer.benchmarking")):
            for name, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and value.__module__.startswith(_OPERATORS):
                    yield module, name, value


def _nodes(result: object, first: int) -> set[Node]:
    """The nodes of the backward graph of `result` with numbers from `first` on: those of the call that returned it."""
    found: set[Node] = set()
    waiting = [leaf.grad_fn for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    while waiting:
        node = waiting.pop()
        # The node that adds to a leaf's gradient has the highest number of all and belongs to no call.
        if node is None or node in found or node.name().endswith("AccumulateGrad") or node._sequence_nr() < first:
            continue
        found.add(node)
        waiting += [next_node for next_node, _ in node.next_functions]
    return found
