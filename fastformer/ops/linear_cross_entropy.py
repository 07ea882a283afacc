"""Cross-entropy of a linear projection, a chunk of rows at a time: the logits of all rows are never held at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastformer.backends import use_triton
from fastformer.ops.autocast import to_autocast_dtype
from fastformer.ops.checks import check_floating, check_like, check_shape
from fastformer.ops.cross_entropy import (
    Options,
    check_class_weight,
    check_classes,
    check_target,
    checked_options,
    forward_torch,
    in_place_torch,
    log_sum_exp,
    row_weights,
)
from fastformer.ops.operator import operator

CPU_MEMORY_BUDGET = 64 << 20
# On a GPU each chunk is three launches of a matrix product, and rereads the sum of the weight's gradient.
GPU_MEMORY_BUDGET = 256 << 20
# Rows of logits start at multiples of 128 bytes: 128-bit accesses, and a library's fastest products, for any classes.
_ROW_ALIGNMENT = 128
# A chunk of more rows than this has a multiple of it, so that no product ends in a sliver.
_WHOLE_ROWS = 128


@overload
def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
    return_z_loss: Literal[False] = False,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
    return_z_loss: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
    return_z_loss: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``cross_entropy(input @ weight^T + bias, target)`` in memory independent of rows times classes.

    With "mean" and "sum" the gradients are computed with the loss, chunk by chunk, so that each logit is computed once;
    with "none" the backward computes the logits again.

    Args:
        input: (..., features) float32, float16 or bfloat16; its rows are all but the last dimension.
        weight: (classes, features), of input's dtype; `bias`: (classes,), likewise.
        target: (...) int64 classes; rows of `ignore_index` count for nothing.
        reduction: "mean" over the rows that count (NaN when there are none, as in PyTorch), "sum", or "none".
        class_weight: (classes,) floating, how much each class counts, also in the mean: the weighted losses' sum is
            divided by the sum of the targets' weights. Not differentiable.
        label_smoothing: in [0, 1], the share of the loss that all classes take alike (Szegedy et al. 2016).
        z_loss: adds ``z_loss * logsumexp(logits)^2`` to a row's loss, weighted like its target (Chowdhery et al. 2022).
        softcap: positive; the logits are ``softcap * tanh((input @ weight^T + bias) / softcap)`` (Gemma Team 2024).
        memory_budget: bytes that the logits held at once may take, at least one row of them; by default 64 MiB on a
            CPU, 256 MiB on a GPU.
        return_z_loss: return a pair, the loss (which includes the z-loss) and the z-loss alone, for a log: it has no
            gradient.

    Returns:
        The loss in float32: a scalar, or target's shape for "none".

    Raises:
        TypeError, ValueError: naming the argument. IndexError: a target is no class (on a CPU; on a GPU, where looking
            would stall it, its loss is NaN).
    """
    input, weight, bias = to_autocast_dtype(input), to_autocast_dtype(weight), to_autocast_dtype(bias)
    options = checked_options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    _check(input, weight, target, bias, class_weight, memory_budget)
    if memory_budget is None:
        memory_budget = CPU_MEMORY_BUDGET if input.device.type == "cpu" else GPU_MEMORY_BUDGET
    rows, row_target = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    class_weight = None if class_weight is None else class_weight.float().contiguous()
    if reduction == "none":
        losses, z_losses = _row_losses(rows, weight, row_target, bias, class_weight, *options, memory_budget)
        loss, z_part = losses.view(target.shape), z_losses.view(target.shape)
    else:
        row_scale = (row_target != ignore_index).float()
        if reduction == "mean":
            row_scale = row_scale / row_weights(row_target, weight.shape[0], class_weight, ignore_index).sum()
        tensors = (input, weight) if bias is None else (input, weight, bias)
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        loss, z_part, _, _, _ = _scaled_loss(
            rows, weight, row_target, bias, class_weight, row_scale, *options, memory_budget, needs_grad
        )
    return (loss, z_part) if return_z_loss else loss


def _check(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    memory_budget: int | None,
) -> None:
    check_floating("input", input)
    check_like("weight", weight, "input", input)
    if input.dim() == 0 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        shapes = f"{tuple(input.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"input and weight must be (..., features) and (classes, features); got {shapes}")
    if bias is not None:
        check_like("bias", bias, "input", input)
        check_shape("bias", bias, (weight.shape[0],))
    check_target("target", target, tuple(input.shape[:-1]), input)
    if class_weight is not None:
        check_class_weight("class_weight", class_weight, weight.shape[0], input)
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(f"memory_budget must be at least 1 byte; got {memory_budget}")


