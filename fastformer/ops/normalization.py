"""LayerNorm and RMSNorm, together with the bias, dropout and residual addition before them in a Transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastformer.backends import use_triton
from fastformer.ops.autocast import autocast_float32_dtype
from fastformer.ops.checks import FLOATING_DTYPES, check_device, check_floating, check_shape
from fastformer.ops.dropout import apply_dropout_, check_dropout_p, draw_seed, dropped, kernel_dropout
from fastformer.ops.operator import in_dtype, operator, runs_in_pytorch

MAX_COLUMNS = 65536
_FLOAT32_EPS = torch.finfo(torch.float32).eps


@overload
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_sum: bool = True,
) -> Tensor: ...
@overload
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_sum: Literal[True] = True,
) -> tuple[Tensor, Tensor]: ...
@overload
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_sum: Literal[False],
) -> Tensor: ...
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_sum: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimensions: ``(x - mean) / sqrt(var + eps) * weight + bias`` (Ba et al. 2016).

    The normalised tensor is ``x = residual + dropout(input + input_bias)``, each part only if it is given.

    Args:
        input: (..., *normalized_shape), float32, float16 or bfloat16, any strides.
        normalized_shape: the trailing dimensions to normalise, 1 to 65,536 elements together.
        weight, bias: of shape `normalized_shape`; float32, float16 or bfloat16, not necessarily input's dtype.
        eps: added to the variance.
        residual: of input's shape; may have another dtype, such as float32 with a bfloat16 input.
        input_bias: of shape `normalized_shape`, added to the input: the bias of the projection that produced it.
        dropout_p: probability of dropping an element of ``input + input_bias``; the kept ones are scaled by
            ``1 / (1 - dropout_p)``. The pattern depends on PyTorch's generator and on the element's row and column
            only, not on backend or tile sizes; the backward draws it again.
        return_sum: with `residual`, return x too, as pre-norm layers need it; post-norm layers do not.

    Returns:
        The normalised tensor; with `residual`, unless `return_sum` is False, the pair (normalised, x). Both have the
        dtype to which the dtypes of input and residual promote.

    Raises:
        TypeError, ValueError: the message names the argument, what was given and what is accepted.
    """
    return _normalize(
        input, normalized_shape, weight, bias, eps, residual, input_bias, dropout_p, return_sum, centered=True
    )


