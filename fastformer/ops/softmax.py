"""Softmax along one dimension."""

from __future__ import annotations

from typing import Any

import torch

from fastformer.backends import use_triton
from fastformer.ops.autocast import to_autocast_float32
from fastformer.ops.checks import check_floating


def softmax(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Softmax: ``y_i = exp(x_i) / sum_j exp(x_j)`` along `dim`.

    Args:
        input: float32, float16 or bfloat16, any shape with at least one dimension, any strides.
        dim: the dimension to normalise; negative counts from the end.

    Returns:
        A tensor of the same shape and dtype, accumulated in float32. A row of ``-inf`` gives zeros (PyTorch: NaN).

    Raises:
        TypeError: `input` is of another dtype.
        IndexError: `dim` is out of range.

    >>> fastformer.softmax(torch.tensor([0.0, 0.0, float("-inf")]))
    tensor([0.5000, 0.5000, 0.0000])
    """
    check_floating("input", input)
    if not -input.dim() <= dim < input.dim():
        raise IndexError(f"dim must be in [{-input.dim()}, {input.dim() - 1}] for a {input.dim()}-D input; got {dim}")
    return _softmax(to_autocast_float32(input), dim)


@torch.library.custom_op("fastformer::softmax", mutates_args=())
def _softmax(input: torch.Tensor, dim: int) -> torch.Tensor:
    if input.numel() == 0:
        return torch.empty_like(input)
    if use_triton(input):
        from fastformer_kernels.softmax import softmax_forward

        return softmax_forward(input, dim)
    return _softmax_torch(input, dim)


@torch.library.custom_op("fastformer::softmax_backward", mutates_args=())
def _softmax_backward(grad_output: torch.Tensor, output: torch.Tensor, dim: int) -> torch.Tensor:
    if output.numel() == 0:
        return torch.empty_like(output)
    if use_triton(output):
        from fastformer_kernels.softmax import softmax_backward

        return softmax_backward(grad_output, output, dim)
    return torch._softmax_backward_data(grad_output, output, dim, output.dtype)


@_softmax.register_fake
def _(input: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.empty_like(input)


@_softmax_backward.register_fake
def _(grad_output: torch.Tensor, output: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.empty_like(output)


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, int], output: torch.Tensor) -> None:
    ctx.dim = inputs[1]
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
    (output,) = ctx.saved_tensors
    return _softmax_backward(grad_output, output, ctx.dim), None


_softmax.register_autograd(_backward, setup_context=_setup_context)


def _softmax_torch(input: torch.Tensor, dim: int) -> torch.Tensor:
    output = torch.softmax(input, dim)
    empty_row = input.amax(dim, keepdim=True) == float("-inf")
    return output.masked_fill_(empty_row, 0.0)
