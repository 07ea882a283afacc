"""The feed-forward network as a module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastformer.nn.plain import is_plain_linear
from fastformer.ops.dropout import check_dropout_p
from fastformer.ops.feed_forward import feed_forward

Activation = Callable[[torch.Tensor], torch.Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "squared_relu": lambda input: F.relu(input).square(),
    "identity": lambda input: input,
}


class FeedForward(nn.Module):
    """The feed-forward block, fused: ``down(act(up(x)))``, or gated ``down(act(gate(x)) * up(x))`` (Shazeer 2020).

    Args:
        hidden_size: size of the last dimension of input and output.
        intermediate_size: size between the two projections.
        activation: relu, gelu, gelu_tanh, silu, squared_relu or identity.
        gated: add a third projection, `gate`, as in the GLU variants.
        bias: whether the projections have biases.
        device, dtype: of the parameters.
        hidden_dropout: probability of dropping an element between the projections, in training.
        dropout: the same for elements of the output, before a residual is added.
        recompute: keep no pre-activations for the backward, which computes them again.

    Shapes: (..., hidden_size) to (..., hidden_size). The projections `up`, `down` and `gate` are `nn.Linear`. One that
    is replaced by another module (LoRA, quantisation) is called, so that its effect is never lost. The block then runs
    in unfused steps, which keep for the backward what PyTorch keeps, even with `recompute`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        hidden_dropout: float = 0.0,
        dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
        check_dropout_p(hidden_dropout, "hidden_dropout")
        check_dropout_p(dropout, "dropout")
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.activation = activation
        self.hidden_dropout = hidden_dropout
        self.dropout = dropout
        self.recompute = recompute
        self.up = nn.Linear(hidden_size, intermediate_size, **factory)
        self.gate = nn.Linear(hidden_size, intermediate_size, **factory) if gated else None
        self.down = nn.Linear(intermediate_size, hidden_size, **factory)

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Transform `input` (..., hidden_size) and add `residual`, of the same shape; the output has this shape too."""
        up, gate, down = self.up, self.gate, self.down
        if not is_plain_linear(up, down) or not (gate is None or is_plain_linear(gate)):
            activation = ACTIVATIONS[self.activation]
            hidden = activation(up(input)) if gate is None else activation(gate(input)) * up(input)
            hidden = F.dropout(hidden, self.hidden_dropout, self.training)
            output = F.dropout(down(hidden), self.dropout, self.training)
            return output if residual is None else output + residual
        return feed_forward(
            input,
            up.weight,
            down.weight,
            up.bias,
            down.bias,
            None if gate is None else gate.weight,
            None if gate is None else gate.bias,
            activation=self.activation,
            hidden_dropout_p=self.hidden_dropout if self.training else 0.0,
            output_dropout_p=self.dropout if self.training else 0.0,
            residual=residual,
            recompute=self.recompute,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}, hidden_dropout={self.hidden_dropout}, dropout={self.dropout}"