@operator("fastformer::linear_cross_entropy", mutates_args=())
def _scaled_loss(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    row_scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    memory_budget: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums of the rows' losses and z-losses, times `row_scale`, and the gradients of input, weight and bias."""
    options = (ignore_index, label_smoothing, z_loss, softcap)
    grad_loss = row_scale if needs_grad else None
    losses, z_losses, *gradients = _chunked(
        input, weight, target, bias, class_weight, grad_loss, options, memory_budget
    )
    return (losses * row_scale).sum(), (z_losses * row_scale).sum(), gradients[0], gradients[1], gradients[2]


@_scaled_loss.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    row_scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    memory_budget: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return row_scale.new_empty(()), row_scale.new_empty(()), *_empty_gradients(input, weight, bias, needs_grad)


def _scaled_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.has_bias = inputs[3] is not None
    ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _scaled_backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 12
    grad_input, grad_weight, grad_bias = (gradient * grad_loss.to(gradient.dtype) for gradient in ctx.saved_tensors)
    return grad_input, grad_weight, None, grad_bias if ctx.has_bias else None, *(None,) * 8


_scaled_loss.register_autograd(_scaled_backward, setup_context=_scaled_setup)


@operator("fastformer::linear_cross_entropy_rows", mutates_args=())
def _row_losses(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    memory_budget: int,
) -> tuple[Tensor, Tensor]:
    """Losses and z-losses of the rows."""
    options = (ignore_index, label_smoothing, z_loss, softcap)
    losses, z_losses, *_ = _chunked(input, weight, target, bias, class_weight, None, options, memory_budget)
    return losses, z_losses


@_row_losses.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    memory_budget: int,
) -> tuple[Tensor, Tensor]:
    losses = input.new_empty(input.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(losses)


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.ignore_index, ctx.label_smoothing, ctx.z_loss, ctx.softcap, ctx.memory_budget = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _rows_backward(ctx: Any, grad_losses: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_losses is None:
        return (None,) * 10
    options = (ctx.ignore_index, ctx.label_smoothing, ctx.z_loss, ctx.softcap)
    _, _, grad_input, grad_weight, grad_bias = _scaled_loss(
        *ctx.saved_tensors, grad_losses, *options, ctx.memory_budget, True
    )
    return grad_input, grad_weight, None, grad_bias if ctx.needs_input_grad[3] else None, *(None,) * 6


_row_losses.register_autograd(_rows_backward, setup_context=_rows_setup)


def _chunked(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    grad_loss: Tensor | None,
    options: Options,
    memory_budget: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses and z-losses of the rows and, with `grad_loss`, the gradients of input, weight and bias for it."""
    rows, classes = input.shape[0], weight.shape[0]
    ignore_index, _, z_loss, _ = options
    check_classes(target, classes, ignore_index)
    needs_grad = grad_loss is not None
    losses = input.new_empty(rows, dtype=torch.float32)
    normalizer = losses.new_empty(2, rows)
    grad_input, grad_weight, grad_bias = _empty_gradients(input, weight, bias, needs_grad)
    # Sums over chunks are kept in float32 whatever the dtype.
    weight_sum, bias_sum = (torch.zeros_like(grad, dtype=torch.float32) for grad in (grad_weight, grad_bias))
    for chunk, logits in _logit_chunks(input, classes, memory_budget):
        x = input[chunk]
        _project(x, weight, bias, out=logits)
        scale = None if grad_loss is None else grad_loss[chunk].contiguous()
        losses[chunk], normalizer[:, chunk] = _losses_in_place(logits, target[chunk], class_weight, scale, options)
        if not needs_grad:
            continue
        grad_input[chunk] = logits @ weight
        if logits.dtype == torch.float32:
            weight_sum.addmm_(logits.T, x)
        else:
            weight_sum += logits.T @ x
        if bias is not None:
            bias_sum += logits.sum(0, dtype=torch.float32)
    z_losses = torch.zeros_like(losses)
    if z_loss:
        row_weight = row_weights(target, classes, class_weight, ignore_index)
        z_losses = (z_loss * row_weight * log_sum_exp(normalizer).square()).masked_fill(target == ignore_index, 0.0)
    return losses, z_losses, grad_input, weight_sum.to(weight.dtype), bias_sum.to(weight.dtype)


def _empty_gradients(
    input: Tensor, weight: Tensor, bias: Tensor | None, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        input.new_empty(input.shape if needs_grad else 0),
        weight.new_empty(weight.shape if needs_grad else 0),
        weight.new_empty(weight.shape[0] if needs_grad and bias is not None else 0),
    )


def _logit_chunks(input: Tensor, classes: int, memory_budget: int) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of input's rows, each with the place for its logits (rows, classes): the same for all."""
    rows = input.shape[0]
    aligned = _ROW_ALIGNMENT // input.itemsize
    row_stride = -(-classes // aligned) * aligned
    step = min(rows, max(1, memory_budget // max(1, row_stride * input.itemsize)))
    if _WHOLE_ROWS < step < rows:
        step -= step % _WHOLE_ROWS
    place = input.new_empty(step, row_stride)[:, :classes]
    for start in range(0, rows, max(1, step)):
        chunk = slice(start, min(start + step, rows))
        yield chunk, place[: chunk.stop - start]


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def _losses_in_place(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, grad_loss: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Losses and normalizer of a chunk; with `grad_loss` the logits become their gradients for it."""
    if use_triton(logits) and logits.numel():
        from fastformer_kernels.cross_entropy import (
            CrossEntropyOptions,
            cross_entropy_forward,
            cross_entropy_in_place,
        )

        target = target.contiguous()
        if grad_loss is None:
            return cross_entropy_forward(logits, target, class_weight, CrossEntropyOptions(*options))
        return cross_entropy_in_place(logits, target, class_weight, grad_loss, CrossEntropyOptions(*options))
    if grad_loss is None:
        return forward_torch(logits, target, class_weight, options)
    return in_place_torch(logits, target, class_weight, grad_loss, options)
