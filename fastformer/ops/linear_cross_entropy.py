"""Cross-entropy of a linear projection, a chunk of rows at a time: the logits of all rows are never held at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastformer.backends import use_triton
from fastformer.ops.autocast import to_autocast_dtype
from fastformer.ops.checks import check_device, check_floating, check_like, check_shape

REDUCTIONS = ("mean", "sum", "none")
# Logits held at once: 64 MiB of float32.
LOGIT_ELEMENTS = 1 << 24


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """``cross_entropy(input @ weight^T + bias, target)`` in memory independent of rows times classes.

    With "mean" and "sum" the gradients are computed with the loss, chunk by chunk, so that each logit is computed once;
    with "none" the backward computes the logits again.

    Args:
        input: (rows, features) float32, float16 or bfloat16.
        weight: (classes, features), of input's dtype; `bias`: (classes,), likewise.
        target: (rows,) int64 classes; rows of `ignore_index` count for nothing.
        reduction: "mean" over the rows that count (NaN when there are none, as in PyTorch), "sum", or "none".

    Returns:
        The loss in float32: a scalar, or (rows,) for "none".

    Raises:
        TypeError, ValueError: naming the argument. IndexError: a target is no class (on a CPU; on a GPU, where looking
            would stall it, its loss is NaN).
    """
    input, weight, bias = to_autocast_dtype(input), to_autocast_dtype(weight), to_autocast_dtype(bias)
    _check(input, weight, target, bias, reduction)
    if reduction == "none":
        return _row_losses(input, weight, target, bias, ignore_index)
    row_weight = (target != ignore_index).float()
    if reduction == "mean":
        row_weight = row_weight / row_weight.sum()
    tensors = (input, weight) if bias is None else (input, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _weighted_loss(input, weight, target, bias, row_weight, ignore_index, needs_grad)[0]


def _check(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, reduction: str) -> None:
    check_floating("input", input)
    check_like("weight", weight, "input", input)
    if input.dim() != 2 or weight.dim() != 2 or input.shape[1] != weight.shape[1]:
        shapes = f"{tuple(input.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"input and weight must be (rows, features) and (classes, features); got {shapes}")
    if bias is not None:
        check_like("bias", bias, "input", input)
        check_shape("bias", bias, (weight.shape[0],))
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64; got {target.dtype}")
    check_shape("target", target, (input.shape[0],))
    check_device("target", target, "input", input)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")


@torch.library.custom_op("fastformer::linear_cross_entropy", mutates_args=())
def _weighted_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_weight: Tensor,
    ignore_index: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses, *gradients = _chunked(input, weight, target, bias, row_weight if needs_grad else None, ignore_index)
    loss = (losses * row_weight).sum()
    return loss, gradients[0], gradients[1], gradients[2]


@_weighted_loss.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_weight: Tensor,
    ignore_index: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return row_weight.new_empty(()), *_empty_gradients(input, weight, bias, needs_grad)


def _weighted_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.has_bias = inputs[3] is not None
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _weighted_backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 7
    grad_input, grad_weight, grad_bias = (gradient * grad_loss.to(gradient.dtype) for gradient in ctx.saved_tensors)
    return grad_input, grad_weight, None, grad_bias if ctx.has_bias else None, None, None, None


_weighted_loss.register_autograd(_weighted_backward, setup_context=_weighted_setup)


@torch.library.custom_op("fastformer::linear_cross_entropy_rows", mutates_args=())
def _row_losses(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int) -> Tensor:
    return _chunked(input, weight, target, bias, None, ignore_index)[0]


@_row_losses.register_fake
def _(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int) -> Tensor:
    return input.new_empty(input.shape[0], dtype=torch.float32)


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.ignore_index = inputs
    ctx.save_for_backward(*tensors)


def _rows_backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, target, bias = ctx.saved_tensors
    _, grad_input, grad_weight, grad_bias = _weighted_loss(
        input, weight, target, bias, grad_losses, ctx.ignore_index, True
    )
    return grad_input, grad_weight, None, None if bias is None else grad_bias, None


_row_losses.register_autograd(_rows_backward, setup_context=_rows_setup)


def _chunked(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, row_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of the rows and, with `row_weight`, the gradients of input, weight and bias of their weighted sum."""
    _check_target(target, weight.shape[0], ignore_index)
    needs_grad = row_weight is not None
    losses = input.new_empty(input.shape[0], dtype=torch.float32)
    grad_input, grad_weight, grad_bias = _empty_gradients(input, weight, bias, needs_grad)
    # Sums over chunks are kept in float32 whatever the dtype.
    weight_sum, bias_sum = (torch.zeros_like(grad, dtype=torch.float32) for grad in (grad_weight, grad_bias))
    for rows in _chunks(input.shape[0], weight.shape[0]):
        x = input[rows]
        logits = torch.nn.functional.linear(x, weight, bias)
        scale = None if row_weight is None else row_weight[rows].contiguous()
        losses[rows] = _losses_in_place(logits, target[rows].contiguous(), scale, ignore_index)
        if not needs_grad:
            continue
        grad_input[rows] = logits @ weight
        if logits.dtype == torch.float32:
            weight_sum.addmm_(logits.T, x)
        else:
            weight_sum += logits.T @ x
        if bias is not None:
            bias_sum += logits.sum(0, dtype=torch.float32)
    return losses, grad_input, weight_sum.to(weight.dtype), bias_sum.to(weight.dtype)


def _empty_gradients(
    input: Tensor, weight: Tensor, bias: Tensor | None, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        input.new_empty(input.shape if needs_grad else 0),
        weight.new_empty(weight.shape if needs_grad else 0),
        weight.new_empty(weight.shape[0] if needs_grad and bias is not None else 0),
    )


def _chunks(rows: int, classes: int) -> Iterator[slice]:
    step = max(1, LOGIT_ELEMENTS // max(1, classes))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _check_target(target: Tensor, classes: int, ignore_index: int) -> None:
    if target.device.type != "cpu":
        return
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if wrong.numel():
        raise IndexError(f"target must be a class from 0 to {classes - 1} or {ignore_index}; got {wrong[0].item()}")


def _losses_in_place(logits: Tensor, target: Tensor, row_weight: Tensor | None, ignore_index: int) -> Tensor:
    """Losses of a chunk; with `row_weight` the logits become their gradients, times those weights."""
    if use_triton(logits):
        from fastformer_kernels.cross_entropy import cross_entropy_in_place

        return cross_entropy_in_place(logits, target, row_weight, ignore_index)
    ignored = target == ignore_index
    # A target that is no class reaches this line on a GPU without triton only, where it makes its loss NaN.
    unknown = ~ignored & ((target < 0) | (target >= logits.shape[1]))
    column = target.masked_fill(ignored | unknown, 0)[:, None]
    wide = logits.float()
    lse = wide.logsumexp(1, keepdim=True)
    losses = (lse - wide.gather(1, column)).squeeze(1).masked_fill(unknown, float("nan")).masked_fill(ignored, 0.0)
    if row_weight is not None:
        gradient = wide.sub_(lse).exp_()
        gradient.scatter_add_(1, column, gradient.new_full((), -1.0).expand_as(column))
        gradient.mul_(row_weight.masked_fill(unknown, float("nan")).masked_fill(ignored, 0.0)[:, None])
        if gradient is not logits:
            logits.copy_(gradient)
    return losses
