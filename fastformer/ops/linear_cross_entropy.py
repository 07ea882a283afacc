"""Cross-entropy of a linear projection, in chunks of rows, so that the logits of all rows are never held at once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
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
# The least on a GPU, where each chunk reads and writes the summed float32 gradient of the weight once more.
GPU_MEMORY_BUDGET = 256 << 20
# The share of a GPU's free memory that logits may take, and the most rows that they need: at 8,192 rows, the sum's
# traffic takes some 4% of the time of a chunk's products (sm_90: 700 TFLOP/s, 3.35 TB/s).
_SHARE_OF_FREE_MEMORY = 8
_MOST_ROWS = 8192
# The operators' memory budget where the free memory decides. Not even then is it read while a graph is traced.
_BY_FREE_MEMORY = 0
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
            64 MiB on a CPU, and on a GPU an eighth of the free memory, but no more than for 8,192 rows and no less than
            256 MiB. It is 256 MiB under deterministic algorithms, because the order of a sum depends on it.
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
        memory_budget = CPU_MEMORY_BUDGET if input.is_cpu else _BY_FREE_MEMORY
    class_weight = None if class_weight is None else class_weight.float().contiguous()
    if reduction == "none":
        losses, z_losses = _row_losses(rows, weight, row_target, bias, class_weight, *options, memory_budget)
        loss, z_part = losses.view(target.shape), z_losses.view(target.shape)
    else:
        needs = (_may_need_grad(input), _may_need_grad(weight), bias is not None and _may_need_grad(bias))
        loss, z_part, _, _, _ = _reduced_loss(
            rows, weight, row_target, bias, class_weight, *options, reduction, memory_budget, *needs
        )
    return (loss, z_part) if return_z_loss else loss


def _may_need_grad(tensor: Tensor) -> bool:
    # A tensor hidden by a transform of `torch.func` may need a gradient.
    return torch._C._are_functorch_transforms_active() or (torch.is_grad_enabled() and tensor.requires_grad)


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
    needs_input_grad: bool
    needs_weight_grad: bool
    needs_bias_grad: bool


@operator("fastformer::linear_cross_entropy", mutates_args=())
def _reduced_loss(call: _ReducedLoss) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the sums or means of the rows' losses and z-losses, and the gradients of input, weight and bias.

    A gradient that is not needed is empty."""
    options, needs = options_of(call), _needs(call)
    total = grad_losses = None
    if call.reduction == "mean":
        total = total_weight(call.target, call.weight.shape[0], call.class_weight, call.ignore_index)
    if any(needs):
        of_each = total.reciprocal() if total is not None else call.input.new_ones((), dtype=torch.float32)
        grad_losses = of_each.expand(call.target.shape)
    losses, z_losses, *gradients = _chunked(*_tensors(call), grad_losses, options, call.memory_budget, needs)
    loss = losses.sum()
    z_part = loss.new_zeros(()) if z_losses is None else z_losses.sum()
    if total is not None:
        loss.div_(total)
        z_part.div_(total)
    return loss, z_part, gradients[0], gradients[1], gradients[2]


@_reduced_loss.register_fake
def _(call: _ReducedLoss) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = call.input.new_empty((), dtype=torch.float32)
    return loss, torch.empty_like(loss), *_empty_gradients(call.input, call.weight, call.bias, _needs(call))


@_reduced_loss.register_formula
def _(call: _ReducedLoss) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = options_of(call)
    losses, z_losses = _formula(call.input, call.weight, call.target, call.bias, call.class_weight, options)
    loss, z_part = losses.sum(), z_losses.sum()
    if call.reduction == "mean":
        total = total_weight(call.target, call.weight.shape[0], call.class_weight, call.ignore_index)
        loss, z_part = loss / total, z_part / total
    return loss, z_part, *_empty_gradients(call.input, call.weight, call.bias, _NO_NEEDS)


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
    needs = tuple(ctx.needs_input_grad[place] for place in (0, 1, 3))
    if torch.is_grad_enabled():
        *options, reduction, memory_budget, _, _, _ = ctx.options
        if reduction == "mean":
            grad_loss = grad_loss / total_weight(target, weight.shape[0], class_weight, options[0])
        rows = (input, weight, target, bias, class_weight, grad_loss.expand(target.shape))
        gradients = _row_gradients(*rows, *options, memory_budget, *needs)
        grad_loss = None
    for place, gradient, needed in zip((0, 1, 3), gradients, needs, strict=True):
        if needed:
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
    losses, z_losses, *_ = _chunked(*_tensors(call), None, options, call.memory_budget, _NO_NEEDS)
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
    needs_input_grad: bool
    needs_weight_grad: bool
    needs_bias_grad: bool


