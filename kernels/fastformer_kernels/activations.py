"""The feed-forward activations and their derivatives, on tiles in float32."""

from __future__ import annotations

import triton
import triton.language as tl

from fastformer_kernels.constants import LOG2_E

HALF_LOG2_E = tl.constexpr(0.7213475204444817)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)
TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
GELU_CUBIC = tl.constexpr(0.044715)
GELU_CUBIC_SLOPE = tl.constexpr(3 * 0.044715)


@triton.jit
def _sigmoid(x):
    """Compute 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def _gelu_tanh_gate(x):
    """Compute (1 + tanh(u)) / 2 = sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3): one exponential, no NaN."""
    return _sigmoid(x * (1.0 + x * x * GELU_CUBIC) * TWO_SQRT_2_OVER_PI)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of float32 `x`. NaN gives NaN: ReLU compares with <=, which is false for NaN."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, x)
    elif ACTIVATION == "gelu":
        return x * (0.5 + 0.5 * tl.math.erf(x * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        return x * _gelu_tanh_gate(x)
    elif ACTIVATION == "silu":
        return x * _sigmoid(x)
    elif ACTIVATION == "squared_relu":
        positive = tl.where(x <= 0.0, 0.0, x)
        return positive * positive
    else:
        tl.static_assert(ACTIVATION == "identity")
        return x


@triton.jit
def activation_derivative(x, ACTIVATION: tl.constexpr):
    """The derivative of the activation at float32 `x`. For ReLU at zero it is 0, as in PyTorch."""
    if ACTIVATION == "relu":
        return tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        density = tl.exp2(x * x * -HALF_LOG2_E) * INVERSE_SQRT_2_PI
        return 0.5 + 0.5 * tl.math.erf(x * SQRT_HALF) + x * density
    elif ACTIVATION == "gelu_tanh":
        s = _gelu_tanh_gate(x)
        return s + x * s * (1.0 - s) * TWO_SQRT_2_OVER_PI * (1.0 + x * x * GELU_CUBIC_SLOPE)
    elif ACTIVATION == "silu":
        s = _sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "squared_relu":
        return 2.0 * tl.where(x <= 0.0, 0.0, x)
    else:
        tl.static_assert(ACTIVATION == "identity")
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def hidden_of(up, gate, ACTIVATION: tl.constexpr):
    """The hidden layer from its pre-activations; `gate` is None where there is none."""
    if gate is None:
        return activate(up, ACTIVATION)
    else:
        return activate(gate, ACTIVATION) * up


@triton.jit
def gradients_of(grad_hidden, up, gate, ACTIVATION: tl.constexpr):
    """The gradients of up and gate from that of the hidden layer. Without a gate, the gradient of up twice."""
    if gate is None:
        grad_up = grad_hidden * activation_derivative(up, ACTIVATION)
        return grad_up, grad_up
    else:
        return (
            grad_hidden * activate(gate, ACTIVATION),
            grad_hidden * up * activation_derivative(gate, ACTIVATION),
        )
