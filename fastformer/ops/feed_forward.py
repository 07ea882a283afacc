"""The feed-forward block of a Transformer layer, classic and gated."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.backends import use_triton
from fastformer.ops.autocast import to_autocast_dtype
from fastformer.ops.checks import check_floating, check_like, check_shape

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "squared_relu", "identity")
_GELU_APPROXIMATION = {"gelu": "none", "gelu_tanh": "tanh"}


def feed_forward(
    input: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """Feed-forward: ``act(x up^T + up_bias) down^T + down_bias`` (Vaswani et al. 2017, equation 2).

    With `gate_weight`: ``(act(x gate^T + gate_bias) * (x up^T + up_bias)) down^T + down_bias`` (Shazeer 2020). For the
    backward it keeps the input and the pre-activations; the hidden layer is computed again.

    Args:
        input: (..., in_features), float32, float16 or bfloat16, any strides.
        up_weight: (intermediate_size, in_features), as in `torch.nn.Linear`.
        down_weight: (out_features, intermediate_size).
        up_bias: (intermediate_size,).
        down_bias: (out_features,).
        gate_weight: (intermediate_size, in_features); makes the block gated.
        gate_bias: (intermediate_size,); only with `gate_weight`.
        activation: relu, gelu (with erf), gelu_tanh, silu, squared_relu or identity.

    Returns:
        (..., out_features), of input's dtype (under autocast, the autocast dtype), accumulated in float32.

    Raises:
        TypeError: `input` is of another dtype, or a parameter's dtype is not input's.
        ValueError: an unknown activation, a shape that does not fit, another device, a gate's bias without its weight.

    >>> fastformer.feed_forward(torch.randn(2, 7, 16), torch.randn(64, 16), torch.randn(16, 64)).shape
    torch.Size([2, 7, 16])
    """
    input, up_weight, down_weight = (
        to_autocast_dtype(input),
        to_autocast_dtype(up_weight),
        to_autocast_dtype(down_weight),
    )
    up_bias, down_bias = to_autocast_dtype(up_bias), to_autocast_dtype(down_bias)
    gate_weight, gate_bias = to_autocast_dtype(gate_weight), to_autocast_dtype(gate_bias)
    _check(input, up_weight, down_weight, up_bias, down_bias, gate_weight, gate_bias, activation)
    tensors = (input, up_weight, down_weight, up_bias, down_bias, gate_weight, gate_bias)
    for_backward = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    output, _, _ = _feed_forward(
        input.reshape(math.prod(input.shape[:-1]), input.shape[-1]),
        up_weight,
        down_weight,
        up_bias,
        down_bias,
        gate_weight,
        gate_bias,
        activation,
        for_backward,
    )
    return output.view(*input.shape[:-1], down_weight.shape[0])


def _check(
    input: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    check_floating("input", input)
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, (..., in_features); got a scalar")
    for name, weight in (("up_weight", up_weight), ("down_weight", down_weight)):
        if weight.dim() != 2:
            raise ValueError(f"{name} must have two dimensions, (out_features, in_features); got {tuple(weight.shape)}")
    if gate_bias is not None and gate_weight is None:
        raise ValueError("gate_bias was given without gate_weight; give both, or neither for an ungated block")
    in_features, intermediate_size, out_features = input.shape[-1], up_weight.shape[0], down_weight.shape[0]
    for name, tensor, shape in (
        ("up_weight", up_weight, (intermediate_size, in_features)),
        ("down_weight", down_weight, (out_features, intermediate_size)),
        ("up_bias", up_bias, (intermediate_size,)),
        ("down_bias", down_bias, (out_features,)),
        ("gate_weight", gate_weight, (intermediate_size, in_features)),
        ("gate_bias", gate_bias, (intermediate_size,)),
    ):
        if tensor is not None:
            check_shape(name, tensor, shape)
            check_like(name, tensor, "input", input)


@torch.library.custom_op("fastformer::feed_forward", mutates_args=())
def _feed_forward(
    input: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (tokens, out_features) and the pre-activations of up and gate, each empty unless it is needed."""
    if _runs_kernel(input, up_weight):
        from fastformer_kernels.feed_forward import hidden_forward
    else:
        hidden_forward = _hidden_forward_torch
    hidden, up, gate = hidden_forward(input, up_weight, up_bias, gate_weight, gate_bias, activation, for_backward)
    empty = input.new_empty
    return F.linear(hidden, down_weight, down_bias), empty(0) if up is None else up, empty(0) if gate is None else gate


