"""LayerNorm and RMSNorm, with what precedes them in a Transformer: bias, dropout and residual addition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastformer.backends import use_triton
from fastformer.ops.autocast import autocast_float32_dtype
from fastformer.ops.checks import check_device, check_floating, check_shape
from fastformer.ops.dropout import apply_dropout_, check_dropout_p, draw_seed, dropout_threshold
from fastformer.ops.operator import operator

MAX_COLUMNS = 65536


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

    What is normalised is ``x = residual + dropout(input + input_bias)``, each part only if it is given.

    Args:
        input: (..., *normalized_shape), float32, float16 or bfloat16, any strides.
        normalized_shape: the trailing dimensions to normalise, 1 to 65,536 elements together.
        weight, bias: of `normalized_shape`; float32, float16 or bfloat16, not necessarily input's dtype.
        eps: added to the variance.
        residual: of input's shape; may be of another dtype, such as float32 beside a bfloat16 input.
        input_bias: of `normalized_shape`, added to the input: the bias of the projection that produced it.
        dropout_p: probability of dropping an element of ``input + input_bias``; the kept ones are scaled by
            ``1 / (1 - dropout_p)``. The pattern depends on PyTorch's generator and on the element's row and column
            only, not on backend or tile sizes; the backward draws it again.
        return_sum: with `residual`, return x too, as pre-norm layers need it; post-norm layers do not.

    Returns:
        The normalised tensor; with `residual`, unless `return_sum` is False, the pair (normalised, x). Both are of
        the dtype to which those of input and residual promote.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
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

    Arguments, results and errors as in `layer_norm`; `eps` is by default float32's machine epsilon, which PyTorch
    too uses for 16-bit inputs, whatever its documentation says.
    """
    eps = torch.finfo(torch.float32).eps if eps is None else eps
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
    columns = math.prod(shape)
    check_floating("input", input)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(f"normalized_shape must be the last dimensions of input {tuple(input.shape)}; got {shape}")
    if not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(f"normalized_shape must have 1 to {MAX_COLUMNS} elements; got {columns}")
    for name, parameter in (("weight", weight), ("bias", bias), ("input_bias", input_bias)):
        if parameter is not None:
            check_floating(name, parameter)
            check_shape(name, parameter, shape)
            check_device(name, parameter, "input", input)
    check_dropout_p(dropout_p)
    dtype = autocast_float32_dtype(input)
    if residual is not None:
        check_floating("residual", residual)
        check_shape("residual", residual, tuple(input.shape))
        check_device("residual", residual, "input", input)
        dtype = torch.promote_types(dtype, residual.dtype)
    tensors = (input, weight, bias, residual, input_bias)
    for_backward = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    is_sum = residual is not None or input_bias is not None or dropout_p > 0.0
    returns_sum = residual is not None and return_sum
    output, total, _, _ = _norm(
        input.reshape(-1, columns),
        None if residual is None else residual.reshape(-1, columns),
        None if weight is None else weight.reshape(-1),
        None if bias is None else bias.reshape(-1),
        None if input_bias is None else input_bias.reshape(-1),
        draw_seed(input.device) if dropout_p else None,
        eps,
        centered,
        dropout_p,
        dtype,
        is_sum and (returns_sum or for_backward),
    )
    # Not a view for autograd: FSDP2's hooks on a module's output do not survive in-place operations on views.
    output = torch.ops.aten._unsafe_view(output, input.shape)
    return (output, total.view(input.shape)) if returns_sum else output


