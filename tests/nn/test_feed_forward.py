"""FeedForward against its formula in torch.nn.functional."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastformer.nn import FeedForward

FUNCTIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "squared_relu": lambda x: F.relu(x) ** 2,
    "identity": lambda x: x,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", list(FUNCTIONS))
def test_equals_the_formula(activation: str, gated: bool, bias: bool) -> None:
    module = FeedForward(6, 10, activation, gated=gated, bias=bias)
    assert set(dict(module.named_children())) == ({"up", "gate", "down"} if gated else {"up", "down"})
    x = torch.randn(2, 3, 6, requires_grad=True)
    results = []
    for function in (module, lambda x: formula(module, x)):
        output = function(x)
        gradients = torch.autograd.grad(output.square().sum(), [x, *module.parameters()])
        results.append((output.detach(), gradients))
    torch.testing.assert_close(results[0], results[1])


def formula(module: FeedForward, x: torch.Tensor) -> torch.Tensor:
    act = FUNCTIONS[module.activation]
    return module.down(act(module.up(x)) if module.gate is None else act(module.gate(x)) * module.up(x))


@pytest.mark.parametrize("name", ["up", "gate", "down"])
def test_a_replaced_projection_is_called(name: str) -> None:
    class Shifted(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    module = FeedForward(6, 10, gated=True)
    shifted = FeedForward(6, 10, gated=True)
    shifted.load_state_dict(module.state_dict())
    getattr(shifted, name).bias.data += 1
    plain = getattr(module, name)
    replacement = Shifted(plain.in_features, plain.out_features)
    replacement.load_state_dict(plain.state_dict())
    setattr(module, name, replacement)
    x = torch.randn(3, 6)
    torch.testing.assert_close(module(x), shifted(x))


def test_refuses_an_unknown_activation() -> None:
    with pytest.raises(
        ValueError, match="activation must be one of relu, gelu, gelu_tanh, silu, squared_relu, identity; got 'tanh'"
    ):
        FeedForward(6, 10, activation="tanh")
