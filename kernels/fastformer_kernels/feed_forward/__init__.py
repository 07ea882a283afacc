"""The feed-forward block. Each part follows the faster of two plans: one kernel, or a library's product and one pass.

Pre-activations include their bias in both plans, so that forward and backward may follow different plans.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastformer_kernels.dropout import Dropout
from fastformer_kernels.feed_forward import elementwise, fused
from fastformer_kernels.plans import Operation, is_fused


def hidden_forward(
    input: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor | None,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    activation: str,
    dropout: Dropout | None,
    store_pre_activations: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The hidden layer from `input` (tokens, in_features) and weights (intermediate_size, in_features), any strides.

    Returns:
        The hidden layer (tokens, intermediate_size) and the pre-activations of up and gate, each None unless it exists
        and `store_pre_activations` is set; all contiguous, of `input`'s dtype.
    """
    operation: Operation = "hidden_forward" if gate_weight is None else "gated_hidden_forward"
    if is_fused(operation, input, depth=input.shape[1]):
        return fused.hidden_forward(
            input, up_weight, up_bias, gate_weight, gate_bias, activation, dropout, store_pre_activations
        )
    up = F.linear(input, up_weight, up_bias)
    gate = None if gate_weight is None else F.linear(input, gate_weight, gate_bias)
    hidden = torch.empty_like(up) if store_pre_activations else up
    elementwise.activation_forward(up, gate, activation, dropout, hidden)
    return hidden, up if store_pre_activations else None, gate if store_pre_activations else None


def output_forward(
    hidden: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dropout: Dropout | None,
) -> torch.Tensor:
    """The block's output (tokens, out_features), contiguous, from `hidden` (tokens, intermediate_size).

    Args:
        down_weight: (out_features, intermediate_size), any strides.
        residual: (tokens, out_features), floating, any strides. The output has the wider of its dtype and hidden's.
    """
    if residual is None and dropout is None:
        return F.linear(hidden, down_weight, down_bias)
    if is_fused("output_forward", hidden, depth=hidden.shape[1]):
        return fused.output_forward(hidden, down_weight, down_bias, residual, dropout)
    return elementwise.bias_dropout_residual(hidden @ down_weight.T, down_bias, residual, dropout)


def hidden_backward(
    grad_output: torch.Tensor,
    down_weight: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor | None,
    activation: str,
    dropout: Dropout | None,
    store_hidden: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the pre-activations `up` and `gate` (tokens, intermediate_size; contiguous), and the hidden layer.

    Args:
        grad_output: (tokens, out_features), any strides.
        down_weight: (out_features, intermediate_size), any strides.

    Returns:
        The gradient of `up`, the gradient of `gate` (None without a gate) and the recomputed hidden layer (None unless
        `store_hidden` is set), all shaped like `up`.
    """
    operation: Operation = "hidden_backward" if gate is None else "gated_hidden_backward"
    if is_fused(operation, up, depth=grad_output.shape[1]):
        return fused.hidden_backward(grad_output, down_weight, up, gate, activation, dropout, store_hidden)
    return elementwise.activation_backward(grad_output @ down_weight, up, gate, activation, dropout, store_hidden)


apply_dropout = elementwise.apply_dropout

__all__ = ["apply_dropout", "hidden_backward", "hidden_forward", "output_forward"]
