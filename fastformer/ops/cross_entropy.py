"""Cross-entropy of logits in memory; `linear_cross_entropy` computes the logits of a projection itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn import _reduction

from fastformer.backends import use_triton
from fastformer.debugging import assert_on_device, debugging
from fastformer.ops.autocast import autocast_device_type
from fastformer.ops.checks import can_be_read, check_device, check_floating, check_shape, check_softcap
from fastformer.ops.operator import operator, runs_in_pytorch, vjp

REDUCTIONS = ("mean", "sum", "none")
# Elements of the rows that the CPU handles together: their float32 logits stay in its last-level cache.
_CACHED_ELEMENTS = 1 << 20
# For at most this many logits, PyTorch's own loss may keep the log-probabilities.
_FEW_ELEMENTS = 1 << 18

Options = tuple[int, float, float, float]
"""ignore_index, label_smoothing, z_loss and softcap (0: none), as the registered operators take them."""


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    inplace: bool = False,
) -> Tensor:
    """Cross-entropy like `torch.nn.functional.cross_entropy`, with z-loss and softcap.

    For few float32 logits on a CPU, and without the extra options, it calls that function.

    Args:
        input: logits (classes,), (N, classes) or (N, classes, ...): float32, float16 or bfloat16, any strides.
        target: int64 or uint8 classes, in input's shape without `classes`. Class probabilities, in input's shape, are
            handled by PyTorch's own operator, and only with PyTorch's own options.
        weight: (classes,) floating, the weight of each class, also in the mean: the weighted losses' sum is divided
            by the sum of the targets' weights.
        size_average, reduce: PyTorch's deprecated names for `reduction`.
        ignore_index: rows with this target have no effect.
        reduction: "mean" over the rows that count (NaN if there are none, as in PyTorch), "sum" or "none".
        label_smoothing: in [0, 1], the share of the loss that is spread evenly over all classes (Szegedy et al. 2016).
        z_loss: adds ``z_loss * logsumexp(logits)^2`` to a row's loss, weighted like its target (Chowdhery et al. 2022).
        softcap: positive; the logits are ``softcap * tanh(input / softcap)`` (Gemma Team 2024).
        inplace: the backward writes the gradient into `input`, which nothing else may use afterwards. It has no effect
            under `torch.compile`, which chooses the gradient's memory itself.

    Returns:
        A scalar, or a tensor of target's shape for "none"; in input's dtype (under autocast float32), accumulated in
        float32.

    Raises:
        TypeError, ValueError: the message names the argument.
        IndexError: a target is not a class, on a CPU. On a GPU, where reading it would stall, its loss is NaN.

    >>> fastformer.cross_entropy(torch.zeros(3, 8), torch.tensor([0, 5, -100]))
    tensor(2.0794)
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if target.is_floating_point():
        if z_loss or softcap is not None or inplace:
            raise TypeError("z_loss, softcap and inplace need a target of int64 classes; got class probabilities")
        return F.cross_entropy(input, target, weight, reduction=reduction, label_smoothing=label_smoothing)
    target = target.long() if target.dtype == torch.uint8 else target
    _check(input, target, weight, inplace)
    options = checked_options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    class_weight = None if weight is None else weight.detach().float().contiguous()
    if not (label_smoothing or z_loss or softcap or inplace) and few_on_cpu(input, input.numel()) and _ordinary(input):
        try:
            return F.cross_entropy(input, target, class_weight, ignore_index=ignore_index, reduction=reduction)
        except IndexError:
            check_classes(target, input.shape[min(1, input.dim() - 1)], ignore_index)
            raise
    logits = input if input.dim() > 1 else input[None]
    inplace = inplace and input.requires_grad and not torch.compiler.is_compiling()
    # Autocast computes losses in float32; this needs no copy of the logits.
    dtype = torch.float32 if torch.is_autocast_enabled(autocast_device_type(input)) else input.dtype
    loss, _, _ = _cross_entropy(logits, target, class_weight, *options, reduction, inplace, dtype)
    return loss


