"""Conversion of configurations of other architectures to Fastformer's, and back, without loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import Any

from transformers import PreTrainedConfig

from fastformer.models.configuration import HIDDEN_ACTS, FastformerConfig
from fastformer.models.conversion.architecture import Architecture, Fields, Head
from fastformer.models.heads.causal_lm import FastformerForCausalLM
from fastformer.models.heads.classification import (
    FastformerForImageClassification,
    FastformerForSequenceClassification,
    FastformerForTokenClassification,
)
from fastformer.models.heads.masked_lm import FastformerForPreTraining
from fastformer.models.heads.question_answering import FastformerForQuestionAnswering
from fastformer.models.heads.sequence_to_sequence import FastformerForSeq2SeqLM
from fastformer.models.modeling import FastformerModel, FastformerPreTrainedModel

# Fields of every configuration that are copied unchanged: tokens, labels and the like.
_PASSED = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "tie_word_embeddings",
    "initializer_range",
    "id2label",
    "label2id",
    "problem_type",
    "dtype",
    "output_hidden_states",
    "return_dict",
)
_OF_EVERY_CONFIG = {field.name for field in dataclasses.fields(PreTrainedConfig)}

_CLASSIFIERS = (
    FastformerForSequenceClassification,
    FastformerForTokenClassification,
    FastformerForImageClassification,
)
_POOLED = (
    FastformerModel,
    FastformerForPreTraining,
    FastformerForSequenceClassification,
    FastformerForImageClassification,
)


def read_config(architecture: Architecture, head: Head, config: PreTrainedConfig, names: Set[str]) -> FastformerConfig:
    """Return the configuration of a Fastformer model that computes what a model of `head` with `config` computes.

    Args:
        names: the checkpoint's tensors, which determine settings that the configuration does not have.

    Raises:
        ValueError: a field of `config` cannot be expressed; the message names it, its value and what is accepted.
    """
    own = _read(architecture, head, config, names)
    back = _write(architecture, head, own)
    problems = []
    for field in dataclasses.fields(architecture.config_class):
        if field.name in _OF_EVERY_CONFIG | set(_PASSED) | architecture.without_effect | architecture.translated:
            continue
        given, accepted = getattr(config, field.name), getattr(back, field.name)
        if given != accepted:
            problems.append(f"{field.name} must be {accepted!r}; got {given!r}")
    for name, accepted in architecture.undeclared.items():
        if (given := getattr(config, name, accepted)) != accepted:
            problems.append(f"{name} must be {accepted!r}; got {given!r}")
    if config.is_heterogeneous:
        problems.append("per_layer_config must be absent")
    if problems:
        raise ValueError(f"this {architecture.name} has no counterpart in Fastformer: {'; '.join(problems)}")
    return own


def write_config(architecture: Architecture, head: Head, config: FastformerConfig, names: Set[str]) -> PreTrainedConfig:
    """Return the configuration of a model of `head` that computes what a Fastformer model with `config` computes.

    Args:
        names: the tensors that the checkpoint will hold.

    Raises:
        ValueError: the architecture cannot express a field of `config`; the message names it, its value and what is
            accepted.
    """
    theirs = _write(architecture, head, config)
    given = _effective(config, head.ours)
    accepted = _effective(_read(architecture, head, theirs, names), head.ours)
    problems = [
        f"{name} must be {accepted.get(name)!r}; got {given.get(name)!r}"
        for name in sorted(given.keys() | accepted.keys())
        if given.get(name) != accepted.get(name)
    ]
    if problems:
        raise ValueError(f"{head.theirs.__name__} cannot express this model: {'; '.join(problems)}")
    return theirs


def _read(architecture: Architecture, head: Head, config: PreTrainedConfig, names: Set[str]) -> FastformerConfig:
    _check_activation(architecture, config)
    values: Fields = {name: getattr(config, name) for name in _PASSED if hasattr(config, name)}
    values |= architecture.implied
    values |= {ours: getattr(config, theirs) for theirs, ours in architecture.fields.items()}
    values |= architecture.read(config)
    values |= head.implied
    values |= {
        ours: value for theirs, ours in head.fields.items() if (value := getattr(config, theirs, None)) is not None
    }
    for name, fields in head.absent.items():
        if name not in names:
            values |= fields
    return FastformerConfig(**values)


def _check_activation(architecture: Architecture, config: PreTrainedConfig) -> None:
    for theirs, ours in architecture.fields.items():
        if ours == "hidden_act" and (activation := getattr(config, theirs)) not in HIDDEN_ACTS:
            raise ValueError(f"{theirs} must be one of {', '.join(HIDDEN_ACTS)}; got {activation!r}")


def _write(architecture: Architecture, head: Head, config: FastformerConfig) -> PreTrainedConfig:
    declared = {field.name for field in dataclasses.fields(architecture.config_class)}
    passed = {name: getattr(config, name) for name in _PASSED}
    # T5 does not declare the start token of its decoder.
    values: Fields = {
        name: value
        for name, value in passed.items()
        if name in declared or (name == "decoder_start_token_id" and value is not None)
    }
    values |= {theirs: getattr(config, ours) for theirs, ours in (*architecture.fields.items(), *head.fields.items())}
    values |= architecture.write(config)
    if head.ours is FastformerForQuestionAnswering:  # its labels are the start and the end
        values |= {"id2label": None, "label2id": None}
    return architecture.config_class(**values, architectures=[head.theirs.__name__])


def _effective(config: FastformerConfig, model: type[FastformerPreTrainedModel]) -> dict[str, Any]:
    """The fields of `config` that affect a number of a model of this class, each in one canonical form."""
    names = {field.name for field in dataclasses.fields(FastformerConfig)} - _OF_EVERY_CONFIG - set(_PASSED)
    values = {name: getattr(config, name) for name in names - _unused(config, model)}
    for name in ("embedding_scale", "logit_scale"):
        if name in values:
            values[name] = float(values[name])
    dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
    spelled = {
        "hidden_act": HIDDEN_ACTS[config.hidden_act],
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.size_per_head,
        "num_decoder_layers": config.num_decoder_layers or config.num_hidden_layers,
        "attention_scale": config.size_per_head**-0.5 if config.attention_scale is None else config.attention_scale,
        "layer_types": config.windows(config.num_hidden_layers),
        "classifier_dropout": dropout,
        "position_embedding": "none" if config.image_size else config.position_embedding,
    }
    return values | {name: value for name, value in spelled.items() if name in values}


def _unused(config: FastformerConfig, model: type[FastformerPreTrainedModel]) -> set[str]:
    """The fields that a model of this class does not use."""
    # The windows made from `layer_types` contain the sliding window. Learning padding's embedding changes no output.
    unused = {"sliding_window", "train_padding"}
    if config.stack != "encoder_decoder":
        unused |= {"num_decoder_layers"}
    if config.position_embedding != "relative":
        unused |= {"relative_attention_num_buckets", "relative_attention_max_distance"}
    if config.image_size:
        unused |= {"vocab_size", "type_vocab_size", "embedding_norm", "embedding_scale"}
    if config.image_size or config.position_limit is None:
        unused |= {"max_position_embeddings"}
    if config.image_size or config.position_embedding not in ("learned", "sinusoidal"):
        unused |= {"pad_positions"}
    if model not in _POOLED or (model is FastformerModel and config.stack == "decoder"):
        unused |= {"pooling", "pooler_act"}
    elif model is FastformerModel and config.pooler_act == "none":
        unused |= {"pooling"}
    if model not in _CLASSIFIERS:
        unused |= {"classifier_dropout", "classifier_bias"}
    if model is not FastformerForSeq2SeqLM and model is not FastformerForCausalLM:
        unused |= {"lm_head_bias", "logit_scale"}
    return unused
