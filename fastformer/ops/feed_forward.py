"""The feed-forward block of a Transformer layer, classic and gated."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.backends import use_triton
from fastformer.ops.autocast import autocast_device_type, to_autocast_dtype
from fastformer.ops.checks import check_device, check_floating, check_like, check_shape
from fastformer.ops.dropout import apply_dropout_, check_dropout_p, draw_seed, dropped, kernel_dropout
from fastformer.ops.operator import operator, vjp

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
    *,
    hidden_dropout_p: float = 0.0,
    output_dropout_p: float = 0.0,
    residual: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Feed-forward: ``act(x up^T + up_bias) down^T + down_bias`` (Vaswani et al. 2017, equation 2).

    With `gate_weight`: ``(act(x gate^T + gate_bias) * (x up^T + up_bias)) down^T + down_bias`` (Shazeer 2020). For the
    backward it keeps the input and the pre-activations, and computes the hidden layer and the dropout masks again.

    Args:
        input: (..., in_features), float32, float16 or bfloat16, any strides.
        up_weight: (intermediate_size, in_features), as in `torch.nn.Linear`.
        down_weight: (out_features, intermediate_size).
        up_bias: (intermediate_size,).
        down_bias: (out_features,).
        gate_weight: (intermediate_size, in_features); makes the block gated.
        gate_bias: (intermediate_size,); only with `gate_weight`.
        activation: relu, gelu (with erf), gelu_tanh, silu, squared_relu or identity.
        hidden_dropout_p: probability of dropping an element between the projections; the kept ones are scaled by
            ``1 / (1 - p)``. Applied whenever it is not zero.
        output_dropout_p: the same, after the second projection.
        residual: (..., out_features), floating; added last, with its gradient.
        recompute: keep no pre-activations. The backward computes them again: this costs one more product (two if
            gated) and saves intermediate_size (2 intermediate_size) elements per token.

    Returns:
        (..., out_features), in input's dtype (under autocast, the autocast dtype), or in residual's if that is wider;
        accumulated in float32.

    Raises:
        TypeError: `input` has an unsupported dtype, or a parameter's dtype is not input's.
        ValueError: an unknown activation, a wrong shape, a different device, a gate bias without a gate weight,
            a probability outside [0, 1].

    >>> fastformer.feed_forward(torch.randn(2, 7, 16), torch.randn(64, 16), torch.randn(16, 64)).shape
    torch.Size([2, 7, 16])
    """
    if torch.is_autocast_enabled(autocast_device_type(input)):
        input, up_weight, down_weight = map(to_autocast_dtype, (input, up_weight, down_weight))
        up_bias, down_bias = to_autocast_dtype(up_bias), to_autocast_dtype(down_bias)
        gate_weight, gate_bias = to_autocast_dtype(gate_weight), to_autocast_dtype(gate_bias)
    _check(input, up_weight, down_weight, up_bias, down_bias, gate_weight, gate_bias, activation)
    check_dropout_p(hidden_dropout_p, "hidden_dropout_p")
    check_dropout_p(output_dropout_p, "output_dropout_p")
    shape = input.shape
    output_shape = (*shape[:-1], down_weight.shape[0])
    if residual is not None:
        check_floating("residual", residual)
        check_device("residual", residual, "input", input)
        check_shape("residual", residual, output_shape)
    store_pre_activations = False
    if not recompute and torch.is_grad_enabled():
        tensors = (input, up_weight, down_weight, up_bias, down_bias, gate_weight, gate_bias)
        store_pre_activations = True in [tensor is not None and tensor.requires_grad for tensor in tensors]
    is_matrix = len(shape) == 2
    if not is_matrix:
        tokens = math.prod(shape[:-1])
        input = input.reshape(tokens, shape[-1])
        residual = None if residual is None else residual.reshape(tokens, output_shape[-1])
    # A compiler would not compute again what it has.
    call = _feed_forward.call_as_one_node if recompute and torch.compiler.is_compiling() else _feed_forward
    output, _, _ = call(
        input,
        up_weight,
        down_weight,
        up_bias,
        down_bias,
        gate_weight,
        gate_bias,
        residual,
        draw_seed(input.device) if hidden_dropout_p else None,
        draw_seed(input.device) if output_dropout_p else None,
        activation,
        hidden_dropout_p,
        output_dropout_p,
        store_pre_activations,
    )
    # Autograd must not see a view: FSDP2's hooks on a module's output do not survive in-place operations on views.
    return output if is_matrix else torch.ops.aten._unsafe_view(output, output_shape)


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
    if up_weight.dim() != 2 or down_weight.dim() != 2:
        name, weight = ("down_weight", down_weight) if up_weight.dim() == 2 else ("up_weight", up_weight)
        raise ValueError(f"{name} must have two dimensions, (out_features, in_features); got {tuple(weight.shape)}")
    if gate_bias is not None and gate_weight is None:
        raise ValueError("gate_bias was given without gate_weight; give both, or neither for an ungated block")
    dtype, device = input.dtype, input.device
    intermediate_size, in_features, out_features = up_weight.shape[0], input.shape[-1], down_weight.shape[0]
    for name, tensor, shape in (
        ("up_weight", up_weight, (intermediate_size, in_features)),
        ("down_weight", down_weight, (out_features, intermediate_size)),
        ("up_bias", up_bias, (intermediate_size,)),
        ("down_bias", down_bias, (out_features,)),
        ("gate_weight", gate_weight, (intermediate_size, in_features)),
        ("gate_bias", gate_bias, (intermediate_size,)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != device):
            check_shape(name, tensor, shape)
            check_like(name, tensor, "input", input)


class _FeedForward(NamedTuple):
    """One call's arguments. `input` is (tokens, in_features); a seed is None if nothing is dropped."""

    input: Tensor
    up_weight: Tensor
    down_weight: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    residual: Tensor | None
    hidden_seed: Tensor | None
    output_seed: Tensor | None
    activation: str
    hidden_dropout_p: float
    output_dropout_p: float
    store_pre_activations: bool


@operator("fastformer::feed_forward", mutates_args=())
def _feed_forward(call: _FeedForward) -> tuple[Tensor, Tensor, Tensor]:
    """The output (tokens, out_features) and the pre-activations of up and gate, each empty if it is not stored."""
    projections = (call.input, call.up_weight, call.up_bias, call.gate_weight, call.gate_bias)
    if _runs_kernel(call.input, call.up_weight, call.down_weight):
        from fastformer_kernels.feed_forward import hidden_forward, output_forward

        dropout = kernel_dropout(call.hidden_seed, call.hidden_dropout_p)
        hidden, up, gate = hidden_forward(*projections, call.activation, dropout, call.store_pre_activations)
        dropout = kernel_dropout(call.output_seed, call.output_dropout_p)
        output = output_forward(hidden, call.down_weight, call.down_bias, call.residual, dropout)
    else:
        hidden, up, gate = _hidden_forward_torch(*projections, call.activation, call.store_pre_activations)
        if call.hidden_seed is not None:
            apply_dropout_(hidden, call.hidden_seed, call.hidden_dropout_p)
        output = F.linear(hidden, call.down_weight, call.down_bias)
        if call.output_seed is not None:
            apply_dropout_(output, call.output_seed, call.output_dropout_p)
        if call.residual is not None and call.residual.dtype == output.dtype:
            output.add_(call.residual)
        elif call.residual is not None:
            output = (output + call.residual).contiguous()
    empty = call.input.new_empty
    return output, empty(0) if up is None else up, empty(0) if gate is None else gate


@_feed_forward.register_fake
def _(call: _FeedForward) -> tuple[Tensor, Tensor, Tensor]:
    dtype = call.input.dtype if call.residual is None else torch.promote_types(call.input.dtype, call.residual.dtype)
    pre_activation = (call.input.shape[0], call.up_weight.shape[0])
    return (
        call.input.new_empty(call.input.shape[0], call.down_weight.shape[0], dtype=dtype),
        call.input.new_empty(pre_activation if call.store_pre_activations else 0),
        call.input.new_empty(pre_activation if call.store_pre_activations and call.gate_weight is not None else 0),
    )


@_feed_forward.register_formula
def _formula(call: _FeedForward) -> tuple[Tensor, Tensor, Tensor]:
    hidden = F.linear(call.input, call.up_weight, call.up_bias)
    if call.gate_weight is None:
        hidden = _activate(hidden, call.activation)
    else:
        hidden = hidden * _activate(F.linear(call.input, call.gate_weight, call.gate_bias), call.activation)
    if call.hidden_seed is not None:
        hidden = dropped(hidden, call.hidden_seed, call.hidden_dropout_p)
    output = F.linear(hidden, call.down_weight, call.down_bias)
    if call.output_seed is not None:
        output = dropped(output, call.output_seed, call.output_dropout_p)
    if call.residual is not None:
        output = output + call.residual
    # Pre-activations are stored for the operator's derivative; a formula does not need them.
    return output, call.input.new_empty(0), call.input.new_empty(0)


FeedForwardGradients = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]