@_feed_forward.register_fake
def _(
    input: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    pre_activation = (input.shape[0], up_weight.shape[0])
    return (
        input.new_empty(input.shape[0], down_weight.shape[0]),
        input.new_empty(pre_activation if for_backward else 0),
        input.new_empty(pre_activation if for_backward and gate_weight is not None else 0),
    )


@torch.library.custom_op("fastformer::feed_forward_backward", mutates_args=())
def _feed_forward_backward(
    grad_output: Tensor,
    input: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_weight: Tensor | None,
    up: Tensor,
    gate: Tensor | None,
    activation: str,
    needs_grad: list[bool],
) -> list[Tensor]:
    """Gradients of those tensors, in the order of the forward's arguments, whose `needs_grad` is set."""
    needs_input, needs_up, needs_down, needs_up_bias, needs_down_bias, needs_gate, needs_gate_bias = needs_grad
    needs_pre_activations = needs_input or needs_up or needs_up_bias or needs_gate or needs_gate_bias
    grad_up = grad_gate = grad_input = None
    if needs_pre_activations and _runs_kernel(input, up_weight):
        from fastformer_kernels.feed_forward import hidden_backward

        grad_up, grad_gate, hidden = hidden_backward(grad_output, down_weight, up, gate, activation, needs_down)
        grad_down = _weight_gradient(grad_output, hidden)
        del hidden
    else:
        # The hidden layer is gone before the gradients of the pre-activations are there: never three of that size.
        grad_down = _weight_gradient(grad_output, _hidden_torch(up, gate, activation) if needs_down else None)
        if needs_pre_activations:
            grad_up, grad_gate = _hidden_backward_torch(grad_output, down_weight, up, gate, activation)
    if needs_input and grad_up is not None:
        grad_input = grad_up @ up_weight
        if grad_gate is not None and gate_weight is not None:
            grad_input.addmm_(grad_gate, gate_weight)
    gradients = (
        grad_input,
        _weight_gradient(grad_up, input if needs_up else None),
        grad_down,
        _bias_gradient(grad_up if needs_up_bias else None),
        _bias_gradient(grad_output if needs_down_bias else None),
        _weight_gradient(grad_gate, input if needs_gate else None),
        _bias_gradient(grad_gate if needs_gate_bias else None),
    )
    return [gradient for gradient in gradients if gradient is not None]


def _weight_gradient(grad_output: Tensor | None, input: Tensor | None) -> Tensor | None:
    return None if grad_output is None or input is None else grad_output.t() @ input


def _bias_gradient(grad_output: Tensor | None) -> Tensor | None:
    return None if grad_output is None else grad_output.sum(0)


@_feed_forward_backward.register_fake
def _(
    grad_output: Tensor,
    input: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate_weight: Tensor | None,
    up: Tensor,
    gate: Tensor | None,
    activation: str,
    needs_grad: list[bool],
) -> list[Tensor]:
    out_features, intermediate_size = down_weight.shape
    bias = (intermediate_size,)
    shapes = (input.shape, up_weight.shape, down_weight.shape, bias, (out_features,), up_weight.shape, bias)
    return [input.new_empty(shape) for shape, needed in zip(shapes, needs_grad, strict=True) if needed]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, up_weight, down_weight, _, _, gate_weight, _, activation, _ = inputs
    _, up, gate = output
    ctx.activation = activation
    ctx.save_for_backward(input, up_weight, down_weight, gate_weight, up, None if gate_weight is None else gate)
    ctx.mark_non_differentiable(up, gate)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    needs_grad = list(ctx.needs_input_grad[:7])
    gradients = iter(_feed_forward_backward(grad_output, *ctx.saved_tensors, ctx.activation, needs_grad))
    return *(next(gradients) if needed else None for needed in needs_grad), None, None


_feed_forward.register_autograd(_backward, setup_context=_setup_context)


def _runs_kernel(input: Tensor, up_weight: Tensor) -> bool:
    return use_triton(input) and input.shape[0] > 0 and up_weight.shape[0] > 0


def _hidden_forward_torch(
    input: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    store_pre_activations: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    up = F.linear(input, up_weight, up_bias)
    gate = None if gate_weight is None else F.linear(input, gate_weight, gate_bias)
    if store_pre_activations:
        return _hidden_torch(up, gate, activation), up, gate
    if gate is None:
        return _activate(up, activation, out=up), None, None
    return _activate(gate, activation, out=gate).mul_(up), None, None


def _hidden_torch(up: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    if gate is None:
        return _activate(up, activation, out=torch.empty_like(up))
    return _activate(gate, activation, out=torch.empty_like(gate)).mul_(up)


def _hidden_backward_torch(
    grad_output: Tensor, down_weight: Tensor, up: Tensor, gate: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the pre-activations `up` and `gate`."""
    grad_hidden = grad_output @ down_weight
    if gate is None:
        return _activate_backward(grad_hidden, up, activation), None
    grad_up = _activate(gate, activation, out=torch.empty_like(gate)).mul_(grad_hidden)
    return grad_up, _activate_backward(grad_hidden.mul_(up), gate, activation)


def _activate(x: Tensor, activation: str, out: Tensor) -> Tensor:
    """The activation of `x`, written to `out`, which may be `x`."""
    aten = torch.ops.aten
    if activation == "relu":
        return torch.clamp_min(x, 0, out=out)
    if activation == "squared_relu":
        return torch.clamp_min(x, 0, out=out).square_()
    if activation == "silu":
        return aten.silu.out(x, out=out)
    if activation == "identity":
        return out.copy_(x)
    return aten.gelu.out(x, approximate=_GELU_APPROXIMATION[activation], out=out)


def _activate_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of `x`, in place of `grad`, that of its activation."""
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)
    if activation == "squared_relu":
        return grad.mul_(torch.clamp_min(x, 0)).mul_(2)
    if activation == "silu":
        return aten.silu_backward.grad_input(grad, x, grad_input=grad)
    if activation == "identity":
        return grad
    return aten.gelu_backward.grad_input(grad, x, approximate=_GELU_APPROXIMATION[activation], grad_input=grad)
