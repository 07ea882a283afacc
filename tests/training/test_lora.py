"""LoRA: what is adapted, what is trained, what is saved."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from fastformer.models import FastformerConfig, FastformerForPreTraining, FastformerForSequenceClassification
from fastformer.training.lora import Lora, linear_layers_in_blocks
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