class _FeedForwardBackward(NamedTuple):
    """One call's arguments of the derivative. Pre-activations `up` and `gate` are computed again if they are None."""

    grad_output: Tensor
    input: Tensor
    up_weight: Tensor
    down_weight: Tensor
    up_bias: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    up: Tensor | None
    gate: Tensor | None
    hidden_seed: Tensor | None
    output_seed: Tensor | None
    activation: str
    hidden_dropout_p: float
    output_dropout_p: float
    needs_grad: list[bool]


@operator("fastformer::feed_forward_backward", mutates_args=())
def _feed_forward_backward(call: _FeedForwardBackward) -> FeedForwardGradients:
    """The gradients, in the order of the forward's arguments, of the tensors whose `needs_grad` is set."""
    up, gate = call.up, call.gate
    needs_input, needs_up, needs_down, needs_up_bias, needs_down_bias, needs_gate, needs_gate_bias = call.needs_grad
    needs_pre_activations = needs_input or needs_up or needs_up_bias or needs_gate or needs_gate_bias
    if up is None and (needs_pre_activations or needs_down):
        up = F.linear(call.input, call.up_weight, call.up_bias)
        gate = None if call.gate_weight is None else F.linear(call.input, call.gate_weight, call.gate_bias)
    grad_product = _product_gradient(call.grad_output, call.input, call.output_seed, call.output_dropout_p)
    grad_up = grad_gate = grad_input = grad_down = None
    if up is not None and needs_pre_activations and _runs_kernel(call.input, call.up_weight, call.down_weight):
        from fastformer_kernels.feed_forward import hidden_backward

        dropout = kernel_dropout(call.hidden_seed, call.hidden_dropout_p)
        grad_up, grad_gate, hidden = hidden_backward(
            grad_product, call.down_weight, up, gate, call.activation, dropout, needs_down
        )
        grad_down = _weight_gradient(grad_product, hidden)
        del hidden
    elif up is not None:
        # Free the hidden layer before the pre-activations' gradients are allocated, to hold fewer tensors of that size.
        if needs_down:
            hidden = _hidden_torch(up, gate, call.activation)
            if call.hidden_seed is not None:
                apply_dropout_(hidden, call.hidden_seed, call.hidden_dropout_p)
            grad_down = _weight_gradient(grad_product, hidden)
            del hidden
        if needs_pre_activations:
            grad_hidden = torch.mm(grad_product, call.down_weight)
            if call.hidden_seed is not None:
                apply_dropout_(grad_hidden, call.hidden_seed, call.hidden_dropout_p)
            grad_up, grad_gate = _hidden_backward_torch(grad_hidden, up, gate, call.activation)
    if needs_input and grad_up is not None:
        grad_input = torch.mm(grad_up, call.up_weight)
        if grad_gate is not None and call.gate_weight is not None:
            grad_input.addmm_(grad_gate, call.gate_weight)
    return (
        grad_input,
        _weight_gradient(grad_up, call.input if needs_up else None),
        grad_down,
        _bias_gradient(grad_up if needs_up_bias else None),
        _bias_gradient(grad_product if needs_down_bias else None),
        _weight_gradient(grad_gate, call.input if needs_gate else None),
        _bias_gradient(grad_gate if needs_gate_bias else None),
    )