@overload
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    residual: None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_sum: bool = True,
) -> Tensor: ...
@overload
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_sum: Literal[True] = True,
) -> tuple[Tensor, Tensor]: ...
@overload
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_sum: Literal[False],
) -> Tensor: ...
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
    *,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_sum: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimensions: ``x / sqrt(mean(x^2) + eps) * weight`` (Zhang and Sennrich 2019).

    Arguments, results and errors are as in `layer_norm`. The default of `eps` is float32's machine epsilon. PyTorch
    uses it for 16-bit inputs too, although its documentation says otherwise.
    """
    eps = _FLOAT32_EPS if eps is None else eps
    return _normalize(
        input, normalized_shape, weight, None, eps, residual, input_bias, dropout_p, return_sum, centered=False
    )


def _normalize(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    input_bias: Tensor | None,
    dropout_p: float,
    return_sum: bool,
    centered: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    shape = tuple(normalized_shape)
    _check(input, shape, weight, bias, residual, input_bias, dropout_p)
    returns_sum = residual is not None and return_sum
    parts = (residual, weight, bias, input_bias)
    if centered and not dropout_p and runs_in_pytorch(input) and _all_float32(input, *parts):
        output, total = _layer_norm_of_pytorch(input, shape, eps, *parts)
        return (output, total) if returns_sum else output
    dtype = autocast_float32_dtype(input)
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
    whole = input.shape
    flattens = len(shape) > 1 or not input.is_contiguous() or (residual is not None and not residual.is_contiguous())
    if flattens:
        columns = math.prod(shape)
        input = input.reshape(-1, columns)
        residual = None if residual is None else residual.reshape(-1, columns)
        weight, bias, input_bias = (None if each is None else each.reshape(-1) for each in (weight, bias, input_bias))
    is_sum = residual is not None or input_bias is not None or dropout_p > 0.0
    output, total, *_ = _norm(
        input,
        residual,
        weight,
        bias,
        input_bias,
        draw_seed(input.device) if dropout_p else None,
        eps,
        centered,
        dropout_p,
        dtype,
        is_sum and (returns_sum or _learns(input, *parts)),
    )
    if flattens:
        # Autograd must not see a view: FSDP2's hooks on a module's output do not survive in-place operations on views.
        output = torch.ops.aten._unsafe_view(output, whole)
        total = total.view(whole) if returns_sum else total
    return (output, total) if returns_sum else output


def _check(
    input: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_bias: Tensor | None,
    dropout_p: float,
) -> None:
    if input.dtype not in FLOATING_DTYPES:
        check_floating("input", input)
    if not shape or input.shape[-len(shape) :] != shape:
        raise ValueError(f"normalized_shape must be the last dimensions of input {tuple(input.shape)}; got {shape}")
    if not 1 <= math.prod(shape) <= MAX_COLUMNS:
        raise ValueError(f"normalized_shape must have 1 to {MAX_COLUMNS} elements; got {math.prod(shape)}")
    if weight is not None:
        _check_part("weight", weight, shape, input)
    if bias is not None:
        _check_part("bias", bias, shape, input)
    if input_bias is not None:
        _check_part("input_bias", input_bias, shape, input)
    if residual is not None:
        _check_part("residual", residual, input.shape, input)
    if dropout_p:
        check_dropout_p(dropout_p)


def _check_part(name: str, tensor: Tensor, shape: tuple[int, ...], input: Tensor) -> None:
    # Search for the fault only if there is one.
    if tensor.dtype not in FLOATING_DTYPES or tensor.shape != shape or tensor.device != input.device:
        check_floating(name, tensor)
        check_shape(name, tensor, shape)
        check_device(name, tensor, "input", input)


def _all_float32(*tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.dtype == torch.float32 for tensor in tensors)


def _learns(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow; also True under transforms of `torch.func`, which hide whether it does."""
    if torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _layer_norm_of_pytorch(
    input: Tensor,
    shape: tuple[int, ...],
    eps: float,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    input_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute output and x by the PyTorch functions that our operator would call, with their derivatives."""
    total = input if input_bias is None else input + input_bias
    total = total if residual is None else total + residual
    return torch.layer_norm(total, shape, weight, bias, eps), total


class _Norm(NamedTuple):
    """One call's arguments. `input` and `residual` are contiguous (..., columns), or (rows, columns) of any strides."""

    input: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    input_bias: Tensor | None
    seed: Tensor | None
    eps: float
    centered: bool
    dropout_p: float
    dtype: torch.dtype
    keep_sum: bool


@operator("fastformer::norm")
def _norm(call: _Norm) -> tuple[Tensor, Tensor | None, Tensor]:
    """The output, x if `keep_sum`, and statistics (1 or 2, rows): rstd and, if `centered`, mean."""
    input, residual, weight, bias, input_bias, seed, eps, centered, dropout_p, dtype, keep_sum = call
    if use_triton(input) and input.numel():
        from fastformer_kernels.normalization import norm_forward

        return norm_forward(
            input,
            input_bias,
            residual,
            kernel_dropout(seed, dropout_p),
            weight,
            bias,
            eps,
            centered=centered,
            dtype=dtype,
            keep_sum=keep_sum,
        )
    total = _sum_torch(input, residual, input_bias, seed, dropout_p, dtype)
    output, mean, rstd = _norm_torch(total, weight, bias, eps, centered, dtype)
    statistics = rstd[None] if mean is None else torch.stack((rstd, mean))
    if not keep_sum:
        return output, None, statistics
    # An operator's outputs must not be its inputs.
    return output, total.clone() if total.data_ptr() == input.data_ptr() else total, statistics


@_norm.register_fake
def _(call: _Norm) -> tuple[Tensor, Tensor | None, Tensor]:
    output = call.input.new_empty(call.input.shape, dtype=call.dtype)
    rows = math.prod(output.shape[:-1])
    statistics = output.new_empty(1 + call.centered, rows, dtype=torch.float32)
    return output, torch.empty_like(output) if call.keep_sum else None, statistics


class _NormBackward(NamedTuple):
    """One call's arguments of the derivative. `x` was normalised, `statistics` is what `_norm` returned."""

    grad_output: Tensor
    grad_sum: Tensor | None
    x: Tensor
    statistics: Tensor
    weight: Tensor | None
    seed: Tensor | None
    centered: bool
    dropout_p: float
    input_dtype: torch.dtype
    residual_dtype: torch.dtype | None
    weight_needs_grad: bool
    bias_needs_grad: bool
    input_bias_needs_grad: bool


@operator("fastformer::norm_backward")
def _norm_backward(call: _NormBackward) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of input, of residual and, if needed, as rows of one float32 tensor, of weight, bias, input_bias."""
    grad_output, grad_sum, x, statistics, weight, seed, centered, dropout_p, input_dtype, residual_dtype, *needs = call
    weight_needs_grad, bias_needs_grad, input_bias_needs_grad = needs
    if use_triton(x) and x.numel():
        from fastformer_kernels.normalization import norm_backward

        return norm_backward(
            _rows(grad_output),
            None if grad_sum is None else _rows(grad_sum),
            x,
            statistics,
            weight,
            kernel_dropout(seed, dropout_p),
            centered=centered,
            input_dtype=input_dtype,
            residual_dtype=residual_dtype,
            weight_needs_grad=weight_needs_grad,
            bias_needs_grad=bias_needs_grad,
            input_bias_needs_grad=input_bias_needs_grad,
        )
    rstd, mean = statistics if centered else (statistics[0], None)
    grad_x, grad_weight, grad_bias = _norm_backward_torch(
        _matrix(grad_output), _matrix(x), mean, rstd, weight, weight_needs_grad, bias_needs_grad
    )
    grad_sum = None if grad_sum is None else _matrix(grad_sum)
    grad_input, grad_residual, grad_input_bias = _sum_backward_torch(
        grad_x, grad_sum, seed, dropout_p, input_dtype, residual_dtype, input_bias_needs_grad
    )
    parameters = [grad for grad in (grad_weight, grad_bias, grad_input_bias) if grad is not None]
    return (
        grad_input.view(x.shape),
        None if grad_residual is None else grad_residual.view(x.shape),
        torch.stack(parameters) if parameters else None,
    )


@_norm_backward.register_fake
def _(call: _NormBackward) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x, residual_dtype = call.x, call.residual_dtype
    needed = call.weight_needs_grad + call.bias_needs_grad + call.input_bias_needs_grad
    return (
        x.new_empty(x.shape, dtype=call.input_dtype),
        None if residual_dtype is None else x.new_empty(x.shape, dtype=residual_dtype),
        call.statistics.new_empty(needed, x.shape[-1]) if needed else None,
    )


def _gradients(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients in float32 of input and residual, then terms of those of weight and bias, by differentiable functions.

    The sums over all rows are the gradients of weight, bias and, of the first, input_bias.
    """
    wide, dy = x.float(), grad_output.float()
    normalised = (wide if mean is None else wide - mean) * rstd
    g = dy if weight is None else dy * weight
    grad_x = g - normalised * (g * normalised).mean(-1, keepdim=True)
    if mean is not None:
        grad_x = grad_x - g.mean(-1, keepdim=True)
    grad_x = grad_x * rstd
    if grad_sum is not None:
        grad_x = grad_x + grad_sum
    return grad_x if seed is None else dropped(grad_x, seed, dropout_p), grad_x, dy * normalised, dy


@_norm.register_formula
def _(call: _Norm) -> tuple[Tensor, Tensor | None, Tensor]:
    input, residual, weight, bias, input_bias, seed, eps, centered, dropout_p, dtype, keep_sum = call
    total = in_dtype(input, torch.float32)
    if input_bias is not None:
        total = total + input_bias
    if seed is not None:
        total = dropped(total, seed, dropout_p)
    if residual is not None:
        total = total + residual
    total = in_dtype(total, dtype)
    wide = in_dtype(total, torch.float32)
    mean = wide.mean(-1, keepdim=True) if centered else None
    deviation = wide if mean is None else wide - mean
    # A product with `rsqrt` has a derivative with its third power, which overflows or vanishes long before the square.
    std = torch.sqrt(deviation.square().mean(-1, keepdim=True) + eps)
    output = deviation / std
    if weight is not None:
        output = output * weight
    if bias is not None:
        output = output + bias
    rstd = std.reciprocal().flatten()
    statistics = [rstd] if mean is None else [rstd, mean.flatten()]
    return in_dtype(output, dtype), total if keep_sum else None, torch.stack(statistics)


@_norm_backward.register_formula
def _(call: _NormBackward) -> tuple[Tensor, Tensor | None, Tensor | None]:
    # The statistics are computed again, since they depend on x. Epsilon is recovered from the given ones.
    wide = call.x.float()
    mean = wide.mean(-1, keepdim=True) if call.centered else None
    variance = (wide if mean is None else wide - mean).square().mean(-1, keepdim=True)
    eps = (call.statistics[0].view(variance.shape).square().reciprocal() - variance).detach()
    rstd = torch.rsqrt(variance + eps)
    grad_input, grad_residual, of_weight, of_bias = _gradients(
        call.grad_output, call.grad_sum, call.x, mean, rstd, call.weight, call.seed, call.dropout_p
    )
    wanted = (
        (call.weight_needs_grad, of_weight),
        (call.bias_needs_grad, of_bias),
        (call.input_bias_needs_grad, grad_input),
    )
    parameters = [_matrix(terms).sum(0) for needed, terms in wanted if needed]
    return (
        grad_input.to(call.input_dtype),
        None if call.residual_dtype is None else grad_residual.to(call.residual_dtype),
        torch.stack(parameters) if parameters else None,
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    input, residual, weight, bias, input_bias, seed, _, ctx.centered, ctx.dropout_p, _, ctx.keep_sum = inputs
    _, total, statistics = output
    ctx.save_for_backward(total if ctx.keep_sum else input, statistics, weight, seed)
    ctx.dtypes = (_dtype(input), _dtype(residual), _dtype(weight), _dtype(bias), _dtype(input_bias))
    ctx.set_materialize_grads(False)


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _backward(
    ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, statistics, weight, seed = ctx.saved_tensors
    if not ctx.keep_sum:
        grad_sum = None
    if grad_output is None and grad_sum is None:
        return (None,) * len(_Norm._fields)
    if grad_output is None:
        grad_output = x.new_zeros(()).expand(x.shape)
    needed = ctx.needs_input_grad
    input_dtype, residual_dtype = ctx.dtypes[:2]
    # Without dropout the two gradients differ only in dtype.
    one_gradient = seed is None and residual_dtype == input_dtype
    grad_input, grad_residual, parameters = _norm_backward(
        grad_output,
        grad_sum,
        x,
        statistics,
        weight,
        seed,
        ctx.centered,
        ctx.dropout_p,
        input_dtype,
        residual_dtype if needed[1] and not one_gradient else None,
        needed[2],
        needed[3],
        needed[4],
    )
    if one_gradient:
        grad_residual = grad_input
    grads: list[Tensor | None] = [grad_input, grad_residual if needed[1] else None, *(None,) * (len(_Norm._fields) - 2)]
    places = [place for place in (2, 3, 4) if needed[place]]
    if places:
        dtypes = {ctx.dtypes[place] for place in places}
        if len(dtypes) == 1:
            parameters = parameters.to(*dtypes)
        for place, row in zip(places, parameters.unbind(), strict=True):
            grads[place] = row if len(dtypes) == 1 else row.to(ctx.dtypes[place])
    return tuple(grads)


_norm.register_autograd(_backward, setup_context=_setup_context)
_norm.register_decomposition()


def _rows(tensor: Tensor) -> Tensor:
    """Return `tensor` if it is contiguous, else its rows."""
    return tensor if tensor.is_contiguous() else _matrix(tensor)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _sum_torch(
    input: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
) -> Tensor:
    """The tensor to normalise, contiguous, in `dtype`, rounded once."""
    if input_bias is None and seed is None:
        total = input if residual is None else input + residual
        return total.to(dtype).contiguous()
    total = input.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if input_bias is not None:
        total += input_bias
    if seed is not None:
        apply_dropout_(_matrix(total), seed, dropout_p)
    if residual is not None:
        total += residual
    return total.to(dtype)


def _norm_torch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The output and, in float32, the rows' mean (None for RMSNorm) and rstd."""
    if centered:
        # PyTorch's kernel needs all parameters in one dtype, the input's or float32.
        output, mean, rstd = torch.native_layer_norm(x, (x.shape[-1],), _parameter(weight, x), _parameter(bias, x), eps)
        return output.contiguous(), mean.flatten().float(), rstd.flatten().float()
    wide = x.float()
    rstd = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    output = wide * rstd
    if weight is not None:
        output *= weight
    return output.to(dtype).contiguous(), None, rstd.flatten()


def _parameter(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(x.dtype if x.dtype == torch.float32 else torch.float32)


def _norm_backward_torch(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    weight: Tensor | None,
    weight_needs_grad: bool,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, in float32."""
    rstd = rstd[:, None]
    mean = None if mean is None else mean[:, None]
    if mean is not None and x.dtype == torch.float32:
        # Only whether a bias gradient is needed matters here, not the bias's values, so the weight replaces the bias.
        # Without a weight PyTorch's function has no bias either.
        needed = [True, weight_needs_grad, bias_needs_grad and weight is not None]
        wide = _parameter(weight, x)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad_output.contiguous(), x.contiguous(), (x.shape[1],), mean, rstd, wide, wide, needed
        )
        if bias_needs_grad and grad_bias is None:
            grad_bias = grad_output.sum(0)
        return grad_x, grad_weight, grad_bias
    dy, wide = grad_output.float(), x.float()
    normalised = (wide if mean is None else wide - mean) * rstd
    g = dy if weight is None else dy * weight
    products = g * normalised
    grad_x = torch.addcmul(g, normalised, products.mean(-1, keepdim=True), value=-1.0)
    if mean is not None:
        grad_x -= g.mean(-1, keepdim=True)
    return (
        grad_x.mul_(rstd),
        torch.mul(dy, normalised, out=products).sum(0) if weight_needs_grad else None,
        dy.sum(0) if bias_needs_grad else None,
    )


def _sum_backward_torch(
    grad_x: Tensor,
    grad_sum: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    input_bias_needs_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of input, residual and input_bias (float32) from `grad_x` (float32), which may be overwritten."""
    if grad_sum is not None:
        grad_x = grad_x.add_(grad_sum)
    # Copy if dropout is about to change it, or if it would also be the input's gradient.
    shared = seed is not None or residual_dtype == input_dtype
    grad_residual = None if residual_dtype is None else grad_x.to(residual_dtype, copy=shared)
    if seed is not None:
        grad_x = apply_dropout_(grad_x, seed, dropout_p)
    grad_input_bias = grad_x.sum(0) if input_bias_needs_grad else None
    return grad_x.to(input_dtype).contiguous(), grad_residual, grad_input_bias
