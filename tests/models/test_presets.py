"""Presets have the parameters of Hugging Face's models of the same shape, and the published numbers of parameters."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForPreTraining,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import fastformer.models
from fastformer.models import PRESETS, FastformerConfig, preset


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def meta(name: str, **overrides) -> PreTrainedModel:
    with torch.device("meta"):
        return getattr(fastformer.models, PRESETS[name].model)(preset(name, **overrides))


def twin(name: str) -> PreTrainedModel:
    """Return Hugging Face's model of the same shape, on the meta device."""
    own = preset(name)
    common = {
        "vocab_size": own.vocab_size,
        "hidden_size": own.hidden_size,
        "num_hidden_layers": own.num_hidden_layers,
        "num_attention_heads": own.num_attention_heads,
        "intermediate_size": own.intermediate_size,
        "max_position_embeddings": own.max_position_embeddings,
    }
    rotary = {
        "num_key_value_heads": own.num_key_value_heads,
        "head_dim": own.size_per_head,
        "tie_word_embeddings": own.tie_word_embeddings,
    }
    renamed = {"n_embd": own.hidden_size, "n_layer": own.num_hidden_layers, "n_head": own.num_attention_heads}
    t5 = {
        "vocab_size": own.vocab_size,
        "d_model": own.hidden_size,
        "d_kv": own.size_per_head,
        "d_ff": own.intermediate_size,
        "num_layers": own.num_hidden_layers,
        "num_heads": own.num_attention_heads,
    }
    bart = {f"{stack}_layers": own.num_hidden_layers for stack in ("encoder", "decoder")}
    bart |= {f"{stack}_ffn_dim": own.intermediate_size for stack in ("encoder", "decoder")}
    make = {
        "bert": lambda: BertForPreTraining(BertConfig(**common)),
        "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**common, type_vocab_size=1)),
        "distilbert": lambda: DistilBertForMaskedLM(DistilBertConfig()),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**renamed)),
        "gpt3": lambda: GPT2LMHeadModel(GPT2Config(**renamed, n_positions=2048)),
        "llama3": lambda: LlamaForCausalLM(LlamaConfig(**common, **rotary)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**common, **rotary)),
        "t5": lambda: T5ForConditionalGeneration(T5Config(**t5)),
        "bart": lambda: BartForConditionalGeneration(BartConfig(**common, **bart, d_model=own.hidden_size)),
        "vit": lambda: ViTForImageClassification(ViTConfig(**common, num_labels=1000)),
    }
    with torch.device("meta"):
        return make[name.partition("-")[0]]()


# Positions beyond the longest sequence that all of Hugging Face's tables have together.
UNUSED_POSITIONS = {"bart-base": 4, "bart-large": 4}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_hugging_faces_model(name: str) -> None:
    model = meta(name)
    unused = UNUSED_POSITIONS.get(name, 0) * model.config.hidden_size
    assert parameters(model) == parameters(twin(name)) - unused


# Millions of parameters, in the digits of the publication: Turc et al. 2019, table 1; Devlin et al. 2018, section 3;
# Liu et al. 2019, section 5 and appendix A; Radford et al.'s released checkpoints; Brown et al. 2020, table D.1; the
# model cards of Llama 3 and Qwen 3; Raffel et al. 2020, section 3.7; Dosovitskiy et al. 2021, table 1.
PUBLISHED = {
    "bert-tiny": "4.4",
    "bert-mini": "11.3",
    "bert-small": "29.1",
    "bert-medium": "41.7",
    "bert-base": "110.1",
    "bert-large": "34e1",
    "roberta-base": "125",
    "roberta-large": "355",
    "gpt2-small": "124",
    "gpt2-medium": "355",
    "gpt2-large": "774",
    "gpt2-xl": "1558",
    "gpt3-small": "125",
    "gpt3-medium": "356",
    "gpt3-large": "760",
    "gpt3-xl": "132e1",
    "gpt3-2.7b": "265e1",
    "gpt3-6.7b": "666e1",
    "gpt3-13b": "1285e1",
    "gpt3-175b": "17460e1",
    "llama3-8b": "803e1",
    "qwen3-0.6b": "6e2",
    "t5-small": "6e1",
    "t5-base": "22e1",
    "t5-11b": "11e3",
    "bart-base": "14e1",
    "bart-large": "4e2",
}


def rounded(value: float, like: str) -> float:
    """Return `value` rounded to the unit of the last digit of `like`.

    An exponent in `like` may stand for trailing zeros.
    """
    digits, _, exponent = like.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return round(value / unit) * unit


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_parameters_round_to_the_published_number(name: str, published: str) -> None:
    assert rounded(parameters(meta(name)) / 1e6, published) == pytest.approx(float(published))


def test_published_numbers_that_count_otherwise() -> None:
    # T5 large's 770 million count the vocabulary twice. ViT's 86 million contain no classifier.
    assert round(parameters(meta("t5-large", tie_word_embeddings=False)) / 1e7) == 77
    assert round(parameters(meta("vit-b-16").model) / 1e6) == 86
    # Sanh et al.'s 66 million contain no masked-LM head.
    assert round(parameters(meta("distilbert-base").model) / 1e6) == 66


def test_every_preset_tells_its_source_and_use() -> None:
    for known in PRESETS.values():
        assert "20" in known.source and known.suits
        assert known.model in fastformer.models.__all__


def test_gpt3_alternates_dense_and_banded_blocks() -> None:
    config = preset("gpt3-small")
    assert config.windows(12) == [None, 256] * 6
    assert preset("gpt3-small", num_hidden_layers=3).windows(3) == [None, 256, None]
    chosen = preset("gpt3-small", num_hidden_layers=1, layer_types=["sliding_attention"], sliding_window=8)
    assert chosen.windows(1) == [8]


@pytest.mark.quick
def test_overrides_and_refusals() -> None:
    assert preset("bert-mini", vocab_size=77, hidden_dropout_prob=0.0).vocab_size == 77
    assert preset("bert-base").to_dict() == FastformerConfig().to_dict()
    assert preset("vit-b-16", num_labels=10).num_labels == 10
    with pytest.raises(ValueError, match=r"no preset 'bert-huge'; there are bert-tiny, .*, bert-large"):
        preset("bert-huge")
    with pytest.raises(ValueError, match="FastformerConfig has no field 'hiden_size'"):
        preset("bert-base", hiden_size=3)
