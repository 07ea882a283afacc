"""Feed-forward networks with any names are replaced; one that differs in one thing is left, with that reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from integrations.acceleration.comparing import assert_accelerated_computes_the_same, left
from torch import nn
from transformers.activations import ACT2FN


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Dropout(0.0), nn.Linear(12, 8), nn.Dropout(0.0)),
        lambda: nn.Sequential(nn.Linear(8, 12, bias=False), nn.GELU("tanh"), nn.Linear(12, 4)),
    ],
)
def test_forward_and_backward(make: Callable[[], nn.Module]) -> None:
    assert_accelerated_computes_the_same(make())


@pytest.mark.parametrize("activation", ["quick_gelu", "tanh", "relu6", "mish"])
def test_another_activation_is_left(activation: str) -> None:
    module = nn.Sequential(nn.Linear(8, 12), ACT2FN[activation], nn.Linear(12, 8))
    assert "computes no feed-forward" in left(module)["feed-forward"]


def test_gates_that_are_activated_after_the_product_are_left() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(F.silu(self.a(x) * self.b(x)))

    assert "computes no feed-forward" in left(Gated())["feed-forward"]


def test_a_residual_inside_is_left() -> None:
    class Residual(nn.Sequential):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input + super().forward(input)

    module = Residual(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    assert "computes no feed-forward" in left(module)["feed-forward"]


def test_dropout_of_the_input_is_left() -> None:
    module = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    assert "drops elements in training elsewhere" in left(module)["feed-forward"]


def test_dropout_by_a_function_is_left() -> None:
    class Dropping(nn.Sequential):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return F.dropout(super().forward(input), 0.5, self.training)

    module = Dropping(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    assert "drops elements in training elsewhere" in left(module)["feed-forward"]