@operator("fastformer::norm", mutates_args=())
def _norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    input_bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    centered: bool,
    dropout_p: float,
    dtype: torch.dtype,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, x (empty unless `keep_sum`), and the rows' mean and rstd."""
    if use_triton(input) and input.numel():
        from fastformer_kernels.normalization import norm_forward

        output, total, mean, rstd = norm_forward(
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
        return output, output.new_empty(0) if total is None else total, mean, rstd
    total = _sum_torch(input, residual, input_bias, seed, dropout_p, dtype)
    output, mean, rstd = norm_torch(total, weight, bias, eps, centered, dtype)
    if not keep_sum:
        return output, output.new_empty(0), mean, rstd
    # An operator's outputs may not be its inputs.
    return output, total.clone() if total.data_ptr() == input.data_ptr() else total, mean, rstd


@_norm.register_fake
def _(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    input_bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    centered: bool,
    dropout_p: float,
    dtype: torch.dtype,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output = input.new_empty(input.shape, dtype=dtype)
    rstd = input.new_empty(input.shape[0], dtype=torch.float32)
    return (
        output,
        torch.empty_like(output) if keep_sum else output.new_empty(0),
        torch.empty_like(rstd) if centered else rstd.new_zeros(1),
        rstd,
    )


@operator("fastformer::norm_backward", mutates_args=())
def _norm_backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    centered: bool,
    dropout_p: float,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_needs_grad: bool,
    bias_needs_grad: bool,
    input_bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, residual, weight, bias and input_bias; all but the first empty where not needed."""
    if use_triton(x) and x.numel():
        from fastformer_kernels.normalization import norm_backward

        grads: tuple[Tensor | None, ...] = norm_backward(
            grad_output,
            grad_sum,
            x,
            mean,
            rstd,
            weight,
            kernel_dropout(seed, dropout_p),
            centered=centered,
            input_dtype=input_dtype,
            residual_dtype=residual_dtype,
            weight_needs_grad=weight_needs_grad,
            bias_needs_grad=bias_needs_grad,
            input_bias_needs_grad=input_bias_needs_grad,
        )
    else:
        grad_x, grad_weight, grad_bias = norm_backward_torch(
            grad_output, x, mean, rstd, weight, centered, weight_needs_grad, bias_needs_grad
        )
        grad_input, grad_residual, grad_input_bias = _sum_backward_torch(
            grad_x, grad_sum, seed, dropout_p, input_dtype, residual_dtype, input_bias_needs_grad
        )
        grads = (grad_input, grad_residual, grad_weight, grad_bias, grad_input_bias)
    first, second, third, fourth, fifth = (rstd.new_empty(0) if grad is None else grad for grad in grads)
    return first, second, third, fourth, fifth


@_norm_backward.register_fake
def _(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    centered: bool,
    dropout_p: float,
    input_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    weight_needs_grad: bool,
    bias_needs_grad: bool,
    input_bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns = x.shape[1]
    return (
        x.new_empty(x.shape, dtype=input_dtype),
        rstd.new_empty(0) if residual_dtype is None else x.new_empty(x.shape, dtype=residual_dtype),
        rstd.new_empty(columns if weight_needs_grad else 0),
        rstd.new_empty(columns if bias_needs_grad else 0),
        rstd.new_empty(columns if input_bias_needs_grad else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, residual, weight, bias, input_bias, seed, _, ctx.centered, ctx.dropout_p, _, ctx.keep_sum = inputs
    ctx.input_dtype = input.dtype
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.input_bias_dtype = None if input_bias is None else input_bias.dtype
    ctx.save_for_backward(output[1] if ctx.keep_sum else input, output[2], output[3], weight, seed)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight, seed = ctx.saved_tensors
    if not ctx.keep_sum:
        grad_sum = None
    if grad_output is None and grad_sum is None:
        return (None,) * 11
    if grad_output is None:
        grad_output = x.new_zeros(()).expand(x.shape)
    _, residual_needs_grad, weight_needs_grad, bias_needs_grad, input_bias_needs_grad = ctx.needs_input_grad[:5]
    # Without dropout the two gradients differ in dtype only.
    one_gradient = seed is None and ctx.residual_dtype == ctx.input_dtype
    grad_input, grad_residual, grad_weight, grad_bias, grad_input_bias = _norm_backward(
        grad_output,
        grad_sum,
        x,
        mean,
        rstd,
        weight,
        seed,
        ctx.centered,
        ctx.dropout_p,
        ctx.input_dtype,
        ctx.residual_dtype if residual_needs_grad and not one_gradient else None,
        weight_needs_grad,
        bias_needs_grad,
        input_bias_needs_grad,
    )
    if one_gradient:
        grad_residual = grad_input
    return (
        grad_input,
        grad_residual if residual_needs_grad else None,
        grad_weight.to(weight.dtype) if weight_needs_grad else None,
        grad_bias.to(ctx.bias_dtype) if bias_needs_grad else None,
        grad_input_bias.to(ctx.input_bias_dtype) if input_bias_needs_grad else None,
        *(None,) * 6,
    )


_norm.register_autograd(_backward, setup_context=_setup_context)


def kernel_dropout(seed: Tensor | None, dropout_p: float) -> Any:
    """The kernels' description of dropout; None without a seed."""
    from fastformer_kernels.normalization import Dropout

    return None if seed is None else Dropout(seed, dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p))


def _sum_torch(
    input: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
) -> Tensor:
    """What is normalised, contiguous and of `dtype`, rounded once."""
    if input_bias is None and seed is None:
        total = input if residual is None else input + residual
        return total.to(dtype).contiguous()
    total = input.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if input_bias is not None:
        total += input_bias
    if seed is not None:
        apply_dropout_(total, seed, dropout_p)
    if residual is not None:
        total += residual
    return total.to(dtype)


def norm_torch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    if centered:
        # PyTorch's kernel wants parameters of one dtype, the input's or float32.
        output, mean, rstd = torch.native_layer_norm(x, [x.shape[1]], _parameter(weight, x), _parameter(bias, x), eps)
        return output.contiguous(), mean.flatten().float(), rstd.flatten().float()
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    output = wide * rstd[:, None]
    if weight is not None:
        output *= weight
    return output.to(dtype).contiguous(), rstd.new_zeros(1), rstd


def _parameter(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(x.dtype if x.dtype == torch.float32 else torch.float32)


def norm_backward_torch(
    grad_output: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    centered: bool,
    weight_needs_grad: bool,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, float32."""
    if centered and x.dtype == torch.float32:
        # Only whether a bias is needed matters here, not its values: the weight stands in. Without a weight PyTorch's
        # function has no bias either.
        needed = [True, weight_needs_grad, bias_needs_grad and weight is not None]
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad_output.contiguous(),
            x.contiguous(),
            [x.shape[1]],
            mean[:, None],
            rstd[:, None],
            _parameter(weight, x),
            _parameter(weight, x),
            needed,
        )
        if bias_needs_grad and grad_bias is None:
            grad_bias = grad_output.sum(0)
        return grad_x, grad_weight, grad_bias
    dy, wide = grad_output.float(), x.float()
    normalised = (wide - mean[:, None] if centered else wide) * rstd[:, None]
    g = dy if weight is None else dy * weight
    grad_x = g - normalised * (g * normalised).mean(-1, keepdim=True)
    if centered:
        grad_x -= g.mean(-1, keepdim=True)
    return (
        grad_x.mul_(rstd[:, None]),
        (dy * normalised).sum(0) if weight_needs_grad else None,
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
    """Gradients of input, residual and input_bias (float32) from x's, float32, which may be overwritten."""
    if grad_sum is not None:
        grad_x = grad_x.add_(grad_sum)
    # Copied where dropout is about to change it, or where it would be the input's gradient too.
    shared = seed is not None or residual_dtype == input_dtype
    grad_residual = None if residual_dtype is None else grad_x.to(residual_dtype, copy=shared)
    if seed is not None:
        grad_x = apply_dropout_(grad_x, seed, dropout_p)
    grad_input_bias = grad_x.sum(0) if input_bias_needs_grad else None
    return grad_x.to(input_dtype).contiguous(), grad_residual, grad_input_bias
