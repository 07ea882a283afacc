"""The starting point of fine-tuning: a model from a folder, or with random weights, with the task's head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastformer.data.labelled.features import MATCH_TYPE
from fastformer.models import (
    FastformerConfig,
    FastformerForCausalLM,
    FastformerForEmbedding,
    FastformerForQuestionAnswering,
    FastformerForSeq2SeqLM,
    FastformerForSequenceClassification,
    FastformerForTokenClassification,
    FastformerPreTrainedModel,
    preset,
)
from fastformer.models.loading import load_configuration, load_model

Task = Literal["classify", "tag", "qa", "summarize", "translate", "generate", "embed"]


class Classes(NamedTuple):
    """The model classes of a task: Fastformer's, and Hugging Face's Auto class."""

    ours: type[FastformerPreTrainedModel]
    auto: Any


CLASSES: dict[str, Classes] = {
    "classify": Classes(FastformerForSequenceClassification, AutoModelForSequenceClassification),
    "tag": Classes(FastformerForTokenClassification, AutoModelForTokenClassification),
    "qa": Classes(FastformerForQuestionAnswering, AutoModelForQuestionAnswering),
    "summarize": Classes(FastformerForSeq2SeqLM, AutoModelForSeq2SeqLM),
    "translate": Classes(FastformerForSeq2SeqLM, AutoModelForSeq2SeqLM),
    "generate": Classes(FastformerForCausalLM, AutoModelForCausalLM),
    "embed": Classes(FastformerForEmbedding, AutoModel),
}

# From scratch: BERT for labels and embeddings. Modern blocks for generating text, and for finding answers, which depend
# on neighbouring words: learned positions need many steps to show what is next to what.
_TODAY: dict[str, Any] = {
    "norm": "rms",
    "norm_placement": "pre",
    "embedding_norm": False,
    "position_embedding": "rotary",
}
_QUESTION_ANSWERING = {**_TODAY, "type_vocab_size": MATCH_TYPE + 1}
_STACKS: dict[str, dict[str, Any]] = {
    "encoder": {},
    "decoder": {**_TODAY, "stack": "decoder", "type_vocab_size": 0},
    "encoder_decoder": {**_TODAY, "stack": "encoder_decoder", "type_vocab_size": 0},
}


class StartingPoint(NamedTuple):
    """A model with the task's head.

    Attributes:
        model: Fastformer's or Hugging Face's model.
        new_layers: names of the modules whose weights are not pretrained; None if no weights are pretrained.
        attention: name of the attention implementation.
    """

    model: PreTrainedModel
    new_layers: list[str] | None
    attention: str

    @property
    def packed(self) -> bool:
        """Whether the model takes packed batches."""
        return isinstance(self.model, FastformerPreTrainedModel)


def pretrained(folder: str | Path, task: Task, labels: Sequence[str] | None = None) -> StartingPoint:
    """Load the model in a folder of Hugging Face's format.

    A model of another architecture runs as it is. It uses Fastformer's attention if its attention can be replaced and
    ours is registered with transformers, and otherwise its own.

    Args:
        folder: has config.json and weights.
        task: decides the head.
        labels: names of the classes, for classify and tag; a single one for regression. None keeps the model's.

    Raises:
        OSError: there is no model in the folder.
        ValueError: the model cannot have the task's head, or weights outside the head are missing.
    """
    ours = isinstance(_configuration(folder), FastformerConfig)
    options: dict[str, Any] = {"trust_remote_code": False, **_label_fields(labels)}
    if ours:
        if task == "embed":
            options["pooling"] = "mean"
        model, new = load_model(CLASSES[task].ours, folder, **options)
        attention = "fastformer"
        if task == "qa" and model.config.type_vocab_size == MATCH_TYPE:
            _add_match_type(model)
    else:
        model, new, attention = _foreign(folder, task, options)
    return StartingPoint(model, _modules_of(new), attention)


def _foreign(folder: str | Path, task: Task, options: dict[str, Any]) -> tuple[PreTrainedModel, list[str], str]:
    auto = CLASSES[task].auto
    try:
        return *load_model(auto, folder, **options, attn_implementation="fastformer"), "fastformer"
    except (ValueError, ImportError):  # not registered, or this model's attention cannot be replaced
        model, new = load_model(auto, folder, **options)
        return model, new, model.config._attn_implementation


def untrained(folder: str | Path, task: Task, labels: Sequence[str] | None = None) -> StartingPoint:
    """Return the architecture in a folder of Hugging Face's format with new weights, to measure what pretraining gives.

    Arguments and errors are those of `pretrained`.
    """
    config = _configuration(folder, **_label_fields(labels))
    if isinstance(config, FastformerConfig):
        if task == "embed":
            config.pooling = "mean"
        return StartingPoint(CLASSES[task].ours(config), None, "fastformer")
    auto = CLASSES[task].auto
    try:
        model = auto.from_config(config, trust_remote_code=False, attn_implementation="fastformer")
        return StartingPoint(model, None, "fastformer")
    except (ValueError, ImportError):  # as in _foreign
        model = auto.from_config(config, trust_remote_code=False)
        return StartingPoint(model, None, model.config._attn_implementation)


def _configuration(folder: str | Path, **fields: Any) -> PreTrainedConfig:
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"no model in {folder}: it has no config.json")
    try:
        return load_configuration(folder, **fields)
    except ValueError as error:
        if "custom code" in str(error):
            raise ValueError(f"the model in {folder} needs its own code, which is never run") from error
        raise


def _add_match_type(model: FastformerPreTrainedModel) -> None:
    """Add the token type `MATCH_TYPE`; its embedding starts as a copy of the context's."""
    embeddings: Any = model.base_model.embeddings
    types = embeddings.token_type.weight.detach()
    embeddings.token_type = torch.nn.Embedding.from_pretrained(torch.cat([types, types[-1:]]), freeze=False)
    model.config.type_vocab_size = MATCH_TYPE + 1


