"""BART (Lewis et al. 2020), mBART (Liu et al. 2020) and Marian (Junczys-Dowmunt et al. 2018).

The fixed ``final_logits_bias`` becomes the bias of Fastformer's output projection.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor
from transformers import BartConfig, MarianConfig, MBartConfig, PreTrainedModel

from fastformer.models.configuration import FastformerConfig
from fastformer.models.conversion.architecture import Architecture, Head
from fastformer.models.conversion.tensors import Broadcast, LaterRows, Source, Table
from fastformer.models.heads.sequence_to_sequence import FastformerEncoderDecoderModel, FastformerForSeq2SeqLM
from fastformer.nn import SinusoidalEmbedding

_IMPLIED = {
    "stack": "encoder_decoder",
    "layer_norm_eps": 1e-5,
    "type_vocab_size": 0,
    "lm_head_bias": True,
    "pooler_act": "none",
}
_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "d_model": "hidden_size",
    "encoder_layers": "num_hidden_layers",
    "decoder_layers": "num_decoder_layers",
    "encoder_attention_heads": "num_attention_heads",
    "encoder_ffn_dim": "intermediate_size",
    "activation_function": "hidden_act",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "activation_dropout": "activation_dropout",
}
# A forced end token matters only in generation.
_WITHOUT_EFFECT = frozenset({"init_std", "use_cache", "classifier_dropout", "forced_eos_token_id"})
_BUFFERS = (r"(model\.)?(encoder|decoder)\.version",)
# A table has two extra rows before its first position.
_FIRST_POSITION = 2


def _read(config: BartConfig | MBartConfig | MarianConfig) -> dict[str, Any]:
    assert config.d_model is not None
    return {"embedding_scale": config.d_model**0.5 if config.scale_embedding else 1.0}


def _write(config: FastformerConfig) -> dict[str, Any]:
    return {
        "decoder_layers": config.num_decoder_layers or config.num_hidden_layers,
        "decoder_attention_heads": config.num_attention_heads,
        "decoder_ffn_dim": config.intermediate_size,
        "scale_embedding": config.embedding_scale != 1.0,
    }


def _tensors(config: FastformerConfig) -> Table:
    table: dict[str, Source | str | tuple[str, ...]] = {"encoder.embeddings.word": "shared"}
    for stack in ("encoder.", "decoder."):
        block = f"{stack}layers.*."
        table |= {
            f"{stack}embeddings.position": LaterRows(f"{stack}embed_positions", _FIRST_POSITION),
            f"{stack}embeddings.norm": f"{stack}layernorm_embedding",
            f"{block}attention.qkv": tuple(f"{block}self_attn.{part}_proj" for part in "qkv"),
            f"{block}attention.output": f"{block}self_attn.out_proj",
            f"{block}attention_norm": f"{block}self_attn_layer_norm",
            f"{block}cross_attention.query": f"{block}encoder_attn.q_proj",
            f"{block}cross_attention.key_value": tuple(f"{block}encoder_attn.{part}_proj" for part in "kv"),
            f"{block}cross_attention.output": f"{block}encoder_attn.out_proj",
            f"{block}cross_attention_norm": f"{block}encoder_attn_layer_norm",
            f"{block}feed_forward.up": f"{block}fc1",
            f"{block}feed_forward.down": f"{block}fc2",
            f"{block}feed_forward_norm": f"{block}final_layer_norm",
            f"{stack}norm": f"{stack}layer_norm",
        }
    return table


_PREFIXES, _STACKS = ("", "model."), ("encoder", "decoder")
_COPIES = {
    f"{prefix}{stack}.embed_tokens.weight": f"{prefix}shared.weight" for prefix in _PREFIXES for stack in _STACKS
}


def _heads(base: type[PreTrainedModel], language_model: type[PreTrainedModel]) -> tuple[Head, ...]:
    return (
        Head(base, FastformerEncoderDecoderModel),
        Head(
            language_model,
            FastformerForSeq2SeqLM,
            {"lm_head.weight": "lm_head.weight", "lm_head.bias": Broadcast("final_logits_bias", 1)},
            prefix="model.",
            absent={"final_logits_bias": {"lm_head_bias": False}},
        ),
    )


BART = Architecture(
    config_class=BartConfig,
    implied=_IMPLIED,
    fields=_FIELDS,
    read=_read,
    write=_write,
    without_effect=_WITHOUT_EFFECT,
    tensors=_tensors,
    copies=_COPIES,
    buffers=_BUFFERS,
    heads=_heads(transformers.BartModel, transformers.BartForConditionalGeneration),
)

MBART = Architecture(
    config_class=MBartConfig,
    implied={**_IMPLIED, "norm_placement": "pre"},
    fields=_FIELDS,
    read=_read,
    write=_write,
    without_effect=_WITHOUT_EFFECT,
    tensors=_tensors,
    copies=_COPIES,
    buffers=_BUFFERS,
    heads=_heads(transformers.MBartModel, transformers.MBartForConditionalGeneration),
)


def _write_marian(config: FastformerConfig) -> dict[str, Any]:
    return {**_write(config), "decoder_vocab_size": config.vocab_size}


def _marian_positions(config: FastformerConfig) -> dict[str, Tensor]:
    table = SinusoidalEmbedding(config.max_position_embeddings, config.hidden_size).weight
    return {f"{prefix}{stack}.embed_positions.weight": table for prefix in _PREFIXES for stack in _STACKS}


MARIAN = Architecture(
    config_class=MarianConfig,
    implied={**_IMPLIED, "position_embedding": "sinusoidal", "embedding_norm": False},
    fields=_FIELDS,
    read=_read,
    write=_write_marian,
    without_effect=_WITHOUT_EFFECT,
    tensors=_tensors,
    copies=_COPIES,
    computed=_marian_positions,
    buffers=_BUFFERS,
    heads=_heads(transformers.MarianModel, transformers.MarianMTModel),
)
