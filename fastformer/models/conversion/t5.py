"""T5 (Raffel et al. 2020): version 1.0, and 1.1 with its gated feed-forward network and untied output.

Dropout after the last norm is left out, since Fastformer's stacks do not have it.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import T5Config

from fastformer.models.configuration import FastformerConfig
from fastformer.models.conversion.architecture import Architecture, Head
from fastformer.models.conversion.tensors import Table
from fastformer.models.heads.classification import FastformerForTokenClassification
from fastformer.models.heads.sequence_to_sequence import FastformerEncoderDecoderModel, FastformerForSeq2SeqLM
from fastformer.models.modeling import FastformerModel


def _stack(ours: str, theirs: str, sublayers: int, gated: bool) -> Table:
    block, attention = f"{theirs}block.*.", f"{theirs}block.*.layer.0.SelfAttention."
    network, number = f"{block}layer.{sublayers - 1}.DenseReluDense.", sublayers - 1
    table: dict[str, str | tuple[str, ...]] = {
        "layers.*.attention.qkv": tuple(f"{attention}{part}" for part in "qkv"),
        "layers.*.attention.output": f"{attention}o",
        "layers.*.attention_norm": f"{block}layer.0.layer_norm",
        "relative_bias.table": f"{theirs}block.0.layer.0.SelfAttention.relative_attention_bias",
        "layers.*.feed_forward.up": f"{network}{'wi_1' if gated else 'wi'}",
        "layers.*.feed_forward.gate": f"{network}wi_0",
        "layers.*.feed_forward.down": f"{network}wo",
        "layers.*.feed_forward_norm": f"{block}layer.{number}.layer_norm",
        "layers.*.cross_attention.query": f"{block}layer.1.EncDecAttention.q",
        "layers.*.cross_attention.key_value": tuple(f"{block}layer.1.EncDecAttention.{part}" for part in "kv"),
        "layers.*.cross_attention.output": f"{block}layer.1.EncDecAttention.o",
        "layers.*.cross_attention_norm": f"{block}layer.1.layer_norm",
        "norm": f"{theirs}final_layer_norm",
    }
    return {f"{ours}{name}": place for name, place in table.items()}


def _tensors(config: FastformerConfig) -> Table:
    if config.stack == "encoder":
        return {"embeddings.word": "shared", **_stack("", "encoder.", 2, config.gated)}
    return {
        "encoder.embeddings.word": "shared",
        **_stack("encoder.", "encoder.", 2, config.gated),
        **_stack("decoder.", "decoder.", 3, config.gated),
    }


def _read(config: T5Config) -> dict[str, Any]:
    return {
        "num_decoder_layers": config.num_decoder_layers,
        "hidden_act": config.dense_act_fn,
        "gated": config.is_gated_act,
        "logit_scale": config.d_model**-0.5 if config.scale_decoder_outputs else 1.0,
        "attention_probs_dropout_prob": config.dropout_rate,
        "activation_dropout": config.dropout_rate,
    }


def _write(config: FastformerConfig) -> dict[str, Any]:
    activation = "gelu" if config.gated and config.hidden_act == "gelu_new" else config.hidden_act
    return {
        "d_kv": config.size_per_head,
        "num_decoder_layers": config.num_decoder_layers or config.num_hidden_layers,
        "feed_forward_proj": f"gated-{activation}" if config.gated else activation,
        # T5Config's sign that the output is not scaled; the output is untied if its tensor differs.
        "tie_word_embeddings": config.logit_scale != 1.0,
    }


_ENCODER = {"stack": "encoder", "num_decoder_layers": None}

T5 = Architecture(
    config_class=T5Config,
    implied={
        "stack": "encoder_decoder",
        "position_embedding": "relative",
        "norm": "rms",
        "norm_placement": "pre",
        "embedding_norm": False,
        "attention_bias": False,
        "attention_output_bias": False,
        "feed_forward_bias": False,
        "attention_scale": 1.0,
        "type_vocab_size": 0,
        "train_padding": True,
        "pooler_act": "none",
    },
    fields={
        "vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "d_kv": "head_dim",
        "d_ff": "intermediate_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "relative_attention_num_buckets": "relative_attention_num_buckets",
        "relative_attention_max_distance": "relative_attention_max_distance",
        "dropout_rate": "hidden_dropout_prob",
        "layer_norm_epsilon": "layer_norm_eps",
    },
    read=_read,
    write=_write,
    translated=frozenset({"num_decoder_layers", "feed_forward_proj"}),
    # The class determines whether there is a decoder.
    without_effect=frozenset(
        {"initializer_factor", "use_cache", "is_encoder_decoder", "is_decoder", "classifier_dropout"}
    ),
    tensors=_tensors,
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "transformer.encoder.embed_tokens.weight": "transformer.shared.weight",
    },
    buffers=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    heads=(
        Head(transformers.T5Model, FastformerEncoderDecoderModel),
        Head(transformers.T5ForConditionalGeneration, FastformerForSeq2SeqLM, {"lm_head": "lm_head"}),
        Head(transformers.T5EncoderModel, FastformerModel, implied=_ENCODER),
        Head(
            transformers.T5ForTokenClassification,
            FastformerForTokenClassification,
            {"classifier.projection": "classifier"},
            prefix="transformer.",
            implied=_ENCODER,
            fields={"classifier_dropout": "classifier_dropout"},
        ),
    ),
)
