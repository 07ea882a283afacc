"""A projection that does more than multiply is called."""

from __future__ import annotations

import torch
from hugging_face_models import MODELS

import fastformer


def test_a_projection_with_a_hook_is_called() -> None:
    mlp = MODELS["Llama"].build().model.layers[0].mlp
    fastformer.accelerate(mlp)
    input = torch.randn(2, 3, 32)
    mlp.up_proj.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    with fastformer.backend("triton"):
        assert not mlp(input).any()
