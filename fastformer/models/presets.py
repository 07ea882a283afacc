"""Published model shapes by name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from fastformer.models.configuration import FastformerConfig

SMALLEST = "bert-tiny"
"""The preset of a new model where none is named: it learns in minutes on two CPU cores."""


@dataclass(frozen=True)
class Preset:
    """A published shape.

    Attributes:
        settings: the fields of `FastformerConfig` that differ from its defaults.
        model: the name of the class for which it was pretrained.
        source: the publication of the shape.
        suits: the uses that it is suited for.
    """

    settings: dict[str, Any]
    model: str
    source: str
    suits: str


def preset(name: str, **overrides: Any) -> FastformerConfig:
    """Return the configuration of a published shape.

    Dropout of attention weights is 0 in all of them; see `FastformerConfig`. These differ from the publications:

    - gpt3-xl has 16 heads of 128, gpt3-13b a hidden size of 5120. Table 2.1 of Brown et al. (2020) says 24 heads and
      5140. That contradicts its table D.1: 1,320 and 12,850 million parameters are those of the shapes here. Banded
      layers see the last 256 tokens, as in GPT-Neo, the paper's open replication; the paper itself gives no width.
    - roberta and bart have as many positions as tokens, without the rows that Hugging Face's tables have for padding.

    Args:
        name: one of `PRESETS`.
        overrides: fields of `FastformerConfig`, or num_labels, to set differently. With another number of layers,
            GPT-3's layers still alternate.

    Raises:
        ValueError: there is no such preset, or no such field, or a field has the wrong type.

    >>> preset("bert-base", vocab_size=8192).hidden_size
    768
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    known = {field.name for field in fields(FastformerConfig)} | {"num_labels"}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"FastformerConfig has no field {', '.join(map(repr, unknown))}")
    settings = {**PRESETS[name].settings, **overrides}
    if "layer_types" in settings and "layer_types" not in overrides:
        settings["layer_types"] = alternating(settings["num_hidden_layers"])
    try:
        return FastformerConfig(**settings)
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error


def alternating(layers: int) -> list[str]:
    """Return GPT-3's layer_types: dense and banded blocks alternate (Brown et al. 2020, section 2.1)."""
    return [("full_attention", "sliding_attention")[layer % 2] for layer in range(layers)]


def _shape(layers: int, hidden: int, heads: int, intermediate: int | None = None) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": intermediate or 4 * hidden,
    }


