"""An accelerated model is trained, saved, copied and compiled as any other model."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from hugging_face_models import MODELS
from integrations.acceleration.comparing import assert_same, results
from torch import nn

import fastformer
from fastformer.integrations.acceleration import losses, rotary, swapping
from fastformer.integrations.acceleration.swapping import Accelerated


def test_hooks_of_the_module_run() -> None:
    norm = nn.LayerNorm(8)
    seen: list[torch.Tensor] = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    fastformer.accelerate(norm)
    with fastformer.backend("triton"):
        output = norm(torch.randn(3, 8))
    assert seen[0] is output


def test_gradient_checkpointing() -> None:
    model, batch = MODELS["Llama"].build(), MODELS["Llama"].batch()
    expected = results(model.train(), batch)
    fastformer.accelerate(model)
    model.gradient_checkpointing_enable()
    with fastformer.backend("triton"):
        assert_same(results(model, batch), expected)


def test_autocast(device: torch.device) -> None:
    model, batch = MODELS["Llama"].build(), MODELS["Llama"].batch()
    fastformer.accelerate(model)
    with torch.autocast(device.type, torch.bfloat16):
        expected = model(**batch).logits
        with fastformer.backend("triton"):
            actual = model(**batch).logits
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.3)


def test_parameters_of_another_dtype_run_the_layer_s_own_forward() -> None:
    """Parameters in float64 are no error: the layer's own forward runs, as the operators do not take float64."""
    model = MODELS["Llama"].build().double()
    fastformer.accelerate(model)
    model.config._attn_implementation = "eager"
    batch = MODELS["Llama"].batch()
    with fastformer.backend("triton"):
        actual = model(**batch).logits
    torch.testing.assert_close(actual, model(**batch).logits)


def test_deepcopy() -> None:
    model = MODELS["BERT"].build()
    fastformer.accelerate(model)
    twin = copy.deepcopy(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    fastformer.restore(twin)
    assert not any(isinstance(module, Accelerated) for module in twin.modules())
    assert twin.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "fastformer"


@pytest.mark.parametrize("name", ["BERT", "GPT-NeoX", "GPT-2"])
def test_pickle(name: str) -> None:
    model, batch = MODELS[name].build(), MODELS[name].batch()
    expected = model(**batch).logits
    fastformer.accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in model.modules()]
    torch.testing.assert_close(loaded(**batch).logits, expected)


def test_save_pretrained(tmp_path: Path) -> None:
    model, batch = MODELS["BERT"].build(), MODELS["BERT"].batch()
    fastformer.accelerate(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    loaded = type(model).fastformer_original.from_pretrained(tmp_path).eval()
    assert not any(isinstance(module, Accelerated) for module in loaded.modules())
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_operators", [False, True])
@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_compile(name: str, by_operators: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = MODELS[name].build(), MODELS[name].batch()
    expected = results(model, batch)
    fastformer.accelerate(model)
    if by_operators:
        for module in (swapping, rotary, losses):
            monkeypatch.setattr(module, "use_triton", lambda tensor: True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    actual = results(compiled, batch)
    assert_same({name.replace("_orig_mod.", ""): tensor for name, tensor in actual.items()}, expected)