def _product_gradient(grad_output: Tensor, input: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """The gradient of the second projection's result before dropout, in the products' dtype."""
    if seed is None:
        return grad_output if grad_output.dtype == input.dtype else grad_output.to(input.dtype)
    if use_triton(input) and grad_output.numel():
        from fastformer_kernels.feed_forward import apply_dropout

        return apply_dropout(grad_output, kernel_dropout(seed, dropout_p), input.dtype)
    gradient = torch.empty(grad_output.shape, dtype=input.dtype, device=input.device)
    return apply_dropout_(gradient.copy_(grad_output), seed, dropout_p)


def _weight_gradient(grad_output: Tensor | None, input: Tensor | None) -> Tensor | None:
    return None if grad_output is None or input is None else torch.mm(grad_output.t(), input)


def _bias_gradient(grad_output: Tensor | None) -> Tensor | None:
    return None if grad_output is None else grad_output.sum(0)


@_feed_forward_backward.register_fake
def _(call: _FeedForwardBackward) -> tuple[Tensor | None, ...]:
    out_features, intermediate_size = call.down_weight.shape
    bias = (intermediate_size,)
    up_shape, down_shape = call.up_weight.shape, call.down_weight.shape
    shapes = (call.input.shape, up_shape, down_shape, bias, (out_features,), up_shape, bias)
    empty, needs_grad = call.input.new_empty, call.needs_grad
    return tuple(empty(shape) if need else None for shape, need in zip(shapes, needs_grad, strict=True))


@_feed_forward_backward.register_formula
def _(call: _FeedForwardBackward) -> tuple[Tensor | None, ...]:
    # No gradient depends on the second bias.
    down_bias = call.down_weight.new_zeros(call.down_weight.shape[0])
    options = (call.activation, call.hidden_dropout_p, call.output_dropout_p, False)

    def output(*tensors: Any) -> tuple[Tensor]:
        return (_formula(*tensors, None, call.hidden_seed, call.output_seed, *options)[0],)

    tensors = (call.input, call.up_weight, call.down_weight, call.up_bias, down_bias, call.gate_weight, call.gate_bias)
    gradients = vjp(output, tensors, [call.grad_output])
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, call.needs_grad, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    call = _FeedForward._make(inputs)
    _, up, gate = output
    ctx.options = (call.activation, call.hidden_dropout_p, call.output_dropout_p)
    ctx.residual_dtype = None if call.residual is None else call.residual.dtype
    ctx.save_for_backward(
        call.input,
        call.up_weight,
        call.down_weight,
        call.up_bias,
        call.gate_weight,
        call.gate_bias,
        up if call.store_pre_activations else None,
        gate if call.store_pre_activations and call.gate_weight is not None else None,
        call.hidden_seed,
        call.output_seed,
    )
    ctx.mark_non_differentiable(up, gate)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * len(_FeedForward._fields)
    *needs_grad, needs_residual = ctx.needs_input_grad[:8]
    gradients: tuple[Tensor | None, ...] = (None,) * len(needs_grad)
    if True in needs_grad:
        gradients = _feed_forward_backward(grad_output, *ctx.saved_tensors, *ctx.options, needs_grad)
    return (
        *[gradient if needed else None for gradient, needed in zip(gradients, needs_grad, strict=True)],
        grad_output.to(ctx.residual_dtype) if needs_residual else None,
        *(None,) * 6,
    )


_feed_forward.register_autograd(_backward, setup_context=_setup_context)
_feed_forward.register_decomposition()


def _runs_kernel(input: Tensor, up_weight: Tensor, down_weight: Tensor) -> bool:
    return use_triton(input) and input.shape[0] > 0 and up_weight.shape[0] > 0 and down_weight.shape[0] > 0


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
    hidden = _hidden_torch(up, gate, activation, inplace=not store_pre_activations)
    return (hidden, up, gate) if store_pre_activations else (hidden, None, None)


def _hidden_torch(up: Tensor, gate: Tensor | None, activation: str, inplace: bool = False) -> Tensor:
    """Compute the hidden layer; with `inplace`, in the memory of `up` or `gate`."""
    return _activate(up, activation, inplace) if gate is None else _activate(gate, activation, inplace).mul_(up)


def _hidden_backward_torch(
    grad_hidden: Tensor, up: Tensor, gate: Tensor | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the pre-activations `up` and `gate`; `grad_hidden` is overwritten."""
    if gate is None:
        return _activate_backward(grad_hidden, up, activation), None
    grad_up = _activate(gate, activation).mul_(grad_hidden)
    return grad_up, _activate_backward(grad_hidden.mul_(up), gate, activation)


def _activate(x: Tensor, activation: str, inplace: bool = False) -> Tensor:
    """Apply the activation to `x`, in new memory or in place."""
    if activation in _GELU_APPROXIMATION:
        # Several times quicker to call than `torch.ops.aten.gelu.out`, with the same result.
        return F.gelu(x, approximate=_GELU_APPROXIMATION[activation], out=x if inplace else None)  # type: ignore[call-arg]
    if activation == "silu":
        return F.silu(x, inplace)
    if activation == "identity":
        return x if inplace else x.clone()
    x = F.relu(x, inplace)
    if activation == "squared_relu":
        # The gradient of relu needs its result, which would be overwritten.
        return x.square() if x.requires_grad else x.square_()
    return x


def _activate_backward(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """Turn `grad`, the gradient of the activation's result, into the gradient of `x`, in place."""
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