@operator("fastformer::linear_cross_entropy_rows_backward", mutates_args=())
def _row_gradients(call: _RowGradients) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; one that is not needed is empty."""
    _, _, *gradients = _chunked(*_tensors(call), call.grad_losses, options_of(call), call.memory_budget, _needs(call))
    return gradients[0], gradients[1], gradients[2]


@_row_gradients.register_fake
def _(call: _RowGradients) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(call.input, call.weight, call.bias, _needs(call))


@_row_gradients.register_formula
def _(call: _RowGradients) -> tuple[Tensor | None, ...]:
    options = options_of(call)

    def losses(input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
        return (_formula(input, weight, call.target, bias, call.class_weight, options)[0],)

    gradients = vjp(losses, [call.input, call.weight, call.bias], [call.grad_losses])
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, _needs(call), strict=True))


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.options = inputs[:5], inputs[5:]
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _rows_backward(ctx: Any, grad_losses: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_losses is None:
        return (None,) * len(_RowLosses._fields)
    needs = [ctx.needs_input_grad[place] for place in (0, 1, 3)]
    gradients = _row_gradients(*ctx.saved_tensors, grad_losses, *ctx.options, *needs)
    grad_input, grad_weight, grad_bias = (
        gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
    )
    return grad_input, grad_weight, None, grad_bias, *(None,) * 6


_row_losses.register_autograd(_rows_backward, setup_context=_rows_setup)


Needs = tuple[bool, bool, bool]
"""Whether the gradients of input, weight and bias are needed."""
_NO_NEEDS: Needs = (False, False, False)


def _needs(call: _ReducedLoss | _RowGradients) -> Needs:
    return call.needs_input_grad, call.needs_weight_grad, call.needs_bias_grad


def _tensors(
    call: _ReducedLoss | _RowLosses | _RowGradients,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    return call.input, call.weight, call.target, call.bias, call.class_weight


def _chunked(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    grad_losses: Tensor | None,
    options: Options,
    memory_budget: int,
    needs: Needs,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Losses and (if enabled) z-losses of the rows; the needed gradients of input, weight and bias."""
    ignore_index, _, z_loss, _ = options
    classes = weight.shape[0]
    check_classes(target, classes, ignore_index)
    place = _place_for_logits(input, classes, memory_budget)
    step = place.shape[0]
    grad_input, grad_weight, grad_bias = _empty_gradients(input, weight, bias, needs)
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
        if needs[0]:
            torch.mm(logits, weight, out=grad_inputs[number])
        if needs[1]:
            counting = without_ignored(x, labels, ignore_index)
            grad_weight = _weight_gradient(grad_weight, logits, counting, number, whole=x.shape[0] == input.shape[0])
        if needs[2]:
            of_bias = logits.sum(0, dtype=torch.float32)
            grad_bias = grad_bias.add_(of_bias) if number else of_bias
    loss = losses[0] if len(losses) == 1 else torch.cat(losses)
    z_part = torch.cat(z_losses) if z_loss else None
    return loss, z_part, grad_input, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _weight_gradient(so_far: Tensor, logits: Tensor, x: Tensor, number: int, whole: bool) -> Tensor:
    """Add chunk `number` to the weight's gradient: in its own dtype if the chunk is the whole, else in float32."""
    if whole:
        return torch.mm(logits.T, x, out=so_far)
    if x.dtype == torch.float32:
        return so_far.addmm_(logits.T, x) if number else torch.mm(logits.T, x, out=so_far)
    if _adds_in_float32(x.device, x.dtype):
        # Each chunk's product is added to the float32 sum without being rounded first.
        if number == 0:
            return torch.mm(logits.T, x, out_dtype=torch.float32)
        return torch.addmm(so_far, logits.T, x, out_dtype=torch.float32, out=so_far)
    product = logits.T @ x
    return so_far.add_(product) if number else product.float()


@cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library of a device adds products of 16-bit matrices to a float32 sum: cuBLAS does.

    Tried once, with small matrices, so that a library that refuses costs accuracy and a warning, not a training run.
    """
    if device.type != "cuda" or not torch.version.cuda:
        return False
    matrix, total = torch.ones(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.mm(matrix, matrix, out_dtype=torch.float32)
        torch.addmm(total, matrix, matrix, out_dtype=torch.float32, out=total)
    except RuntimeError as error:
        warnings.warn(
            f"the products of each chunk of linear_cross_entropy are rounded to {dtype} before they are added to the "
            f"weight's gradient, because {device} refuses to add them in float32: {error}",
            stacklevel=2,
        )
        return False
    return True


def _parts(of_rows: Tensor, step: int) -> Sequence[Tensor]:
    """Split into parts of at most `step` rows."""
    return (of_rows,) if of_rows.shape[0] <= step else of_rows.split(step)


def _empty_gradients(input: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> tuple[Tensor, Tensor, Tensor]:
    return (
        input.new_empty(input.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        weight.new_empty(weight.shape[0] if needs[2] and bias is not None else 0),
    )


def _place_for_logits(input: Tensor, classes: int, memory_budget: int) -> Tensor:
    """Allocate the logits of the rows that are handled together, at least one row."""
    rows = input.shape[0]
    aligned = _ROW_ALIGNMENT // input.itemsize
    row_stride = -(-classes // aligned) * aligned
    row_bytes = max(1, row_stride * input.itemsize)
    step = max(1, min(rows, (memory_budget or _budget_of_gpu(input, row_bytes)) // row_bytes))
    if _WHOLE_ROWS < step < rows:
        step -= step % _WHOLE_ROWS
    place = input.new_empty(step, row_stride)
    return place if row_stride == classes else place[:, :classes]


# The last budget by the free memory of each GPU, for graphs that are captured after a call that warmed up.
_last_budgets: dict[int, int] = {}


def _budget_of_gpu(input: Tensor, row_bytes: int) -> int:
    """The bytes for logits on a GPU: a share of its free memory, between two bounds."""
    rows, gpu = min(input.shape[0], _MOST_ROWS), input.get_device()
    if rows * row_bytes <= GPU_MEMORY_BUDGET or gpu < 0 or torch.are_deterministic_algorithms_enabled():
        return GPU_MEMORY_BUDGET
    if not torch.cuda.is_current_stream_capturing():
        # Memory that PyTorch keeps for later allocations is free too.
        kept = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
        free = torch.cuda.mem_get_info(gpu)[0] + kept
        _last_budgets[gpu] = free // _SHARE_OF_FREE_MEMORY
    return max(GPU_MEMORY_BUDGET, min(_last_budgets.get(gpu, 0), rows * row_bytes))


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
