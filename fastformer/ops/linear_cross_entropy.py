"""Cross-entropy of a linear projection, in chunks of rows, so that the logits of all rows are never held at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
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
    cross_entropy,
    few_on_cpu,
    forward_torch,
    in_place_torch,
    log_sum_exp,
    losses_formula,
    options_of,
    row_weights,
    total_weight,
    without_ignored,
)
from fastformer.ops.operator import operator, vjp

CPU_MEMORY_BUDGET = 64 << 20
# Each chunk on a GPU costs three launches of a matrix product, and one more read of the summed weight gradient.
GPU_MEMORY_BUDGET = 256 << 20
# Rows of logits start at multiples of 128 bytes: any number of classes gets 128-bit accesses and the fastest products.
_ROW_ALIGNMENT = 128
# A chunk with more rows than this has a multiple of it, so that no product ends with a very small tile.
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
    """Compute ``cross_entropy(input @ weight^T + bias, target)`` in memory independent of rows times classes.

    With "mean" and "sum" the gradients are computed with the loss, chunk by chunk, so that each logit is computed once;
    with "none" the backward computes the logits again.

    Args:
        input: (..., features) float32, float16 or bfloat16; its rows are all dimensions but the last.
        weight: (classes, features), in input's dtype; `bias`: (classes,), likewise.
        target: (...) int64 classes; rows with `ignore_index` have no effect.
        reduction: "mean" over the rows that count (NaN when there are none, as in PyTorch), "sum", or "none".
        class_weight: (classes,) floating, the weight of each class, also in the mean: the weighted losses' sum is
            divided by the sum of the targets' weights. Not differentiable.
        label_smoothing: in [0, 1], the share of the loss that is spread evenly over all classes (Szegedy et al. 2016).
        z_loss: adds ``z_loss * logsumexp(logits)^2`` to a row's loss, weighted like its target (Chowdhery et al. 2022).
        softcap: positive; the logits are ``softcap * tanh((input @ weight^T + bias) / softcap)`` (Gemma Team 2024).
        memory_budget: the number of bytes that the logits held at once may take, but at least one row; by default
            64 MiB on a CPU, 256 MiB on a GPU.
        return_z_loss: return a pair: the loss (which includes the z-loss) and the z-loss alone, for logging. The z-loss
            alone has no gradient.

    Returns:
        The loss in float32: a scalar, or target's shape for "none".

    Raises:
        TypeError, ValueError: the message names the argument.
        IndexError: a target is not a class, on a CPU. On a GPU, where reading it would stall, its loss is NaN.
    """
    input, weight, bias = to_autocast_dtype(input), to_autocast_dtype(weight), to_autocast_dtype(bias)
    options = checked_options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    _check(input, weight, target, bias, class_weight, memory_budget)
    rows = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    row_target = target if target.dim() == 1 else target.reshape(-1)
    if memory_budget is None:
        if not return_z_loss and few_on_cpu(input, rows.shape[0] * weight.shape[0]):
            loss = cross_entropy(
                F.linear(without_ignored(rows, row_target, ignore_index), weight, bias),
                row_target,
                class_weight,
                ignore_index=ignore_index,
                reduction=reduction,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                softcap=softcap,
            )
            return loss.view(target.shape) if reduction == "none" else loss
        memory_budget = CPU_MEMORY_BUDGET if input.is_cpu else GPU_MEMORY_BUDGET
    class_weight = None if class_weight is None else class_weight.float().contiguous()
    if reduction == "none":
        losses, z_losses = _row_losses(rows, weight, row_target, bias, class_weight, *options, memory_budget)
        loss, z_part = losses.view(target.shape), z_losses.view(target.shape)
    else:
        # A tensor hidden by a transform of `torch.func` may need a gradient.
        needs_grad = torch._C._are_functorch_transforms_active() or (
            torch.is_grad_enabled()
            and (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
        )
        loss, z_part, _, _, _ = _reduced_loss(
            rows, weight, row_target, bias, class_weight, *options, reduction, memory_budget, needs_grad
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
    check_target("target", target, input.shape[:-1], input)
    if class_weight is not None:
        check_class_weight("class_weight", class_weight, weight.shape[0], input)
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(f"memory_budget must be at least 1 byte; got {memory_budget}")


class _ReducedLoss(NamedTuple):
    """The arguments of a call whose losses are summed. `input` is (rows, features), `weight` (classes, features)."""

    input: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    class_weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    reduction: str
    memory_budget: int
    needs_grad: bool


@operator("fastformer::linear_cross_entropy", mutates_args=())
def _reduced_loss(call: _ReducedLoss) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the sums or means of the rows' losses and z-losses, and the gradients of input, weight and bias."""
    options = options_of(call)
    total = grad_losses = None
    if call.reduction == "mean":
        total = total_weight(call.target, call.weight.shape[0], call.class_weight, call.ignore_index)
    if call.needs_grad:
        of_each = total.reciprocal() if total is not None else call.input.new_ones((), dtype=torch.float32)
        grad_losses = of_each.expand(call.target.shape)
    losses, z_losses, *gradients = _chunked(
        call.input, call.weight, call.target, call.bias, call.class_weight, grad_losses, options, call.memory_budget
    )
    loss = losses.sum()
    z_part = loss.new_zeros(()) if z_losses is None else z_losses.sum()
    if total is not None:
        loss.div_(total)
        z_part.div_(total)
    return loss, z_part, gradients[0], gradients[1], gradients[2]


