"""The feed-forward block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from fastformer.registry.make import Make
from fastformer.registry.operator import Call, Operator

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def _inputs(
    make: Make,
    tokens: int = 40,
    features: int = 24,
    intermediate: int = 64,
    *,
    activation: str = "gelu",
    gated: bool = False,
    biases: bool = False,
    dropout_p: float = 0.0,
    scale: float = 1.0,
) -> Call:
    """Tokens, and weights that keep the variance of the tokens. With dropout there is also a residual."""
    tensors = {
        "input": make.normal(tokens, features, scale=scale),
        "up_weight": make.normal(intermediate, features, scale=features**-0.5),
        "down_weight": make.normal(features, intermediate, scale=intermediate**-0.5),
    }
    if biases:
        tensors |= {"up_bias": make.normal(intermediate), "down_bias": make.normal(features)}
    if gated:
        tensors["gate_weight"] = make.normal(intermediate, features, scale=features**-0.5)
        if biases:
            tensors["gate_bias"] = make.normal(intermediate)
    if not dropout_p:
        return Call(tensors, {"activation": activation})
    tensors["residual"] = make.normal(tokens, features)
    return Call(tensors, {"activation": activation, "hidden_dropout_p": dropout_p, "output_dropout_p": dropout_p})


def _plain(
    input: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    *,
    activation: str,
) -> Tensor:
    act = _ACTIVATIONS[activation]
    hidden = F.linear(input, up_weight, up_bias)
    hidden = act(hidden) if gate_weight is None else act(F.linear(input, gate_weight, gate_bias)) * hidden
    return F.linear(hidden, down_weight, down_bias)


FEED_FORWARD = Operator("feed_forward", _inputs, _plain)
