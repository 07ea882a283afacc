"""Probing changes nothing, and finds the same whatever the state of the model and of the process."""

from __future__ import annotations

import pytest
import torch
from hugging_face_models import MODELS

import fastformer


def test_model_and_generators_are_not_touched_by_probing() -> None:
    model = MODELS["BERT"].build().train()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    fastformer.accelerate(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_recognised_in_any_dtype(dtype: torch.dtype) -> None:
    expected = fastformer.accelerate(MODELS["Llama"].build())
    report = fastformer.accelerate(MODELS["Llama"].build().to(dtype))
    assert report.replaced == expected.replaced


@pytest.mark.parametrize(
    ("name", "left"), [("T5", set()), ("BERT", {"embeddings"}), ("Llama", {"rotary position embedding"})]
)
def test_recognised_before_its_weights_are_loaded(name: str, left: set[str]) -> None:
    with torch.device("meta"):
        model = MODELS[name].build()
    report = fastformer.accelerate(model)
    # Parameters on the meta device do not matter. Buffers do, because their values are not known yet.
    assert {made.part for made in report.left} == left
    assert all("meta device" in made.detail for made in report.left)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_recognised_whatever_holds_around_it(device: torch.device) -> None:
    model, expected = MODELS["Llama"].build(), fastformer.accelerate(MODELS["Llama"].build())
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16), torch.device("meta"):
            report = fastformer.accelerate(model)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert report == expected