@_reduced_loss.register_fake
def _(call: _ReducedLoss) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = call.input.new_empty((), dtype=torch.float32)
    return loss, torch.empty_like(loss), *_empty_gradients(call.input, call.weight, call.bias, call.needs_grad)


@_reduced_loss.register_formula
def _(call: _ReducedLoss) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = options_of(call)
    losses, z_losses = _formula(call.input, call.weight, call.target, call.bias, call.class_weight, options)
    loss, z_part = losses.sum(), z_losses.sum()
    if call.reduction == "mean":
        total = total_weight(call.target, call.weight.shape[0], call.class_weight, call.ignore_index)
        loss, z_part = loss / total, z_part / total
    return loss, z_part, *_empty_gradients(call.input, call.weight, call.bias, False)


def _formula(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, class_weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Losses and z-losses of the rows; the losses are made of differentiable functions."""
    ignore_index, _, z_loss, _ = options
    input = without_ignored(input, target, ignore_index)
    losses, normalizer = losses_formula(F.linear(input, weight, bias), target, class_weight, options)
    row_weight = row_weights(target, weight.shape[0], class_weight, ignore_index)
    z_losses = z_loss * row_weight * log_sum_exp(normalizer.detach()).square()
    return losses, z_losses.masked_fill(target == ignore_index, 0.0)


def _reduced_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # The inputs are kept for second derivatives, which may be needed later.
    ctx.save_for_backward(*output[2:], *inputs[:5])
    ctx.options = inputs[5:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _reduced_backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    found: list[Tensor | None] = [None] * len(_ReducedLoss._fields)
    if grad_loss is None:
        return tuple(found)
    *gradients, input, weight, target, bias, class_weight = ctx.saved_tensors
    if torch.is_grad_enabled():
        *options, reduction, memory_budget, _ = ctx.options
        if reduction == "mean":
            grad_loss = grad_loss / total_weight(target, weight.shape[0], class_weight, options[0])
        rows = (input, weight, target, bias, class_weight, grad_loss.expand(target.shape))
        gradients = _row_gradients(*rows, *options, memory_budget)
        grad_loss = None
    for place, gradient in zip((0, 1, 3), gradients, strict=True):
        if ctx.needs_input_grad[place]:
            found[place] = gradient if grad_loss is None else gradient * grad_loss
    return tuple(found)


_reduced_loss.register_autograd(_reduced_backward, setup_context=_reduced_setup)


class _RowLosses(NamedTuple):
    """The arguments of a call that returns one loss for each row."""

    input: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    class_weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    memory_budget: int


@operator("fastformer::linear_cross_entropy_rows", mutates_args=())
def _row_losses(call: _RowLosses) -> tuple[Tensor, Tensor]:
    """Losses and z-losses of the rows."""
    options = options_of(call)
    losses, z_losses, *_ = _chunked(
        call.input, call.weight, call.target, call.bias, call.class_weight, None, options, call.memory_budget
    )
    return losses, torch.zeros_like(losses) if z_losses is None else z_losses


@_row_losses.register_fake
def _(call: _RowLosses) -> tuple[Tensor, Tensor]:
    losses = call.input.new_empty(call.input.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(losses)


@_row_losses.register_formula
def _(call: _RowLosses) -> tuple[Tensor, Tensor]:
    return _formula(call.input, call.weight, call.target, call.bias, call.class_weight, options_of(call))


class _RowGradients(NamedTuple):
    """One call's arguments of the derivative of `_row_losses`."""

    input: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None
    class_weight: Tensor | None
    grad_losses: Tensor
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    memory_budget: int


@operator("fastformer::linear_cross_entropy_rows_backward", mutates_args=())
def _row_gradients(call: _RowGradients) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias."""
    options = options_of(call)
    _, _, *gradients = _chunked(
        call.input,
        call.weight,
        call.target,
        call.bias,
        call.class_weight,
        call.grad_losses,
        options,
        call.memory_budget,
    )
    return gradients[0], gradients[1], gradients[2]


@_row_gradients.register_fake
def _(call: _RowGradients) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(call.input, call.weight, call.bias, True)


@_row_gradients.register_formula
def _(call: _RowGradients) -> tuple[Tensor | None, ...]:
    options = options_of(call)

    def losses(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
        return (_formula(input, weight, call.target, bias, call.class_weight, options)[0],)

    return tuple(vjp(losses, [call.input, call.weight, call.bias], [call.grad_losses]))


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.options = inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _rows_backward(ctx: Any, grad_losses: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_losses is None:
        return (None,) * len(_RowLosses._fields)
    grad_input, grad_weight, grad_bias = _row_gradients(*ctx.saved_tensors, grad_losses, *ctx.options)
    return grad_input, grad_weight, None, grad_bias if ctx.needs_input_grad[3] else None, *(None,) * 6


_row_losses.register_autograd(_rows_backward, setup_context=_rows_setup)


def _chunked(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    grad_losses: Tensor | None,
    options: Options,
    memory_budget: int,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Losses and (if enabled) z-losses of the rows; gradients of input, weight and bias for `grad_losses`."""
    ignore_index, _, z_loss, _ = options
    classes = weight.shape[0]
    check_classes(target, classes, ignore_index)
    place = _place_for_logits(input, classes, memory_budget)
    step = place.shape[0]
    grad_input, grad_weight, grad_bias = _empty_gradients(input, weight, bias, grad_losses is not None)
    grad_inputs = _parts(grad_input, step)
    scales = None if grad_losses is None else _parts(grad_losses, step)
    losses, z_losses = [], []
    for number, (x, labels) in enumerate(zip(_parts(input, step), _parts(target, step), strict=True)):
        logits = place if x.shape[0] == step else place[: x.shape[0]]
        _project(x, weight, bias, out=logits)
        scale = None if scales is None else scales[number]
        loss, normalizer = _losses_in_place(logits, labels, class_weight, scale, options)
        losses.append(loss)
        if z_loss:
            row_weight = row_weights(labels, classes, class_weight, ignore_index)
            of_chunk = z_loss * row_weight * log_sum_exp(normalizer).square()
            z_losses.append(of_chunk.masked_fill(labels == ignore_index, 0.0))
        if scale is not None:
            torch.mm(logits, weight, out=grad_inputs[number])
            counting = without_ignored(x, labels, ignore_index)
            grad_weight = _weight_gradient(grad_weight, logits, counting, first=number == 0)
            if bias is not None:
                of_chunk = logits.sum(0, dtype=torch.float32)
                grad_bias = grad_bias.add_(of_chunk) if number else of_chunk
    loss = losses[0] if len(losses) == 1 else torch.cat(losses)
    z_part = torch.cat(z_losses) if z_loss else None
    return loss, z_part, grad_input, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _weight_gradient(so_far: Tensor, logits: Tensor, x: Tensor, first: bool) -> Tensor:
    """Add one more chunk to the weight's gradient: in its own dtype for a single chunk, in float32 for several."""
    if first:
        return torch.mm(logits.T, x, out=so_far)
    if x.dtype == torch.float32:
        return so_far.addmm_(logits.T, x)
    return so_far.float().add_(logits.T @ x)


def _parts(of_rows: Tensor, step: int) -> Sequence[Tensor]:
    """Split into parts of at most `step` rows."""
    return (of_rows,) if of_rows.shape[0] <= step else of_rows.split(step)


def _empty_gradients(
    input: Tensor, weight: Tensor, bias: Tensor | None, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        input.new_empty(input.shape if needs_grad else 0),
        weight.new_empty(weight.shape if needs_grad else 0),
        weight.new_empty(weight.shape[0] if needs_grad and bias is not None else 0),
    )


def _place_for_logits(input: Tensor, classes: int, memory_budget: int) -> Tensor:
    """Allocate the logits of the rows that are handled together, at least one row."""
    rows = input.shape[0]
    aligned = _ROW_ALIGNMENT // input.itemsize
    row_stride = -(-classes // aligned) * aligned
    step = max(1, min(rows, memory_budget // max(1, row_stride * input.itemsize)))
    if _WHOLE_ROWS < step < rows:
        step -= step % _WHOLE_ROWS
    place = input.new_empty(step, row_stride)
    return place if row_stride == classes else place[:, :classes]


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def _losses_in_place(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, grad_loss: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Losses and normalizer of a chunk; with `grad_loss` the logits are overwritten by their gradients."""
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
