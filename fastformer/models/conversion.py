"""Weights and configurations of other architectures, as Fastformer's."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from transformers import BertConfig

from fastformer.models.configuration import FastformerConfig
from fastformer.models.modeling import FastformerPreTrainedModel

# Fastformer's names of modules and BERT's; three sources are one after the other in one tensor.
_BERT_MODULES: dict[str, tuple[str, ...]] = {
    r"model\.embeddings\.(word|position|token_type)": (r"bert.embeddings.\1_embeddings",),
    r"model\.embeddings\.norm": ("bert.embeddings.LayerNorm",),
    r"model\.layers\.(\d+)\.attention\.qkv": tuple(
        rf"bert.encoder.layer.\1.attention.self.{part}" for part in ("query", "key", "value")
    ),
    r"model\.layers\.(\d+)\.attention\.output": (r"bert.encoder.layer.\1.attention.output.dense",),
    r"model\.layers\.(\d+)\.attention_norm": (r"bert.encoder.layer.\1.attention.output.LayerNorm",),
    r"model\.layers\.(\d+)\.feed_forward\.up": (r"bert.encoder.layer.\1.intermediate.dense",),
    r"model\.layers\.(\d+)\.feed_forward\.down": (r"bert.encoder.layer.\1.output.dense",),
    r"model\.layers\.(\d+)\.feed_forward_norm": (r"bert.encoder.layer.\1.output.LayerNorm",),
    r"model\.pooler\.dense": ("bert.pooler.dense",),
    r"mlm_head\.dense": ("cls.predictions.transform.dense",),
    r"mlm_head\.norm": ("cls.predictions.transform.LayerNorm",),
    r"mlm_head\.decoder": ("cls.predictions.decoder",),
    r"nsp_head": ("cls.seq_relationship",),
    r"classifier\.projection": ("classifier",),
}

# Copies of other tensors, and buffers, that some versions of Hugging Face's BERT save.
_BERT_REDUNDANT = ("cls.predictions.bias", "bert.embeddings.position_ids", "bert.embeddings.token_type_ids")


def config_from_bert(config: BertConfig) -> FastformerConfig:
    """The configuration of a Fastformer model that computes what a BERT of `config` does.

    Raises:
        ValueError: `config` is a decoder's, or has relative positions.
    """
    if config.is_decoder or config.add_cross_attention:
        raise ValueError("config must be an encoder's; got is_decoder or add_cross_attention")
    positions = getattr(config, "position_embedding_type", None)
    if positions not in (None, "absolute"):
        raise ValueError(f"position_embedding_type must be 'absolute'; got {positions!r}")
    given, own = config.to_dict(), FastformerConfig().to_dict()
    kept = {name: value for name, value in given.items() if name in own and name not in ("model_type", "architectures")}
    return FastformerConfig(**kept)


def load_bert(model: FastformerPreTrainedModel, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Load the weights of Hugging Face's BertModel, BertForPreTraining, BertForMaskedLM, ... into `model`, in place.

    Args:
        model: the Fastformer model with the same heads.
        state_dict: BERT's, with or without the prefix ``bert.``.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape; the message lists all of them.
    """
    given = _bert_tensors(state_dict)
    prefix = "" if hasattr(model, model.base_model_prefix) else f"{model.base_model_prefix}."
    sources = {name: _bert_names(prefix + name) for name in model.state_dict()}
    needed = {source for names in sources.values() for source in names}
    problems = [f"missing {name}" for name in sorted(needed - given.keys())]
    problems += [f"left over {name}" for name in sorted(given.keys() - needed - set(_BERT_REDUNDANT))]
    if not problems:
        converted = {name: torch.cat([given[source] for source in names]) for name, names in sources.items()}
        problems = [
            f"{name} has shape {tuple(converted[name].shape)}, the model's {tuple(tensor.shape)}"
            for name, tensor in model.state_dict().items()
            if converted[name].shape != tensor.shape
        ]
    if problems:
        raise ValueError(f"this is not the state_dict of a matching BERT: {'; '.join(problems)}")
    model.load_state_dict(converted)


def _bert_names(name: str) -> tuple[str, ...]:
    """BERT's names of the tensors that make up Fastformer's tensor `name`."""
    module, _, kind = name.rpartition(".")
    for pattern, sources in _BERT_MODULES.items():
        if match := re.fullmatch(pattern, module):
            return tuple(f"{match.expand(source)}.{kind}" for source in sources)
    raise KeyError(f"BERT has no counterpart of {name}")


def _bert_tensors(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state_dict` with the prefix ``bert.`` and with the tied tensors that a file leaves out."""
    with_heads = any(name.startswith("bert.") for name in state_dict)
    tensors = {name if with_heads else f"bert.{name}": tensor for name, tensor in state_dict.items()}
    if "cls.predictions.transform.dense.weight" in tensors:
        for tied, source in (
            ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
            ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ):
            if source in tensors:
                tensors.setdefault(tied, tensors[source])
    return tensors
