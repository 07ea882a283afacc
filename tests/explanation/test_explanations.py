"""Attention maps and token attributions, in Python and as a command, equal those of BERT and captum."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedTokenizerFast

from fastformer.cli import main
from fastformer.explanation.attention_maps import attention_maps, draw_attention
from fastformer.explanation.attributions import token_attributions
from fastformer.models import (
    FastformerConfig,
    FastformerForCausalLM,
    FastformerForMaskedLM,
    FastformerForSeq2SeqLM,
    FastformerForSequenceClassification,
    FastformerForTokenClassification,
    FastformerModel,
    from_hugging_face,
)

pytestmark = pytest.mark.cpu

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "the", "cat", "sat", "on", "a", "$mat$"]
SHAPE = {
    "vocab_size": len(WORDS),
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
TEXT = "the cat sat on a $mat$"
needs_captum = pytest.mark.skipif(
    importlib.util.find_spec("captum") is None, reason="needs captum: pip install fastformer[interpret]"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "mask", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def twins(bert_class: type, own_class: type):
    bert = bert_class(BertConfig(**SHAPE, num_labels=3, attn_implementation="eager")).eval()
    own = from_hugging_face(bert).eval()
    assert type(own) is own_class
    # The embedding of padding is zero at first in both models; in a trained model it is not.
    for model in (bert, own):
        model.get_input_embeddings().weight.data[0] = torch.linspace(-0.5, 0.5, 24)
    return bert, own


@pytest.mark.quick
def test_maps_are_berts_attentions(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    bert, own = twins(BertForSequenceClassification, FastformerForSequenceClassification)
    expected = bert(**tokenizer(TEXT, return_tensors="pt"), output_attentions=True).attentions
    maps = attention_maps(own, tokenizer, TEXT, layers=[2, 0], heads=[3, 1])
    assert maps.queries == maps.keys == ["[CLS]", *TEXT.split(), "[SEP]"]
    assert maps.weights.shape == (2, 2, 8, 8)
    for row, layer in enumerate(maps.layers):
        theirs = expected[layer][0, [3, 1]].detach().numpy()
        np.testing.assert_allclose(maps.weights[row], theirs, rtol=0, atol=2e-6)
    draw_attention(maps, tmp_path / "maps.png")
    picture = imread(tmp_path / "maps.png")
    assert picture.shape[0] > 100 and picture[..., :3].std() > 0.05
    assert attention_maps(own, tokenizer, TEXT).weights.shape == (3, 4, 8, 8)


def test_only_the_chosen_blocks_and_heads_are_recomputed(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastformer.models import context

    asked = []
    original = context.attention_weights

    def counted(*tensors, **arguments):
        asked.append(arguments["heads"])
        return original(*tensors, **arguments)

    monkeypatch.setattr(context, "attention_weights", counted)
    attention_maps(FastformerModel(FastformerConfig(**SHAPE)).eval(), tokenizer, TEXT, layers=[1], heads=[2])
    assert asked == [[2]]


@torch.no_grad()
def test_maps_of_decoders_and_encoder_decoders(tokenizer: PreTrainedTokenizerFast) -> None:
    decoder = FastformerForCausalLM(FastformerConfig(**SHAPE, stack="decoder", type_vocab_size=0)).eval()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    expected = decoder(ids, output_attentions=True).attentions[1][0].numpy()
    np.testing.assert_allclose(attention_maps(decoder, tokenizer, TEXT, [1]).weights[0], expected, rtol=0, atol=1e-7)
    config = FastformerConfig(**SHAPE, stack="encoder_decoder", type_vocab_size=0, decoder_start_token_id=0)
    model = FastformerForSeq2SeqLM(config).eval()
    target = torch.tensor([[0, 1, 5, 6]])  # the start, then all but the last of [CLS] the cat [SEP]
    output = model(ids, decoder_input_ids=target, output_attentions=True)
    for attention, weights in (
        ("encoder", output.encoder_attentions),
        ("decoder", output.decoder_attentions),
        ("cross", output.cross_attentions),
    ):
        maps = attention_maps(model, tokenizer, TEXT, attention=attention, target_text="the cat")
        np.testing.assert_allclose(maps.weights, torch.cat(weights).numpy(), rtol=0, atol=1e-7)
        assert maps.weights.shape == (3, 4, len(maps.queries), len(maps.keys))
    assert maps.queries == ["[PAD]", "[CLS]", "the", "cat"] and maps.keys[1:-1] == TEXT.split()


def captums(bert, tokenizer: PreTrainedTokenizerFast, text: str, logit) -> list[float]:
    """Return captum's layer integrated gradients of BERT's word embeddings; the baseline keeps the special tokens."""
    from captum.attr import LayerIntegratedGradients

    encoded = tokenizer(text, return_tensors="pt")
    ids = encoded["input_ids"]
    baseline = torch.where((ids == 1) | (ids == 2) | (ids == 3), ids, 0)
    method = LayerIntegratedGradients(
        lambda ids: logit(bert(ids, token_type_ids=torch.zeros_like(ids)).logits), bert.get_input_embeddings()
    )
    return method.attribute(ids, baseline, n_steps=40).sum(-1)[0].tolist()


@needs_captum
def test_attributions_are_captums_on_bert(tokenizer: PreTrainedTokenizerFast) -> None:
    bert, own = twins(BertForSequenceClassification, FastformerForSequenceClassification)
    found = token_attributions(own, tokenizer, TEXT, target=1, steps=40)
    expected = captums(bert, tokenizer, TEXT, lambda logits: logits[:, 1])
    assert found.scores == pytest.approx(expected, abs=1e-4)
    assert found.label == "LABEL_1" and found.tokens[1:-1] == TEXT.split()
    logits = bert(**tokenizer(TEXT, return_tensors="pt")).logits[0]
    assert found.output == pytest.approx(logits[1].item(), abs=1e-4)
    assert token_attributions(own, tokenizer, TEXT, steps=2).target == logits.argmax().item()


@needs_captum
def test_attributions_of_a_masked_token(tokenizer: PreTrainedTokenizerFast) -> None:
    bert, own = twins(BertForMaskedLM, FastformerForMaskedLM)
    text = "the cat [MASK] on a"
    found = token_attributions(own, tokenizer, text, steps=40)
    assert found.scores == pytest.approx(
        captums(bert, tokenizer, text, lambda logits: logits[:, 3, found.target]), abs=1e-4
    )
    assert found.label == WORDS[found.target]


@needs_captum
def test_attributions_of_the_next_token_add_up(tokenizer: PreTrainedTokenizerFast) -> None:
    shape = {**SHAPE, "initializer_range": 0.1}
    model = FastformerForCausalLM(FastformerConfig(**shape, stack="decoder", type_vocab_size=0)).eval()
    tokenizer.pad_token = None
    found = token_attributions(model, tokenizer, "the cat sat", steps=200)
    assert found.output == model(tokenizer("the cat sat", return_tensors="pt")["input_ids"]).logits[0, -1].max()
    assert sum(found.scores) == pytest.approx(found.output - found.baseline, abs=0.05)
    assert found.error == pytest.approx(abs(sum(found.scores) - found.output + found.baseline), abs=1e-4)


def test_refusals_of_maps(tokenizer: PreTrainedTokenizerFast) -> None:
    model = FastformerForMaskedLM(FastformerConfig(**SHAPE))
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        attention_maps(model, tokenizer, TEXT)
    model.eval()
    with pytest.raises(IndexError, match="layers must be from 0 to 2; got 3"):
        attention_maps(model, tokenizer, TEXT, layers=[3])
    with pytest.raises(IndexError, match="heads must be from 0 to 3; got 4"):
        attention_maps(model, tokenizer, TEXT, heads=[4])
    with pytest.raises(ValueError, match="attention must be one of encoder; got 'cross'"):
        attention_maps(model, tokenizer, TEXT, attention="cross")
    with pytest.raises(ValueError, match="target_text is for encoder-decoders"):
        attention_maps(model, tokenizer, TEXT, target_text="a")


@needs_captum
def test_refusals_of_attributions(tokenizer: PreTrainedTokenizerFast) -> None:
    config = FastformerConfig(**SHAPE)
    model = FastformerForMaskedLM(config)
    with pytest.raises(ValueError, match="model must be in evaluation mode"):
        token_attributions(model, tokenizer, TEXT)
    model.eval()
    with pytest.raises(ValueError, match=r"text must have one \[MASK\], whose prediction is explained; got 0"):
        token_attributions(model, tokenizer, TEXT)
    with pytest.raises(IndexError, match="target must be from 0 to 10; got 11"):
        token_attributions(model, tokenizer, "a [MASK]", target=11)
    with pytest.raises(ValueError, match="got FastformerForTokenClassification"):
        token_attributions(FastformerForTokenClassification(config).eval(), tokenizer, TEXT)


@needs_captum
def test_command(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FastformerForMaskedLM(FastformerConfig(**SHAPE)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text, out = "the [MASK] sat on a $mat$", tmp_path / "explained"
    arguments = ["explain", str(tmp_path / "model"), "--text", text, "--out", str(out)]
    assert main([*arguments, "--layers", "0,2", "--heads", "3", "--attributions", "--steps", "4"]) == 0
    assert "attention.png, attention.json, attributions.png, attributions.json" in capsys.readouterr().out
    maps = json.loads((out / "attention.json").read_text())
    assert (maps["layers"], maps["heads"]) == ([0, 2], [3])
    assert np.array(maps["weights"]).sum(-1) == pytest.approx(np.ones((2, 1, 8)), abs=1e-5)
    assert len(json.loads((out / "attributions.json").read_text())["scores"]) == 8
    assert imread(out / "attributions.png").std() > 0.05
    drawn = (out / "attention.png").read_bytes()
    assert main(arguments) == 2
    assert "attention.png already exists: replace it with --overwrite" in capsys.readouterr().err
    assert (out / "attention.png").read_bytes() == drawn
    arguments += ["--overwrite"]
    for wrong, message in (
        (["--layers", "7"], "layers must be from 0 to 2; got 7"),
        (["--target", "3"], "--target needs --attributions"),
        (["--attention", "cross"], "attention must be one of encoder"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["explain", str(tmp_path / "none"), "--text", "a", "--out", str(out)]) == 2
    for option in ("--text", "--target_text"):
        assert main([*arguments, "--overwrite", option, "a \udcff"]) == 2
        assert f"{option} is not UTF-8: 'a \\udcff'" in capsys.readouterr().err
