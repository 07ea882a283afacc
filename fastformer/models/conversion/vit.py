"""The Vision Transformer (Dosovitskiy et al. 2021)."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import ViTConfig

from fastformer.models.configuration import FastformerConfig
from fastformer.models.conversion.architecture import Architecture, Head
from fastformer.models.conversion.tensors import Broadcast, Table
from fastformer.models.heads.classification import FastformerForImageClassification
from fastformer.models.modeling import FastformerModel


def _tensors(config: FastformerConfig) -> Table:
    block = "encoder.layer.*."
    return {
        "embeddings.image": Broadcast("embeddings.cls_token", 2),
        "embeddings.position.weight": Broadcast("embeddings.position_embeddings", 1),
        "embeddings.projection": "embeddings.patch_embeddings.projection",
        "layers.*.attention_norm": f"{block}layernorm_before",
        "layers.*.attention.qkv": tuple(f"{block}attention.attention.{part}" for part in ("query", "key", "value")),
        "layers.*.attention.output": f"{block}attention.output.dense",
        "layers.*.feed_forward_norm": f"{block}layernorm_after",
        "layers.*.feed_forward.up": f"{block}intermediate.dense",
        "layers.*.feed_forward.down": f"{block}output.dense",
        "norm": "layernorm",
        "pooler.dense": "pooler.dense",
    }


def _side(name: str, size: int | list[int] | tuple[int, int]) -> int:
    """Return the side of a square."""
    sides = [size] if isinstance(size, int) else list(size)
    if len(set(sides)) != 1:
        raise ValueError(f"{name} must be square; got {size}")
    return sides[0]


def _read(config: ViTConfig) -> dict[str, Any]:
    return {
        "image_size": _side("image_size", config.image_size),
        "patch_size": _side("patch_size", config.patch_size),
    }


def _write(config: FastformerConfig) -> dict[str, Any]:
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        # The tensors determine whether there is a pooler.
        "pooler_act": "tanh" if config.pooler_act == "none" else config.pooler_act,
    }


VIT = Architecture(
    config_class=ViTConfig,
    implied={
        "norm_placement": "pre",
        "position_embedding": "none",
        "type_vocab_size": 0,
        "pad_token_id": None,
    },
    fields={
        "hidden_size": "hidden_size",
        "num_hidden_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "hidden_act": "hidden_act",
        "hidden_dropout_prob": "hidden_dropout_prob",
        "attention_probs_dropout_prob": "attention_probs_dropout_prob",
        "layer_norm_eps": "layer_norm_eps",
        "num_channels": "num_channels",
        "qkv_bias": "attention_bias",
    },
    read=_read,
    write=_write,
    translated=frozenset({"image_size", "patch_size"}),
    without_effect=frozenset({"initializer_range", "encoder_stride", "pooler_act"}),
    tensors=_tensors,
    # transformers 5 has these names in memory, and the old names in its files.
    renamed={
        r"^((?:vit\.)?)layers\.": r"\1encoder.layer.",
        r"\.attention\.q_proj\.": ".attention.attention.query.",
        r"\.attention\.k_proj\.": ".attention.attention.key.",
        r"\.attention\.v_proj\.": ".attention.attention.value.",
        r"\.attention\.o_proj\.": ".attention.output.dense.",
        r"\.mlp\.fc1\.": ".intermediate.dense.",
        r"\.mlp\.fc2\.": ".output.dense.",
    },
    heads=(
        Head(
            transformers.ViTModel,
            FastformerModel,
            fields={"pooler_act": "pooler_act"},
            absent={"pooler.dense.weight": {"pooler_act": "none"}},
        ),
        Head(
            transformers.ViTForImageClassification,
            FastformerForImageClassification,
            {"classifier.projection": "classifier"},
            prefix="vit.",
            implied={"pooler_act": "none", "classifier_dropout": 0.0},
        ),
    ),
)
