"""LayerNorm and RMSNorm, with the residual addition that precedes them in a Transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from fastformer.backends import use_triton
from fastformer.ops.autocast import to_autocast_float32
from fastformer.ops.checks import check_device, check_floating, check_like, check_shape

MAX_COLUMNS = 65536


@overload
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: None = None,
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
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last dimensions: ``(x - mean) / sqrt(var + eps) * weight + bias`` (Ba et al. 2016).

    Args:
        input: (..., *normalized_shape), float32, float16 or bfloat16, any strides.
        normalized_shape: the trailing dimensions to normalise, 1 to 65,536 elements together.
        weight, bias: of `normalized_shape`; float32, float16 or bfloat16, not necessarily input's dtype.
        eps: added to the variance.
        residual: like `input`; when given, ``input + residual`` is normalised.

    Returns:
        The normalised tensor in input's dtype; with `residual` the pair (normalised, ``input + residual``).

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is accepted.
    """
    return _normalize(input, normalized_shape, weight, bias, eps, residual, centered=True)


@overload
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    residual: None = None,
) -> Tensor: ...
@overload
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimensions: ``x / sqrt(mean(x^2) + eps) * weight`` (Zhang and Sennrich 2019).

    Arguments, results and errors as in `layer_norm`; `eps` is by default float32's machine epsilon, which PyTorch
    too uses for 16-bit inputs, whatever its documentation says.
    """
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return _normalize(input, normalized_shape, weight, None, eps, residual, centered=False)


def _normalize(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    centered: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    shape = tuple(normalized_shape)
    columns = math.prod(shape)
    check_floating("input", input)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(f"normalized_shape must be the last dimensions of input {tuple(input.shape)}; got {shape}")
    if not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(f"normalized_shape must have 1 to {MAX_COLUMNS} elements; got {columns}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_floating(name, parameter)
            check_shape(name, parameter, shape)
            check_device(name, parameter, "input", input)
    if residual is not None:
        check_like("residual", residual, "input", input)
        check_shape("residual", residual, tuple(input.shape))
    output, total, _, _ = _norm(
        to_autocast_float32(input).reshape(-1, columns),
        None if residual is None else to_autocast_float32(residual).reshape(-1, columns),
        None if weight is None else weight.reshape(-1),
        None if bias is None else bias.reshape(-1),
        eps,
        centered,
    )
    output = output.view(input.shape)
    return output if residual is None else (output, total.view(input.shape))


@torch.library.custom_op("fastformer::norm", mutates_args=())
def _norm(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if use_triton(input) and input.numel():
        from fastformer_kernels.normalization import norm_forward as forward
    else:
        forward = _norm_torch
    output, total, mean, rstd = forward(input, residual, weight, bias, eps, centered)
    return output, input.new_empty(0) if total is None else total, mean, rstd


@_norm.register_fake
def _(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    output = torch.empty_like(input, memory_format=torch.contiguous_format)
    total = input.new_empty(0) if residual is None else torch.empty_like(output)
    rstd = input.new_empty(input.shape[0], dtype=torch.float32)
    return output, total, torch.empty_like(rstd) if centered else rstd.new_zeros(1), rstd


@torch.library.custom_op("fastformer::norm_backward", mutates_args=())
def _norm_backward(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    centered: bool,
    weight_needs_grad: bool,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if use_triton(input) and input.numel():
        from fastformer_kernels.normalization import norm_backward as backward
    else:
        backward = _norm_backward_torch
    grad_input, grad_weight, grad_bias = backward(
        grad_output, grad_sum, input, mean, rstd, weight, centered, weight_needs_grad, bias_needs_grad
    )
    return (
        grad_input,
        rstd.new_empty(0) if grad_weight is None else grad_weight,
        rstd.new_empty(0) if grad_bias is None else grad_bias,
    )


@_norm_backward.register_fake
def _(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    centered: bool,
    weight_needs_grad: bool,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    columns = input.shape[1]
    return (
        torch.empty_like(input, memory_format=torch.contiguous_format),
        rstd.new_empty(columns if weight_needs_grad else 0),
        rstd.new_empty(columns if bias_needs_grad else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, residual, weight, bias, _, centered = inputs
    ctx.centered = centered
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_residual = residual is not None
    ctx.save_for_backward(input if residual is None else output[1], output[2], output[3], weight)
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight = ctx.saved_tensors
    if not ctx.has_residual:
        grad_sum = None
    if grad_output is None:
        return grad_sum, grad_sum, None, None, None, None
    _, residual_needs_grad, weight_needs_grad, bias_needs_grad = ctx.needs_input_grad[:4]
    grad_input, grad_weight, grad_bias = _norm_backward(
        grad_output, grad_sum, x, mean, rstd, weight, ctx.centered, weight_needs_grad, bias_needs_grad
    )
    return (
        grad_input,
        grad_input if residual_needs_grad else None,
        grad_weight.to(weight.dtype) if weight_needs_grad else None,
        grad_bias.to(ctx.bias_dtype) if bias_needs_grad else None,
        None,
        None,
    )


_norm.register_autograd(_backward, setup_context=_setup_context)


def _norm_torch(
    input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, centered: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    total = None if residual is None else (input + residual).contiguous()
    x = input if total is None else total
    if centered:
        # PyTorch's kernel wants parameters of one dtype, the input's or float32.
        output, mean, rstd = torch.native_layer_norm(x, [x.shape[1]], _parameter(weight, x), _parameter(bias, x), eps)
        return output.contiguous(), total, mean.flatten().float(), rstd.flatten().float()
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    output = wide * rstd[:, None]
    if weight is not None:
        output *= weight
    return output.to(x.dtype).contiguous(), total, rstd.new_zeros(1), rstd


def _parameter(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(x.dtype if x.dtype == torch.float32 else torch.float32)


def _norm_backward_torch(
    grad_output: Tensor,
    grad_sum: Tensor | None,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    centered: bool,
    weight_needs_grad: bool,
    bias_needs_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if centered and input.dtype == torch.float32:
        needed = [True, weight_needs_grad, bias_needs_grad]
        # Only whether a bias is needed matters here, not its values: the weight stands in.
        grad_input, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad_output.contiguous(),
            input.contiguous(),
            [input.shape[1]],
            mean[:, None],
            rstd[:, None],
            _parameter(weight, input),
            _parameter(weight, input),
            needed,
        )
        if bias_needs_grad and grad_bias is None:
            grad_bias = grad_output.sum(0)
    else:
        dy, x = grad_output.float(), input.float()
        normalised = (x - mean[:, None] if centered else x) * rstd[:, None]
        g = dy if weight is None else dy * weight
        wide = g - normalised * (g * normalised).mean(-1, keepdim=True)
        if centered:
            wide -= g.mean(-1, keepdim=True)
        grad_input = wide.mul_(rstd[:, None])
        grad_weight = (dy * normalised).sum(0) if weight_needs_grad else None
        grad_bias = dy.sum(0) if bias_needs_grad else None
    if grad_sum is not None:
        grad_input = grad_input + grad_sum
    return grad_input.to(input.dtype).contiguous(), grad_weight, grad_bias
