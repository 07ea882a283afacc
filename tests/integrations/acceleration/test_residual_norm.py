"""A residual norm drops in training alone; a module with its dropout elsewhere is left."""

from __future__ import annotations

import torch
from hugging_face_models import MODELS
from integrations.acceleration.comparing import left
from torch import nn

import fastformer


def test_dropout_drops_and_keeps_the_expectation() -> None:
    layer = MODELS["BERT"].build().bert.encoder.layer[0].output
    layer.dropout.p = 0.5
    fastformer.accelerate(layer)
    hidden, residual = torch.randn(64, 48), torch.zeros(64, 32)
    layer.train()
    with fastformer.backend("triton"), torch.no_grad():
        first, second = layer(hidden, residual), layer(hidden, residual)
        layer.eval()
        assert torch.equal(layer(hidden, residual), layer(hidden, residual))
    assert not torch.equal(first, second)


def test_another_residual_is_left() -> None:
    class Output(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.norm, self.dropout = nn.Linear(12, 8), nn.LayerNorm(8), nn.Dropout(0.1)

        def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return self.norm(self.dropout(self.dense(hidden) + residual))

    assert "elsewhere than before the residual" in left(Output())["residual and normalisation"]
