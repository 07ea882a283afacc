"""Tests of LoRA: what is adapted, what is trained, and what is saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from fastformer.data.pretraining.tokenizer import train_tokenizer
from fastformer.models import FastformerConfig, FastformerForPreTraining, FastformerForSequenceClassification
from fastformer.training.lora import Lora, linear_layers_in_blocks
from fastformer.training.prediction import Predictor
from fastformer.training.starting_point import pretrained

SHAPE = {"vocab_size": 12, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
IDS = torch.tensor([[3, 4, 5]])


@pytest.fixture(params=["ours", "bert"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    if request.param == "ours":
        FastformerForPreTraining(FastformerConfig(**SHAPE)).save_pretrained(tmp_path)
    else:
        BertForMaskedLM(BertConfig(**SHAPE)).save_pretrained(tmp_path)
    return tmp_path


def test_only_adapters_and_the_new_head_are_trained(folder: Path) -> None:
    start = pretrained(folder, "classify", ["a", "b"])
    adapted = Lora(rank=2, alpha=4).adapt(start.model, start.new_layers)
    before = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.1)
    adapted.train()
    for _ in range(2):
        optimizer.zero_grad()
        adapted(input_ids=IDS, labels=torch.tensor([1])).loss.backward()
        optimizer.step()
    changed = {name for name, weight in adapted.state_dict().items() if not torch.equal(weight, before[name])}
    heads = tuple(start.new_layers)
    assert changed
    for name in changed:
        assert "lora_" in name or any(f"{head}.modules_to_save" in name for head in heads), name
    assert any("lora_" in name for name in changed)
    assert any("modules_to_save" in name for name in changed)


def test_linear_layers_of_the_blocks_are_found_by_structure() -> None:
    assert set(linear_layers_in_blocks(FastformerForSequenceClassification(FastformerConfig(**SHAPE)))) == {
        f"model.layers.{block}.{layer}"
        for block in (0, 1)
        for layer in ("attention.qkv", "attention.output", "feed_forward.up", "feed_forward.down")
    }
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2))  # its layers are Conv1D
    assert set(linear_layers_in_blocks(gpt2)) == {
        f"transformer.h.0.{layer}" for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be 1 or more; got 0"),
        ({"alpha": 0.0}, "alpha must be above 0; got 0.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lora(**arguments)


# --- An adapter's folder ----------------------------------------------------------------------------------------------

FIRST = "base_model.model.model.layers.0.attention.output.lora_A.weight"
HEAD = "base_model.model.classifier.projection.weight"
Weights = dict[str, torch.Tensor]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Save an adapter as a fine-tuning run does, in a folder next to the model that it adapts."""
    torch.manual_seed(0)
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tokenizer = train_tokenizer(["some words"], 300)
    shape = {**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    FastformerForPreTraining(FastformerConfig(**shape)).save_pretrained(base)
    start = pretrained(base, "classify", ["a", "b"])
    adapted = Lora(rank=2).adapt(start.model, start.new_layers)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    adapted.save_pretrained(folder)
    adapted.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter_is_merged_into_its_model(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    before = pretrained(adapter.parent / "base", "classify", ["a", "b"]).model.state_dict()
    after = Predictor.load(adapter, "classify").model.state_dict()
    product = weights[FIRST.replace("lora_A", "lora_B")] @ weights[FIRST]
    name = "model.layers.0.attention.output.weight"
    assert torch.allclose(after[name], before[name] + 2 * product)  # alpha is twice the rank
    assert torch.equal(after["classifier.projection.weight"], weights[HEAD])


SPOILT: dict[str, tuple[Callable[[Weights], Any], str]] = {
    "lacks a product": (lambda weights: weights.pop(FIRST), f"lacks {FIRST}"),
    "lacks the head": (lambda weights: weights.pop(HEAD), f"lacks {HEAD}"),
    "is empty": (lambda weights: weights.clear(), f"lacks .*{FIRST}.* and .* more"),
    "has another layer": (lambda weights: weights.update({"layers.7": torch.ones(2)}), r"has too many: layers\.7"),
    "has another shape": (
        lambda weights: weights.update({FIRST: torch.ones(3, 8)}),
        rf"{FIRST} has the shape \(3, 8",
    ),
    "has no numbers": (
        lambda weights: weights[FIRST].fill_(torch.nan),
        "attention.output.weight.*infinite or not a numb",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_an_adapter_that_is_not_whole_is_refused(kind: str, adapter: Path) -> None:
    file, (spoil, message) = adapter / "adapter_model.safetensors", SPOILT[kind]
    weights = load_file(file)
    spoil(weights)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{adapter}.*{message}"):
        Predictor.load(adapter, "classify")


@pytest.mark.parametrize("content", [b"", b"\x80" * 99, None])
def test_a_damaged_file_of_an_adapter_is_named(content: bytes | None, adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} is missing or damaged"):
        Predictor.load(adapter, "classify")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_model_name_or_path": None}, r"adapter_config\.json must name the base model"),
        ({"base_model_name_or_path": "absent"}, "the base model of the adapter is not there: no model in absent"),
        ({"peft_type": "SORCERY"}, r"adapter_config\.json is not the configuration of an adapter"),
        ({"r": 3}, "has the shape"),
        ({"r": 0}, "does not fit"),
        ({"target_modules": ["nothing"]}, "does not fit"),
    ],
)
def test_a_configuration_of_another_adapter_is_refused(fields: dict[str, Any], message: str, adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match=rf"{adapter}.*{message}"):
        Predictor.load(adapter, "classify")
    file.write_text("{")
    with pytest.raises(ValueError, match=rf"{file} is not the configuration"):
        Predictor.load(adapter, "classify")
