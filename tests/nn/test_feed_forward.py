"""FeedForward equals its formula in torch.nn.functional."""

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


@pytest.mark.quick
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


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_dropout_in_training_only_and_a_residual(gated: bool, recompute: bool) -> None:
    module = FeedForward(6, 10, gated=gated, hidden_dropout=0.5, dropout=0.4, recompute=recompute)
    x, residual = torch.randn(50, 6), torch.randn(50, 6)
    torch.testing.assert_close(module.eval()(x, residual), formula(module, x) + residual)
    module.train()
    torch.manual_seed(0)
    dropped = module(x, residual) - residual
    assert 0.3 < (dropped.abs() < 1e-6).float().mean() < 0.5
    torch.manual_seed(0)
    torch.testing.assert_close(module(x), dropped)
    # Apart from the output's dropout, only the hidden dropout can change the values.
    assert not torch.allclose(dropped * 0.6, torch.where(dropped == 0, 0.0, formula(module, x)))


def test_a_replaced_projection_keeps_dropout_and_residual() -> None:
    class Other(torch.nn.Linear):
        pass

    module = FeedForward(6, 10, hidden_dropout=0.9, dropout=0.9)
    module.up = Other(6, 10)
    x = torch.randn(5, 6)
    torch.testing.assert_close(module.eval()(x, x), formula(module, x) + x)
    assert (module.train()(torch.ones(50, 6)) == 0).float().mean() > 0.8


@pytest.mark.parametrize("name", ["hidden_dropout", "dropout"])
def test_refuses_an_impossible_dropout(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\]; got 1.5"):
        FeedForward(6, 10, **{name: 1.5})
