"""Norms of PyTorch are replaced; a norm that computes something else is left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from integrations.acceleration.comparing import assert_accelerated_computes_the_same, left
from torch import nn


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LayerNorm(8),
        lambda: nn.LayerNorm(8, bias=False),
        lambda: nn.RMSNorm(8),
        lambda: nn.RMSNorm(8, eps=1e-5),
    ],
)
def test_forward_and_backward(make: Callable[[], nn.Module]) -> None:
    assert_accelerated_computes_the_same(make())


@pytest.mark.parametrize(
    "formula",
    [
        lambda x, weight, eps: x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight,
        lambda x, weight, eps: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps) * weight,
        lambda x, weight, eps: (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).detach() * weight,
        lambda x, weight, eps: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (2.0 + weight),
        lambda x, weight, eps: x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps) * weight,
    ],
)
def test_another_norm_is_left(formula: Callable[..., torch.Tensor]) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return formula(x, self.weight, self.eps)

    assert "neither LayerNorm nor RMSNorm" in left(Norm())["normalisation"]
