"""Calls of norms, softmax and cross-entropy whose launch configurations are tuned."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from fastformer_kernels.cross_entropy import (
    CrossEntropyOptions,
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_in_place,
)
from fastformer_kernels.normalization import norm_backward, norm_forward
from fastformer_kernels.softmax import softmax_backward, softmax_forward
from torch import Tensor

from fastformer.kernel_reports.tuning.problem import Call, Problem, Results, Sizes, Tensors


def norm_problems(dtype: torch.dtype, sizes: Sizes, operation: str) -> Iterator[Problem]:
    """Yield LayerNorm and RMSNorm, either forward with a residual, or backward."""
    make = _norm_forward_problem if operation == "norm_forward" else _norm_backward_problem
    for columns, centered in product(sizes.columns, (True, False)):
        yield make(dtype, sizes.elements // columns, columns, centered)


def _norm_forward_problem(dtype: torch.dtype, rows: int, columns: int, centered: bool) -> Problem:
    def tensors(device: torch.device) -> Tensors:
        matrices = [torch.randn(rows, columns, device=device).to(dtype) for _ in range(2)]
        return [*matrices, *(torch.randn(columns, device=device) for _ in range(2))]

    def call(input: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Results:
        return norm_forward(
            input,
            None,
            residual,
            None,
            weight,
            bias if centered else None,
            1e-5,
            centered=centered,
            dtype=input.dtype,
            keep_sum=True,
        )

    return Problem("norm", "norm_forward", _case("norm_forward", rows, columns, centered), dtype, tensors, call)


def _norm_backward_problem(dtype: torch.dtype, rows: int, columns: int, centered: bool) -> Problem:
    def tensors(device: torch.device) -> Tensors:
        grad_output, grad_sum, x = (torch.randn(rows, columns, device=device).to(dtype) for _ in range(3))
        mean = x.float().mean(1)
        rstd = ((x.float() - mean[:, None] if centered else x.float()).square().mean(1) + 1e-5).rsqrt()
        statistics = torch.stack([rstd, mean] if centered else [rstd])
        return [grad_output, grad_sum, x, statistics, torch.randn(columns, device=device)]

    def call(grad_output: Tensor, grad_sum: Tensor, x: Tensor, statistics: Tensor, weight: Tensor) -> Results:
        return norm_backward(
            grad_output,
            grad_sum,
            x,
            statistics,
            weight,
            None,
            centered=centered,
            input_dtype=x.dtype,
            residual_dtype=None,
            weight_needs_grad=True,
            bias_needs_grad=centered,
            input_bias_needs_grad=False,
        )

    return Problem("norm", "norm_backward", _case("norm_backward", rows, columns, centered), dtype, tensors, call)


def _case(operation: str, rows: int, columns: int, centered: bool) -> str:
    return f"{operation} {'layer' if centered else 'rms'} {rows} x {columns}"


def softmax_problems(dtype: torch.dtype, sizes: Sizes) -> Iterator[Problem]:
    """Yield softmax along rows, forward and backward: of a few scores of every word, and of many rows."""
    for columns, forward in product(sizes.classes, (True, False)):
        yield _softmax_problem(dtype, 8, columns, forward)
    for columns, forward in product(sizes.columns, (True, False)):
        yield _softmax_problem(dtype, sizes.elements // columns, columns, forward)


def _softmax_problem(dtype: torch.dtype, rows: int, columns: int, is_forward: bool) -> Problem:
    def tensors(device: torch.device) -> Tensors:
        input = torch.randn(rows, columns, device=device).to(dtype)
        return [input] if is_forward else [input, torch.randn(rows, columns, device=device).softmax(-1).to(dtype)]

    def forward(input: Tensor) -> Results:
        output = torch.empty_like(input)
        softmax_forward(input, output, -1)
        return (output,)

    def backward(grad_output: Tensor, output: Tensor) -> Results:
        grad_input = torch.empty_like(output)
        softmax_backward(grad_output, output, grad_input, -1)
        return (grad_input,)

    operation = "softmax_forward" if is_forward else "softmax_backward"
    call = forward if is_forward else backward
    return Problem("softmax", operation, f"{operation} {rows} x {columns}", dtype, tensors, call)


def cross_entropy_problems(dtype: torch.dtype, sizes: Sizes) -> Iterator[Problem]:
    """Yield cross-entropy forward, backward, and both at once, which writes the gradient over the logits."""
    for classes, way in product(sizes.classes, ("at once", "forward", "backward")):
        yield _cross_entropy_problem(dtype, max(1, 8 * sizes.elements // classes), classes, way)


def _cross_entropy_problem(dtype: torch.dtype, rows: int, classes: int, way: str) -> Problem:
    options = CrossEntropyOptions()

    def tensors(device: torch.device) -> Tensors:
        logits = torch.randn(rows, classes, device=device).to(dtype)
        targets = torch.randint(classes, (rows,), device=device)
        if way == "forward":
            return [logits, targets]
        grad_loss = torch.full((rows,), 1.0 / rows, device=device)
        if way == "at once":
            return [logits, targets, grad_loss]
        maximum = logits.amax(1).float()
        return [logits, targets, grad_loss, torch.stack([maximum, (logits - maximum[:, None]).exp().sum(1)])]

    def forward(logits: Tensor, targets: Tensor) -> Results:
        return cross_entropy_forward(logits, targets, None, options)

    def at_once(logits: Tensor, targets: Tensor, grad_loss: Tensor) -> Results:
        return logits, *cross_entropy_in_place(logits, targets, None, grad_loss, options)

    def backward(logits: Tensor, targets: Tensor, grad_loss: Tensor, normalizer: Tensor) -> Results:
        gradient = torch.empty_like(logits)
        cross_entropy_backward(logits, gradient, targets, None, grad_loss, normalizer, options)
        return (gradient,)

    calls: dict[str, Call] = {"forward": forward, "backward": backward, "at once": at_once}
    operation = "cross_entropy_forward" if way == "forward" else "cross_entropy_backward"
    return Problem("cross_entropy", operation, f"cross_entropy {way} {rows} x {classes}", dtype, tensors, calls[way])