def _check(input: Tensor, target: Tensor, weight: Tensor | None, inplace: bool) -> None:
    check_floating("input", input)
    shape = input.shape
    if not shape:
        raise ValueError("input must be logits (classes,), (N, classes) or (N, classes, ...); got a scalar")
    check_target("target", target, shape[:1] + shape[2:] if len(shape) > 1 else shape[1:], input)
    if weight is not None:
        check_class_weight("weight", weight, shape[min(1, len(shape) - 1)], input)
    if inplace and input.is_leaf and input.requires_grad:
        raise ValueError("inplace=True would overwrite input, a leaf that requires a gradient; use inplace=False")


def few_on_cpu(input: Tensor, logits: int) -> bool:
    """Whether PyTorch's own operators are best: for few float32 logits on a CPU, calling costs more than computing."""
    # A compiler may not know the number of logits, so it is not asked.
    return input.dtype == torch.float32 and runs_in_pytorch(input) and logits <= _FEW_ELEMENTS


def _ordinary(logits: Tensor) -> bool:
    """Whether no gradient is needed or all logits are finite, so that an ignored row's gradient is not NaN."""
    return not (logits.requires_grad and torch.is_grad_enabled()) or math.isfinite(logits.detach().sum().item())


def check_target(name: str, target: Tensor, shape: tuple[int, ...], input: Tensor) -> None:
    """Raise unless `target` is int64, has `shape` and is on input's device."""
    if target.dtype != torch.int64:
        raise TypeError(f"{name} must be int64; got {target.dtype}")
    if target.shape != shape:
        check_shape(name, target, shape)
    if target.device != input.device:
        check_device(name, target, "input", input)


def check_class_weight(name: str, class_weight: Tensor, classes: int, input: Tensor) -> None:
    """Raise unless `class_weight` is floating, of shape (classes,) and on input's device."""
    check_floating(name, class_weight)
    check_shape(name, class_weight, (classes,))
    check_device(name, class_weight, "input", input)


def checked_options(
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, reduction: str
) -> Options:
    """Check the options and return them as the registered operators take them."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss must be at least 0; got {z_loss}")
    check_softcap(softcap)
    return ignore_index, label_smoothing, z_loss, softcap or 0.0


def options_of(call: Any) -> Options:
    """Return the options of an operator's call, whose fields have the same names."""
    return call.ignore_index, call.label_smoothing, call.z_loss, call.softcap


def row_weights(target: Tensor, classes: int, class_weight: Tensor | None, ignore_index: int) -> Tensor:
    """The weight of each row of `target` (rows,) in a mean: its class's weight, or 0 if it is ignored."""
    counts = target != ignore_index
    # The loss of a target that is not a class is NaN already.
    return counts if class_weight is None else class_weight[target.clamp(0, classes - 1)] * counts


