"""Accelerated models have the same outputs, gradients and parameters, and can be restored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hugging_face_models import MODELS
from integrations.acceleration.comparing import assert_same, left, results
from torch import nn

import fastformer
from fastformer.integrations.acceleration import feed_forward
from fastformer.integrations.acceleration import model as model_module
from fastformer.integrations.acceleration.swapping import Accelerated

# The parts of each model that are left, and why. All other parts must be replaced.
LEFT = {
    "GPT-2": {"embeddings": "in a forward that does more"},
    "BART": {"embeddings": "in a forward that does more", "feed-forward": "in a forward that does more"},
    "Marian": {"feed-forward": "in a forward that does more"},
    "mBART": {"embeddings": "in a forward that does more", "feed-forward": "in a forward that does more"},
    "Whisper": {"embeddings": "in a forward that does more", "feed-forward": "in a forward that does more"},
    "ViT": {"loss": "not the cross-entropy of a language model"},
    "CLIP": {"feed-forward": "computes no feed-forward with relu, gelu"},  # quick_gelu
    "gpt-oss": {"rotary position embedding": "not simply each twice"},
    "Llama 4": {"normalisation": "its size cannot be told"},
    "DeepSeek-V3": {"rotary position embedding": "it rotates by more than one function"},
}
REPLACED = {
    "BERT": {"embeddings", "feed-forward", "residual and normalisation", "normalisation", "loss", "attention"},
    "DistilBERT": {"embeddings", "feed-forward", "normalisation", "loss", "attention"},
    "ModernBERT": {"feed-forward", "normalisation", "loss", "attention", "rotary position embedding"},
    "GPT-2": {"feed-forward", "normalisation", "loss", "attention"},
    "Llama": {"feed-forward", "normalisation", "loss", "attention", "rotary position embedding"},
    "Gemma 2": {"feed-forward", "normalisation", "loss", "attention", "rotary position embedding"},
    "T5": {"feed-forward", "normalisation", "loss", "attention"},
    "ViT": {"feed-forward", "normalisation", "attention"},
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left(name: str) -> None:
    report = fastformer.accelerate(MODELS[name].build())
    assert {made.part for made in report.left} == LEFT.get(name, {}).keys()
    for made in report.left:
        assert LEFT[name][made.part] in made.detail
    assert REPLACED.get(name, set()) <= {made.part for made in report.replaced}


# One model of every structure; the tests of attention have the others.
OF_EVERY_STRUCTURE = (
    "BERT", "RoBERTa", "DistilBERT", "ModernBERT", "GPT-2", "GPT-NeoX", "Llama", "Gemma 3", "T5", "ViT",
)  # fmt: skip


@pytest.mark.parametrize("name", OF_EVERY_STRUCTURE)
def test_outputs_and_gradients_by_the_kernels(name: str) -> None:
    small = MODELS[name]
    model, batch = small.build(), small.batch("right" if small.kind != "decoder" else "left")
    expected = results(model, batch)
    fastformer.accelerate(model)
    if name not in ("BERT", "Llama"):
        model.set_attn_implementation("eager")  # the interpreter is slow
    with fastformer.backend("triton"):
        actual = results(model, batch)
    assert_same(actual, expected)


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["BERT", "Llama", "T5"])
def test_outputs_and_gradients_on_a_cpu(name: str) -> None:
    small = MODELS[name]
    model, batch = small.build(), small.batch("right")
    expected = results(model, batch)
    fastformer.accelerate(model)
    assert_same(results(model, batch), expected)


@pytest.mark.parametrize("name", MODELS)
def test_restore_leaves_nothing(name: str) -> None:
    model = MODELS[name].build()
    attributes = {path: {**vars(module)} for path, module in model.named_modules()}
    classes = {path: type(module) for path, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    implementations = [config._attn_implementation for config in configurations(model)]

    fastformer.accelerate(model)
    assert any(isinstance(module, Accelerated) for module in model.modules())
    assert all(isinstance(module, classes[path]) for path, module in model.named_modules())
    assert all(type(module).__name__ == classes[path].__name__ for path, module in model.named_modules())
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[path] for path, parameter in model.named_parameters())

    fastformer.restore(model)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    for path, module in model.named_modules():
        assert vars(module).keys() == attributes[path].keys()
        assert all(vars(module)[key] is value for key, value in attributes[path].items())
    assert [config._attn_implementation for config in configurations(model)] == implementations


def configurations(model: nn.Module) -> list[Any]:
    return [module.config for module in model.modules() if hasattr(module, "config")]


def test_again_changes_nothing() -> None:
    model = MODELS["BERT"].build()
    first = fastformer.accelerate(model)
    classes = [type(module) for module in model.modules()]
    second = fastformer.accelerate(model)
    assert [type(module) for module in model.modules()] == classes
    assert {(made.module, made.part) for made in second.replaced} == {
        (made.module, made.part) for made in first.replaced
    }


def test_layers_of_one_structure_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[nn.Module] = []
    recognise = feed_forward.recognise

    def counting(module: nn.Module) -> Any:
        found = recognise(module)
        if found is not None:
            looked_at.append(module)
        return found

    monkeypatch.setattr(model_module, "_RECOGNISERS", [("feed-forward", counting)])
    model = MODELS["Llama"].build()
    report = fastformer.accelerate(model)
    assert len(looked_at) == 1
    assert sum(made.part == "feed-forward" for made in report.replaced) == 2


def test_a_forward_of_the_instance_is_left() -> None:
    norm = nn.LayerNorm(8)
    norm.forward = lambda input: input  # type: ignore[method-assign]
    assert left(norm) == {"forward": "its forward has been replaced already"}


def test_a_class_that_was_changed_again_is_not_restored() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    fastformer.accelerate(model)
    torch.nn.utils.parametrizations.weight_norm(model[1])
    classes = [type(module) for module in model]
    with pytest.raises(ValueError, match="1: the class was changed after acceleration"):
        fastformer.restore(model)
    assert [type(module) for module in model] == classes


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be an nn.Module; got str"):
        fastformer.accelerate("bert-base-uncased")  # type: ignore[arg-type]
