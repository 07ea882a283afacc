"""Llama (Touvron et al. 2023), Qwen 2 and 3 (Yang et al. 2024, 2025) and Mistral (Jiang et al. 2023)."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from fastformer.models.configuration import FastformerConfig
from fastformer.models.conversion.architecture import Architecture, Head
from fastformer.models.conversion.tensors import Table
from fastformer.models.heads.causal_lm import FastformerForCausalLM
from fastformer.models.heads.classification import (
    FastformerForSequenceClassification,
    FastformerForTokenClassification,
)
from fastformer.models.heads.question_answering import FastformerForQuestionAnswering
from fastformer.models.modeling import FastformerModel

_IMPLIED = {
    "stack": "decoder",
    "gated": True,
    "position_embedding": "rotary",
    "norm": "rms",
    "norm_placement": "pre",
    "embedding_norm": False,
    "attention_bias": False,
    "attention_output_bias": False,
    "feed_forward_bias": False,
    "hidden_dropout_prob": 0.0,
    "type_vocab_size": 0,
    "pooling": "last",
    "pooler_act": "none",
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_act": "hidden_act",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layer_norm_eps",
    "rope_parameters": "rope_parameters",
    "attention_dropout": "attention_probs_dropout_prob",
}
_WITHOUT_EFFECT = frozenset({"initializer_range", "use_cache", "pretraining_tp"})
_UNDECLARED = {"hidden_dropout": None, "token_classification_bias": True}
_BUFFERS = (r".*\.rotary_emb\.inv_freq",)


def _tensors(config: FastformerConfig) -> Table:
    block = "layers.*."
    return {
        "embeddings.word": "embed_tokens",
        "layers.*.attention_norm": f"{block}input_layernorm",
        "layers.*.attention.qkv": tuple(f"{block}self_attn.{part}_proj" for part in "qkv"),
        "layers.*.attention.output": f"{block}self_attn.o_proj",
        "layers.*.attention.query_norm": f"{block}self_attn.q_norm",
        "layers.*.attention.key_norm": f"{block}self_attn.k_norm",
        "layers.*.feed_forward_norm": f"{block}post_attention_layernorm",
        "layers.*.feed_forward.gate": f"{block}mlp.gate_proj",
        "layers.*.feed_forward.up": f"{block}mlp.up_proj",
        "layers.*.feed_forward.down": f"{block}mlp.down_proj",
        "norm": "norm",
    }


def _heads(
    base: type[PreTrainedModel],
    causal_lm: type[PreTrainedModel],
    sequences: type[PreTrainedModel],
    tokens: type[PreTrainedModel],
    answers: type[PreTrainedModel],
) -> tuple[Head, ...]:
    score: Table = {"classifier.projection": "score"}
    return (
        Head(base, FastformerModel),
        Head(causal_lm, FastformerForCausalLM, {"lm_head": "lm_head"}, prefix="model."),
        Head(
            sequences,
            FastformerForSequenceClassification,
            score,
            prefix="model.",
            implied={"classifier_bias": False, "classifier_dropout": 0.0},
        ),
        Head(
            tokens,
            FastformerForTokenClassification,
            score,
            prefix="model.",
            implied={"classifier_dropout": 0.1},
            fields={"classifier_dropout": "classifier_dropout"},
        ),
        Head(answers, FastformerForQuestionAnswering, {"span": "qa_outputs"}, prefix=f"{answers.base_model_prefix}."),
    )


def _head_dim(config: FastformerConfig) -> dict[str, Any]:
    return {"head_dim": config.size_per_head, "num_key_value_heads": config.kv_heads}


def _read_llama(config: transformers.LlamaConfig) -> dict[str, Any]:
    return {"head_dim": config.head_dim, "attention_output_bias": config.attention_bias}


LLAMA = Architecture(
    config_class=transformers.LlamaConfig,
    implied=_IMPLIED,
    fields={**_FIELDS, "attention_bias": "attention_bias", "mlp_bias": "feed_forward_bias"},
    read=_read_llama,
    write=_head_dim,
    without_effect=_WITHOUT_EFFECT,
    undeclared=_UNDECLARED,
    tensors=_tensors,
    buffers=_BUFFERS,
    heads=_heads(
        transformers.LlamaModel,
        transformers.LlamaForCausalLM,
        transformers.LlamaForSequenceClassification,
        transformers.LlamaForTokenClassification,
        transformers.LlamaForQuestionAnswering,
    ),
)


def _read_windows(config: Qwen2Config | Qwen3Config) -> dict[str, Any]:
    types = config.layer_types
    sliding = types is not None and any(kind != "full_attention" for kind in types)
    return {
        "layer_types": types if sliding else None,
        "sliding_window": config.sliding_window if sliding else None,
        "head_dim": getattr(config, "head_dim", None),
    }


def _write_windows(config: FastformerConfig) -> dict[str, Any]:
    windows = config.windows(config.num_hidden_layers)
    sliding = any(windows)
    return {
        **_head_dim(config),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        "sliding_window": config.sliding_window if sliding else None,
        "use_sliding_window": sliding,
        "max_window_layers": next((layer for layer, window in enumerate(windows) if window), len(windows)),
    }


_WINDOWS = frozenset({"layer_types", "sliding_window", "use_sliding_window", "max_window_layers"})

QWEN2 = Architecture(
    config_class=Qwen2Config,
    implied={**_IMPLIED, "attention_bias": True},
    fields=_FIELDS,
    read=_read_windows,
    write=_write_windows,
    translated=_WINDOWS,
    without_effect=_WITHOUT_EFFECT,
    undeclared=_UNDECLARED,
    tensors=_tensors,
    buffers=_BUFFERS,
    heads=_heads(
        transformers.Qwen2Model,
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2ForSequenceClassification,
        transformers.Qwen2ForTokenClassification,
        transformers.Qwen2ForQuestionAnswering,
    ),
)


def _read_qwen3(config: Qwen3Config) -> dict[str, Any]:
    return {**_read_windows(config), "attention_output_bias": config.attention_bias}


QWEN3 = Architecture(
    config_class=Qwen3Config,
    implied={**_IMPLIED, "qk_norm": True},
    fields={**_FIELDS, "attention_bias": "attention_bias"},
    read=_read_qwen3,
    write=_write_windows,
    translated=_WINDOWS,
    without_effect=_WITHOUT_EFFECT,
    undeclared=_UNDECLARED,
    tensors=_tensors,
    buffers=_BUFFERS,
    heads=_heads(
        transformers.Qwen3Model,
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3ForSequenceClassification,
        transformers.Qwen3ForTokenClassification,
        transformers.Qwen3ForQuestionAnswering,
    ),
)


def _read_mistral(config: MistralConfig) -> dict[str, Any]:
    return {"head_dim": config.head_dim, "sliding_window": config.sliding_window}


def _write_mistral(config: FastformerConfig) -> dict[str, Any]:
    windows = config.windows(config.num_hidden_layers)
    return {**_head_dim(config), "sliding_window": windows[0]}


MISTRAL = Architecture(
    config_class=MistralConfig,
    implied=_IMPLIED,
    fields=_FIELDS,
    read=_read_mistral,
    write=_write_mistral,
    without_effect=_WITHOUT_EFFECT,
    undeclared={**_UNDECLARED, "layer_types": None},
    tensors=_tensors,
    buffers=_BUFFERS,
    heads=_heads(
        transformers.MistralModel,
        transformers.MistralForCausalLM,
        transformers.MistralForSequenceClassification,
        transformers.MistralForTokenClassification,
        transformers.MistralForQuestionAnswering,
    ),
)
