"""GPT-2 (Radford et al. 2019) and GPT-Neo (Black et al. 2021), which like GPT-3 alternates full and local attention."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import GPT2Config, GPTNeoConfig, PreTrainedModel

from fastformer.models.configuration import FastformerConfig
from fastformer.models.conversion.architecture import Architecture, Head
from fastformer.models.conversion.tensors import Table, Transposed
from fastformer.models.heads.causal_lm import FastformerForCausalLM
from fastformer.models.heads.classification import (
    FastformerForSequenceClassification,
    FastformerForTokenClassification,
)
from fastformer.models.heads.question_answering import FastformerForQuestionAnswering
from fastformer.models.modeling import FastformerModel

_IMPLIED = {
    "stack": "decoder",
    "norm_placement": "pre",
    "embedding_norm": False,
    "type_vocab_size": 0,
    "train_padding": True,
    "pooling": "last",
    "pooler_act": "none",
}


def _heads(
    base: type[PreTrainedModel],
    causal_lm: type[PreTrainedModel],
    sequences: type[PreTrainedModel],
    tokens: type[PreTrainedModel],
    answers: type[PreTrainedModel],
) -> tuple[Head, ...]:
    prefix = "transformer."
    return (
        Head(base, FastformerModel),
        Head(causal_lm, FastformerForCausalLM, {"lm_head": "lm_head"}, prefix),
        Head(
            sequences,
            FastformerForSequenceClassification,
            {"classifier.projection": "score"},
            prefix,
            implied={"classifier_bias": False, "classifier_dropout": 0.0},
        ),
        Head(
            tokens,
            FastformerForTokenClassification,
            {"classifier.projection": "classifier"},
            prefix,
            implied={"classifier_dropout": 0.1},
            fields={"classifier_dropout": "classifier_dropout"},
        ),
        Head(answers, FastformerForQuestionAnswering, {"span": "qa_outputs"}, prefix),
    )


def _tensors(config: FastformerConfig) -> Table:
    return {
        "embeddings.word": "wte",
        "embeddings.position": "wpe",
        "layers.*.attention_norm": "h.*.ln_1",
        "layers.*.attention.qkv": Transposed("h.*.attn.c_attn"),
        "layers.*.attention.output": Transposed("h.*.attn.c_proj"),
        "layers.*.feed_forward_norm": "h.*.ln_2",
        "layers.*.feed_forward.up": Transposed("h.*.mlp.c_fc"),
        "layers.*.feed_forward.down": Transposed("h.*.mlp.c_proj"),
        "norm": "ln_f",
    }


def _read_gpt2(config: GPT2Config) -> dict[str, Any]:
    return {
        "intermediate_size": config.n_inner or 4 * config.n_embd,
        "attention_scale": None if config.scale_attn_weights else 1.0,
    }


def _write_gpt2(config: FastformerConfig) -> dict[str, Any]:
    return {
        "n_inner": None if config.intermediate_size == 4 * config.hidden_size else config.intermediate_size,
        "scale_attn_weights": config.attention_scale != 1.0,
        "embd_pdrop": config.hidden_dropout_prob,
    }


GPT2 = Architecture(
    config_class=GPT2Config,
    implied=_IMPLIED,
    fields={
        "vocab_size": "vocab_size",
        "n_positions": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "activation_function": "hidden_act",
        "resid_pdrop": "hidden_dropout_prob",
        "attn_pdrop": "attention_probs_dropout_prob",
        "layer_norm_epsilon": "layer_norm_eps",
    },
    read=_read_gpt2,
    write=_write_gpt2,
    translated=frozenset({"n_inner", "scale_attn_weights"}),
    # Summaries belong to a class that is not supported here; attention is computed in float32 in any case.
    without_effect=frozenset(
        {
            "initializer_range",
            "use_cache",
            "reorder_and_upcast_attn",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
        }
    ),
    undeclared={"hidden_dropout": None},
    tensors=_tensors,
    buffers=(r".*\.attn\.(masked_)?bias",),
    heads=_heads(
        transformers.GPT2Model,
        transformers.GPT2LMHeadModel,
        transformers.GPT2ForSequenceClassification,
        transformers.GPT2ForTokenClassification,
        transformers.GPT2ForQuestionAnswering,
    ),
)


def _neo_tensors(config: FastformerConfig) -> Table:
    return {
        "embeddings.word": "wte",
        "embeddings.position": "wpe",
        "layers.*.attention_norm": "h.*.ln_1",
        "layers.*.attention.qkv": tuple(f"h.*.attn.attention.{part}_proj" for part in "qkv"),
        "layers.*.attention.output": "h.*.attn.attention.out_proj",
        "layers.*.feed_forward_norm": "h.*.ln_2",
        "layers.*.feed_forward.up": "h.*.mlp.c_fc",
        "layers.*.feed_forward.down": "h.*.mlp.c_proj",
        "norm": "ln_f",
    }


def _read_neo(config: GPTNeoConfig) -> dict[str, Any]:
    kinds = {"global": "full_attention", "local": "sliding_attention"}
    types = [kinds[kind] for kind in config.attention_layers]
    local = "sliding_attention" in types
    return {
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "layer_types": types if local else None,
        "sliding_window": config.window_size if local else None,
    }


def _write_neo(config: FastformerConfig) -> dict[str, Any]:
    windows = config.windows(config.num_hidden_layers)
    local = {} if config.sliding_window is None else {"window_size": config.sliding_window}
    return {
        **local,
        "intermediate_size": config.intermediate_size,
        "attention_types": [[["local" if window else "global"], 1] for window in windows],
        "embed_dropout": config.hidden_dropout_prob,
    }


GPT_NEO = Architecture(
    config_class=GPTNeoConfig,
    implied={**_IMPLIED, "attention_bias": False, "attention_scale": 1.0},
    fields={
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "activation_function": "hidden_act",
        "resid_dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
        "layer_norm_epsilon": "layer_norm_eps",
    },
    read=_read_neo,
    write=_write_neo,
    translated=frozenset({"intermediate_size", "attention_types", "window_size"}),
    without_effect=frozenset({"initializer_range", "use_cache", "classifier_dropout"}),
    tensors=_neo_tensors,
    buffers=(r".*\.attn\.attention\.(masked_)?bias",),
    heads=_heads(
        transformers.GPTNeoModel,
        transformers.GPTNeoForCausalLM,
        transformers.GPTNeoForSequenceClassification,
        transformers.GPTNeoForTokenClassification,
        transformers.GPTNeoForQuestionAnswering,
    ),
)