def without_ignored(rows: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Replace ignored rows of `rows`, which may be NaN, by zeros."""
    return rows.masked_fill((target == ignore_index)[:, None], 0.0)


def total_weight(target: Tensor, classes: int, class_weight: Tensor | None, ignore_index: int) -> Tensor:
    """The float32 divisor of a mean."""
    return row_weights(target, classes, class_weight, ignore_index).sum(dtype=torch.float32)


def check_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError if a target is not a class, on a CPU; a GPU is not waited for (see `fastformer.debug`)."""
    if not target.is_cpu:
        if debugging():
            known = (target >= 0) & (target < classes) | (target == ignore_index)
            assert_on_device(known, f"target must be a class from 0 to {classes - 1} or {ignore_index}")
        return
    if not can_be_read(target):
        return
    wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if wrong.numel():
        raise IndexError(f"target must be a class from 0 to {classes - 1} or {ignore_index}; got {wrong[0].item()}")


class _CrossEntropy(NamedTuple):
    """One call's arguments. `logits` is (rows, classes) or (N, classes, ...); `target` has no classes dimension."""

    logits: Tensor
    target: Tensor
    class_weight: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    reduction: str
    inplace: bool
    dtype: torch.dtype


@operator("fastformer::cross_entropy", mutates_args=())
def _cross_entropy(call: _CrossEntropy) -> tuple[Tensor, Tensor, Tensor]:
    """Return the reduced loss in `dtype`, each row's normalizer (2, rows) and the mean's divisor, both in float32."""
    rows = _flat(call.target)
    losses, normalizer = _row_losses(call.logits, rows, call.class_weight, options_of(call))
    loss, total = _reduced(
        losses, call.target, call.logits.shape[1], call.class_weight, call.ignore_index, call.reduction
    )
    return loss.to(call.dtype), normalizer, total


def _reduced(
    losses: Tensor, target: Tensor, classes: int, class_weight: Tensor | None, ignore_index: int, reduction: str
) -> tuple[Tensor, Tensor]:
    """Reduce the rows' losses by `reduction`; also return the divisor of a mean (empty for other reductions)."""
    if reduction == "none":
        return losses.view(target.shape), losses.new_empty(0)
    loss = losses.sum()
    if reduction == "sum":
        return loss, losses.new_empty(0)
    total = total_weight(_flat(target), classes, class_weight, ignore_index)
    return loss / total, total


def _row_losses(logits: Tensor, target: Tensor, class_weight: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    check_classes(target, logits.shape[1], options[0])
    if use_triton(logits) and logits.numel():
        from fastformer_kernels.cross_entropy import CrossEntropyOptions, cross_entropy_forward

        return cross_entropy_forward(logits, target.contiguous(), class_weight, CrossEntropyOptions(*options))
    return forward_torch(_as_rows(logits), target, class_weight, options)


@_cross_entropy.register_fake
def _(call: _CrossEntropy) -> tuple[Tensor, Tensor, Tensor]:
    loss = call.logits.new_empty(call.target.shape if call.reduction == "none" else (), dtype=call.dtype)
    normalizer = call.logits.new_empty(2, call.target.numel(), dtype=torch.float32)
    return loss, normalizer, normalizer.new_empty(() if call.reduction == "mean" else 0)


@_cross_entropy.register_formula
def _(call: _CrossEntropy) -> tuple[Tensor, Tensor, Tensor]:
    losses, normalizer = losses_formula(_as_rows(call.logits), _flat(call.target), call.class_weight, options_of(call))
    loss, total = _reduced(
        losses, call.target, call.logits.shape[1], call.class_weight, call.ignore_index, call.reduction
    )
    return loss.to(call.dtype), normalizer, total


@operator("fastformer::cross_entropy_backward_", mutates_args=("gradient",))
def _write_gradient(
    gradient: Tensor,
    logits: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    grad_loss: Tensor,
    normalizer: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """Write the gradient of `logits` to `gradient`; if `logits` is None, `gradient` holds the logits."""
    options = (ignore_index, label_smoothing, z_loss, softcap)
    _run_backward(gradient, logits, target, class_weight, grad_loss, normalizer, options)


class _Gradient(NamedTuple):
    """One call's arguments of the derivative, with the `normalizer` that `_cross_entropy` returned."""

    logits: Tensor
    target: Tensor
    class_weight: Tensor | None
    grad_loss: Tensor
    normalizer: Tensor
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


@operator("fastformer::cross_entropy_backward", mutates_args=())
def _gradient(call: _Gradient) -> Tensor:
    gradient = torch.empty_like(call.logits)
    where = gradient, call.logits, call.target, call.class_weight
    _run_backward(*where, call.grad_loss, call.normalizer, options_of(call))
    return gradient


@_gradient.register_fake
def _(call: _Gradient) -> Tensor:
    return torch.empty_like(call.logits)


@_gradient.register_formula
def _(call: _Gradient) -> Tensor | None:
    def loss(logits: Tensor) -> tuple[Tensor, ...]:
        return losses_formula(_as_rows(logits), call.target, call.class_weight, options_of(call))[:1]

    return vjp(loss, [call.logits], [call.grad_loss])[0]


def _run_backward(
    gradient: Tensor,
    logits: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    grad_loss: Tensor,
    normalizer: Tensor,
    options: Options,
) -> None:
    logits = gradient if logits is None else logits
    if use_triton(logits) and logits.numel():
        from fastformer_kernels.cross_entropy import CrossEntropyOptions, cross_entropy_backward

        target = target.contiguous()
        launched = CrossEntropyOptions(*options)
        cross_entropy_backward(logits, gradient, target, class_weight, grad_loss, normalizer, launched)
        return
    rows = _as_rows(gradient)
    backward_torch(_as_rows(logits), rows, target, class_weight, grad_loss, normalizer, options)
    if rows.data_ptr() != gradient.data_ptr():
        gradient.copy_(rows.view(gradient.movedim(1, -1).shape).movedim(-1, 1))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, class_weight, *ctx.options, ctx.reduction, ctx.inplace, _ = inputs
    _, normalizer, total = output
    ctx.save_for_backward(logits, target, class_weight, normalizer, total)
    ctx.mark_non_differentiable(normalizer, total)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradient: Tensor | None = None
    if grad_loss is not None:
        logits, target, class_weight, normalizer, total = ctx.saved_tensors
        rows = _flat(target)
        if ctx.reduction == "none":
            grad_loss = _flat(grad_loss).float()
        else:
            grad_loss = (grad_loss / total if ctx.reduction == "mean" else grad_loss.float()).expand(rows.shape)
        if ctx.inplace:
            if torch.is_grad_enabled():
                raise RuntimeError("cross_entropy's gradient has no derivative with inplace=True; use inplace=False")
            _write_gradient(logits, None, rows, class_weight, grad_loss, normalizer, *ctx.options)
            gradient = logits
        else:
            gradient = _gradient(logits, rows, class_weight, grad_loss, normalizer, *ctx.options)
    return gradient, *(None,) * 9


_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def _flat(of_rows: Tensor) -> Tensor:
    return of_rows if of_rows.dim() == 1 else of_rows.reshape(-1)


def _as_rows(logits: Tensor) -> Tensor:
    """View (N, classes, ...) as (rows, classes); copy only where no view exists."""
    if logits.dim() == 2:
        return logits
    return rearrange(logits, "n classes ... -> (n ...) classes")


def forward_torch(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Loss (rows,) and normalizer (2, rows) of the rows of `logits` (rows, classes), in float32.

    The normalizer is a row's maximum m and the sum of exp(z - m). As one number, the log-sum-exp, it would lose
    precision: its rounding error would become a relative error of the probabilities.
    """
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    normalizer = losses.new_empty(2, logits.shape[0])
    for rows in _cached_chunks(logits):
        z = _capped(logits[rows], options[3])
        losses[rows], normalizer[:, rows] = _losses(z, target[rows], class_weight, options)
    return losses, normalizer


def backward_torch(
    logits: Tensor,
    gradient: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    grad_loss: Tensor,
    normalizer: Tensor,
    options: Options,
) -> None:
    """Write the gradient of `logits` (rows, classes) to `gradient`, which may be `logits`."""
    for rows in _cached_chunks(logits):
        z = _capped(logits[rows], options[3])
        _write_gradient_of(z, gradient[rows], target[rows], class_weight, grad_loss[rows], normalizer[:, rows], options)


def in_place_torch(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, grad_loss: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Compute what `forward_torch` does and overwrite the logits by their gradient while they are in the cache."""
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    normalizer = losses.new_empty(2, logits.shape[0])
    for rows in _cached_chunks(logits):
        z = _capped(logits[rows], options[3])
        losses[rows], normalizer[:, rows] = _losses(z, target[rows], class_weight, options)
        _write_gradient_of(z, logits[rows], target[rows], class_weight, grad_loss[rows], normalizer[:, rows], options)
    return losses, normalizer


def _cached_chunks(logits: Tensor) -> Iterator[slice]:
    step = max(1, _CACHED_ELEMENTS // max(1, logits.shape[1]))
    for start in range(0, logits.shape[0], step):
        yield slice(start, start + step)


def _capped(logits: Tensor, softcap: float) -> Tensor:
    """Return the logits in float32, capped; float32 logits without a cap are returned unchanged."""
    return torch.tanh(logits.float() / softcap).mul_(softcap) if softcap else logits.float()


def _losses(z: Tensor, target: Tensor, class_weight: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    ignore_index, label_smoothing, z_loss, _ = options
    column, known, weight = _targets(target, z.shape[1], class_weight, ignore_index)
    maximum = z.amax(1)
    exponential_sum = torch.sub(z, maximum[:, None]).exp_().sum(1)
    log_sum = exponential_sum.log()
    losses = (1.0 - label_smoothing) * (maximum - z.gather(1, column).squeeze(1) + log_sum)
    losses = weight * (losses + z_loss * (maximum + log_sum).square())
    if label_smoothing:
        distance = (maximum[:, None] - z).add_(log_sum[:, None])
        distance = distance.sum(1) if class_weight is None else distance @ class_weight
        losses += label_smoothing / z.shape[1] * distance
    losses = losses.masked_fill(~known, float("nan")).masked_fill(target == ignore_index, 0.0)
    return losses, torch.stack((maximum, exponential_sum))


def _write_gradient_of(
    z: Tensor,
    gradient: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    grad_loss: Tensor,
    normalizer: Tensor,
    options: Options,
) -> None:
    ignore_index, label_smoothing, z_loss, softcap = options
    column, known, weight = _targets(target, z.shape[1], class_weight, ignore_index)
    grad_loss = grad_loss.masked_fill(~known, float("nan"))
    total_weight = 1.0 if class_weight is None else class_weight.sum() / z.shape[1]
    of_target = grad_loss * weight * (1.0 - label_smoothing)
    maximum, exponential_sum = normalizer
    of_lse = 2.0 * z_loss * weight * log_sum_exp(normalizer)
    of_probability = of_target + grad_loss * (label_smoothing * total_weight + of_lse)
    slope = 1.0 - (z / softcap).square_() if softcap else None
    out = gradient if gradient.dtype == torch.float32 else torch.empty_like(z)
    torch.sub(z, maximum[:, None], out=out).exp_().mul_((of_probability / exponential_sum)[:, None])
    out.scatter_add_(1, column, -of_target[:, None])
    if label_smoothing:
        of_class = grad_loss[:, None] * (label_smoothing / z.shape[1])
        out.sub_(of_class if class_weight is None else of_class * class_weight)
    if slope is not None:
        out.mul_(slope)
    out.masked_fill_((target == ignore_index)[:, None], 0.0)
    if out is not gradient:
        gradient.copy_(out)


def losses_formula(
    logits: Tensor, target: Tensor, class_weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """Compute what `forward_torch` returns, by differentiable functions."""
    check_classes(target, logits.shape[1], options[0])
    # Zero times NaN is NaN: rows that have no effect are set to zero first.
    z = without_ignored(logits.float(), target, options[0])
    return _losses(torch.tanh(z / options[3]) * options[3] if options[3] else z, target, class_weight, options)


def log_sum_exp(normalizer: Tensor) -> Tensor:
    """Log-sum-exp of the rows (rows,) from their normalizer (2, rows)."""
    maximum, exponential_sum = normalizer
    return maximum + exponential_sum.log()


def _targets(
    target: Tensor, classes: int, class_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a valid column (rows, 1) for each row, whether it is the row's class, and the weight of that class."""
    # A target that is not a class gets here only on a GPU without triton.
    known = (target != ignore_index) & (target >= 0) & (target < classes)
    column = target.masked_fill(~known, 0)
    weight = torch.ones_like(column, dtype=torch.float32) if class_weight is None else class_weight[column]
    return column[:, None], known, weight
