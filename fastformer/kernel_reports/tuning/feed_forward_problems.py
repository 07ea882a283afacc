"""Calls of the parts of a feed-forward block whose plans and launch configurations are tuned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
from fastformer_kernels.dropout import Dropout
from fastformer_kernels.feed_forward import hidden_backward, hidden_forward, output_forward
from fastformer_kernels.plans import SAVED_PASSES, Operation, forced_plan
from torch import Tensor

from fastformer.kernel_reports.tuning.problem import Call, Make, Problem, Results, Sizes, Tensors

# The width of the hidden layer divided by the width of the block: four by convention.
_WIDENING = 4
_ACTIVATION = "gelu"
_KERNELS: dict[Operation, str] = {
    "hidden_forward": "fused_forward",
    "gated_hidden_forward": "fused_gated_forward",
    "output_forward": "fused_output",
    "hidden_backward": "fused_backward",
    "gated_hidden_backward": "fused_gated_backward",
}


def feed_forward_problems(dtype: torch.dtype, sizes: Sizes) -> Iterator[Problem]:
    """Yield two problems for each part of the block: the fused kernel's configuration, then the fused kernel or not."""
    for (tokens, depth), operation in product(sizes.products, SAVED_PASSES):
        problem = _problem(operation, dtype, tokens, depth)
        yield _of_fused_kernel(problem, _KERNELS[operation])
        yield problem


def _problem(operation: Operation, dtype: torch.dtype, tokens: int, depth: int) -> Problem:
    """A part of the block on random tensors, called as a training step calls it."""
    gated = operation.startswith("gated")

    def matrix(rows: int, columns: int, device: torch.device) -> Tensor:
        return torch.randn(rows, columns, device=device).to(dtype) / columns**0.5

    def of_hidden_forward(device: torch.device) -> Tensors:
        weights = [matrix(_WIDENING * depth, depth, device) for _ in range(2 if gated else 1)]
        return [matrix(tokens, depth, device), *weights]

    def hidden_forward_(input: Tensor, up: Tensor, gate: Tensor | None = None) -> Results:
        return hidden_forward(input, up, None, gate, None, _ACTIVATION, None, True)

    def of_output_forward(device: torch.device) -> Tensors:
        columns = depth // _WIDENING
        seed = torch.zeros(2, dtype=torch.int64, device=device)
        return [matrix(tokens, depth, device), matrix(columns, depth, device), matrix(tokens, columns, device), seed]

    def output_forward_(hidden: Tensor, down: Tensor, residual: Tensor, seed: Tensor) -> Results:
        return (output_forward(hidden, down, None, residual, Dropout(seed, 2**32 // 10, 1.0 / 0.9)),)

    def of_hidden_backward(device: torch.device) -> Tensors:
        columns = _WIDENING * depth
        layers = [matrix(tokens, columns, device) for _ in range(2 if gated else 1)]
        return [matrix(tokens, depth, device), matrix(depth, columns, device), *layers]

    def hidden_backward_(grad_output: Tensor, down: Tensor, up: Tensor, gate: Tensor | None = None) -> Results:
        return hidden_backward(grad_output, down, up, gate, _ACTIVATION, None, True)

    calls: dict[str, tuple[Make, Call]] = {
        "hidden_forward": (of_hidden_forward, hidden_forward_),
        "output_forward": (of_output_forward, output_forward_),
        "hidden_backward": (of_hidden_backward, hidden_backward_),
    }
    tensors, call = calls[operation.removeprefix("gated_")]
    return Problem("feed_forward", operation, f"{operation} {tokens} tokens, depth {depth}", dtype, tensors, call)


def _of_fused_kernel(problem: Problem, kernel: str) -> Problem:
    """The same call with the fused kernel, whose launch configuration is tuned."""

    def call(*tensors: Tensor) -> Results:
        with forced_plan("fused"):
            return problem.call(*tensors)

    return replace(problem, operation=kernel, case=f"{problem.case}, fused", call=call)