_ROBERTA = {
    "vocab_size": 50265,
    "type_vocab_size": 1,
    "pad_positions": False,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_DISTILBERT = {"type_vocab_size": 0, "pooler_act": "relu"}
_GPT2 = {
    "stack": "decoder",
    "vocab_size": 50257,
    "max_position_embeddings": 1024,
    "type_vocab_size": 0,
    "hidden_act": "gelu_new",
    "norm_placement": "pre",
    "layer_norm_eps": 1e-5,
    "embedding_norm": False,
    "pad_token_id": None,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
_LLAMA = {
    "stack": "decoder",
    "type_vocab_size": 0,
    "hidden_act": "silu",
    "gated": True,
    "position_embedding": "rotary",
    "norm": "rms",
    "norm_placement": "pre",
    "layer_norm_eps": 1e-5,
    "embedding_norm": False,
    "attention_bias": False,
    "attention_output_bias": False,
    "feed_forward_bias": False,
    "hidden_dropout_prob": 0.0,
    "pad_token_id": None,
}
_LLAMA_3 = {
    **_LLAMA,
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_QWEN3 = {
    **_LLAMA,
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "layer_norm_eps": 1e-6,
    "qk_norm": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_BART = {
    "stack": "encoder_decoder",
    "vocab_size": 50265,
    "max_position_embeddings": 1024,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_VIT = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "vocab_size": 1,
    "type_vocab_size": 0,
    "norm_placement": "pre",
    "embedding_norm": False,
    "hidden_dropout_prob": 0.0,
    "pooler_act": "none",
    "pad_token_id": None,
    "num_labels": 1000,
}


def _gpt3(layers: int, hidden: int, heads: int) -> dict[str, Any]:
    banded = {"layer_types": alternating(layers), "sliding_window": 256}
    return {**_GPT2, **_shape(layers, hidden, heads), "max_position_embeddings": 2048, **banded}


def _t5(layers: int, hidden: int, heads: int, head_dim: int, intermediate: int) -> dict[str, Any]:
    return {
        "stack": "encoder_decoder",
        **_shape(layers, hidden, heads, intermediate),
        "head_dim": head_dim,
        "vocab_size": 32128,
        "type_vocab_size": 0,
        "hidden_act": "relu",
        "position_embedding": "relative",
        "norm": "rms",
        "norm_placement": "pre",
        "layer_norm_eps": 1e-6,
        "embedding_norm": False,
        "attention_bias": False,
        "attention_output_bias": False,
        "feed_forward_bias": False,
        "attention_scale": 1.0,
        "activation_dropout": 0.1,
        "logit_scale": hidden**-0.5,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }


_PRETRAINING, _MASKED_LM = "FastformerForPreTraining", "FastformerForMaskedLM"
_CAUSAL_LM, _SEQ2SEQ_LM = "FastformerForCausalLM", "FastformerForSeq2SeqLM"
_IMAGES = "FastformerForImageClassification"

_TURC = "Turc et al. 2019, https://arxiv.org/abs/1908.08962"
_DEVLIN = "Devlin et al. 2018, https://arxiv.org/abs/1810.04805"
_LIU = "Liu et al. 2019, https://arxiv.org/abs/1907.11692"
_SANH = "Sanh et al. 2019, https://arxiv.org/abs/1910.01108"
_RADFORD = "Radford et al. 2019, Language Models are Unsupervised Multitask Learners, table 2"
_BROWN = "Brown et al. 2020, https://arxiv.org/abs/2005.14165, table 2.1"
_RAFFEL = "Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 3.7"
_LEWIS = "Lewis et al. 2020, https://arxiv.org/abs/1910.13461"
_GRATTAFIORI = "Grattafiori et al. 2024, https://arxiv.org/abs/2407.21783, table 3"
_YANG = "Yang et al. 2025, https://arxiv.org/abs/2505.09388, table 1"
_DOSOVITSKIY = "Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, table 1"

PRESETS = {
    "bert-tiny": Preset(_shape(2, 128, 2), _PRETRAINING, _TURC, "tests and trials on a CPU"),
    "bert-mini": Preset(_shape(4, 256, 4), _PRETRAINING, _TURC, "classification on a CPU, distillation"),
    "bert-small": Preset(_shape(4, 512, 8), _PRETRAINING, _TURC, "classification on a CPU, distillation"),
    "bert-medium": Preset(_shape(8, 512, 8), _PRETRAINING, _TURC, "classification and retrieval at low latency"),
    "bert-base": Preset(_shape(12, 768, 12), _PRETRAINING, _DEVLIN, "classification, tagging, retrieval"),
    "bert-large": Preset(_shape(24, 1024, 16), _PRETRAINING, _DEVLIN, "the same, slower and better"),
    "roberta-base": Preset({**_ROBERTA, **_shape(12, 768, 12)}, _MASKED_LM, _LIU, "classification, tagging, answers"),
    "roberta-large": Preset({**_ROBERTA, **_shape(24, 1024, 16)}, _MASKED_LM, _LIU, "the same, slower and better"),
    "distilbert-base": Preset(
        {**_DISTILBERT, **_shape(6, 768, 12)}, _MASKED_LM, _SANH, "BERT base's tasks at half its cost"
    ),
    "gpt2-small": Preset({**_GPT2, **_shape(12, 768, 12)}, _CAUSAL_LM, _RADFORD, "generation on one small GPU"),
    "gpt2-medium": Preset({**_GPT2, **_shape(24, 1024, 16)}, _CAUSAL_LM, _RADFORD, "generation on one GPU"),
    "gpt2-large": Preset({**_GPT2, **_shape(36, 1280, 20)}, _CAUSAL_LM, _RADFORD, "generation on one GPU"),
    "gpt2-xl": Preset({**_GPT2, **_shape(48, 1600, 25)}, _CAUSAL_LM, _RADFORD, "generation on one large GPU"),
    "gpt3-small": Preset(_gpt3(12, 768, 12), _CAUSAL_LM, _BROWN, "scaling studies: 125M"),
    "gpt3-medium": Preset(_gpt3(24, 1024, 16), _CAUSAL_LM, _BROWN, "scaling studies: 350M"),
    "gpt3-large": Preset(_gpt3(24, 1536, 16), _CAUSAL_LM, _BROWN, "scaling studies: 760M"),
    "gpt3-xl": Preset(_gpt3(24, 2048, 16), _CAUSAL_LM, _BROWN, "pretraining on one node: 1.3B"),
    "gpt3-2.7b": Preset(_gpt3(32, 2560, 32), _CAUSAL_LM, _BROWN, "pretraining on one node"),
    "gpt3-6.7b": Preset(_gpt3(32, 4096, 32), _CAUSAL_LM, _BROWN, "few-shot prompting; pretraining on several nodes"),
    "gpt3-13b": Preset(_gpt3(40, 5120, 40), _CAUSAL_LM, _BROWN, "few-shot prompting; pretraining on several nodes"),
    "gpt3-175b": Preset(_gpt3(96, 12288, 96), _CAUSAL_LM, _BROWN, "few-shot prompting; pretraining on a cluster"),
    "llama3-8b": Preset(
        {**_LLAMA_3, **_shape(32, 4096, 32, 14336)}, _CAUSAL_LM, _GRATTAFIORI, "generation; fine-tuning on one node"
    ),
    "qwen3-0.6b": Preset(
        {**_QWEN3, **_shape(28, 1024, 16, 3072)}, _CAUSAL_LM, _YANG, "generation and fine-tuning on one small GPU"
    ),
    "t5-small": Preset(_t5(6, 512, 8, 64, 2048), _SEQ2SEQ_LM, _RAFFEL, "translation, summaries on a CPU"),
    "t5-base": Preset(_t5(12, 768, 12, 64, 3072), _SEQ2SEQ_LM, _RAFFEL, "translation, summaries, text to text"),
    "t5-large": Preset(_t5(24, 1024, 16, 64, 4096), _SEQ2SEQ_LM, _RAFFEL, "the same, slower and better"),
    "t5-3b": Preset(_t5(24, 1024, 32, 128, 16384), _SEQ2SEQ_LM, _RAFFEL, "text to text; fine-tuning on one node"),
    "t5-11b": Preset(_t5(24, 1024, 128, 128, 65536), _SEQ2SEQ_LM, _RAFFEL, "text to text; fine-tuning on one node"),
    "bart-base": Preset({**_BART, **_shape(6, 768, 12)}, _SEQ2SEQ_LM, _LEWIS, "summaries and rewriting of long text"),
    "bart-large": Preset({**_BART, **_shape(12, 1024, 16)}, _SEQ2SEQ_LM, _LEWIS, "the same, slower and better"),
    "vit-b-16": Preset({**_VIT, **_shape(12, 768, 12)}, _IMAGES, _DOSOVITSKIY, "image classification"),
    "vit-l-16": Preset({**_VIT, **_shape(24, 1024, 16)}, _IMAGES, _DOSOVITSKIY, "the same, with much data"),
}
"""Every published shape by name."""