def _modules_of(missing_weights: Sequence[str]) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in missing_weights})


def from_scratch(
    size: str,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    labels: Sequence[str] | None = None,
    **overrides: Any,
) -> StartingPoint:
    """Return Fastformer's model with random weights.

    It is a decoder for generate, an encoder-decoder for summarize and translate, and an encoder for the other tasks.
    Encoders are like BERT, except that the encoder for qa is modern, as decoders are: pre-norm, RMS norm, rotary
    positions.

    Args:
        size: a name known to `fastformer.models.presets`.
        task: decides stack and head.
        tokenizer: provides the vocabulary and the special tokens.
        max_length: tokens of the longest sequence.
        labels: names of the classes, for classify and tag.
        overrides: fields of `FastformerConfig` to change.
    """
    own = CLASSES[task].ours
    stack = own._stacks[0]
    fields: dict[str, Any] = {
        **(_QUESTION_ANSWERING if task == "qa" else _STACKS[stack]),
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": _first(tokenizer.bos_token_id, tokenizer.cls_token_id),
        "eos_token_id": _first(tokenizer.eos_token_id, tokenizer.sep_token_id),
        **_label_fields(labels),
    }
    if stack == "encoder_decoder":
        fields["decoder_start_token_id"] = _first(fields["bos_token_id"], tokenizer.pad_token_id)
    if task == "embed":
        fields["pooling"] = "mean"
    known = {name: value for name, value in fields.items() if name not in ("id2label", "label2id")}
    config = preset(size, **{**known, **overrides})
    if stack != "encoder" and "initializer_range" not in overrides:
        # BERT's 0.02 is for its width. In a narrow model, attention would begin as a mean, and a decoder would take
        # long to learn to look at its source.
        config.initializer_range = config.hidden_size**-0.5
    if labels is not None:
        config.id2label, config.label2id = fields["id2label"], fields["label2id"]
    return StartingPoint(own(config), None, "fastformer")


def _first(*choices: int | None) -> int | None:
    return next((choice for choice in choices if choice is not None), None)


def _label_fields(labels: Sequence[str] | None) -> dict[str, Any]:
    if labels is None:
        return {}
    return {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
