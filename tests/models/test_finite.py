"""Weights that are no numbers are refused, with the name of the tensor, wherever a model is used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fastformer.cli import main
from fastformer.data.pretraining.tokenizer import train_tokenizer
from fastformer.models import FastformerConfig, FastformerForCausalLM, from_hugging_face, to_hugging_face
from fastformer.models.finite import first_not_finite

pytestmark = pytest.mark.cpu


@pytest.fixture(params=[float("nan"), float("inf")])
def model(request: pytest.FixtureRequest) -> FastformerForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    form = {"norm_placement": "pre", "embedding_norm": False, "type_vocab_size": 0, "hidden_act": "gelu_new"}
    config = FastformerConfig(stack="decoder", vocab_size=300, **sizes, **form)
    model = FastformerForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[1].feed_forward.up.weight[3, 2] = request.param
    return model


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "MODEL", "--prompt", "the cat"],
        ["explain", "MODEL", "--text", "the cat", "--out", "OUT"],
        ["convert", "MODEL", "OUT", "--to", "gpt2"],
    ],
    ids=lambda command: command[0],
)
def test_commands(
    command: list[str], model: FastformerForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model.save_pretrained(tmp_path / "model")
    train_tokenizer(["the cat sat on the mat"] * 3, 300).save_pretrained(tmp_path / "model")
    places = {"MODEL": str(tmp_path / "model"), "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in command]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "model.layers.1.feed_forward.up.weight have elements that are infinite or not a number" in error
    assert not (tmp_path / "out").exists()


def test_conversions_in_memory(model: FastformerForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"the weights model\.layers\.1\.feed_forward\.up\.weight have elements"):
        to_hugging_face(model, "gpt2")
    theirs = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=30))
    with torch.no_grad():
        theirs.transformer.wpe.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the weights transformer\.wpe\.weight have elements"):
        from_hugging_face(theirs)


def test_the_first_of_several_tensors() -> None:
    bad = torch.tensor([1.0, float("inf")])
    tensors = {
        "whole numbers": torch.tensor([1]),
        "empty": torch.empty(0),
        "without data": torch.empty(3, device="meta"),
        "good": torch.ones(2, dtype=torch.bfloat16),
    }
    assert first_not_finite(tensors) is None
    assert first_not_finite({}) is None
    assert first_not_finite({**tensors, "second": bad, "third": bad * float("nan")}) == "second"
