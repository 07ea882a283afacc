"""What fine-tuning starts from: a folder with our model or a Hugging Face one, or none; with the task's head."""

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
    """The classes that a task's model is an instance of: ours, and Hugging Face's Auto class."""

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

# From scratch: BERT for labels and embeddings; blocks as they are built today where text is to be written, or an answer
# found by what stands beside it, which learned positions are slow to tell.
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
        model: ours, or one of Hugging Face's.
        new_layers: names of the modules whose weights are not pretrained; None where nothing is.
        attention: what computes the attention.
    """

    model: PreTrainedModel
    new_layers: list[str] | None
    attention: str

    @property
    def packed(self) -> bool:
        """Whether the model takes packed batches."""
        return isinstance(self.model, FastformerPreTrainedModel)


def pretrained(folder: str | Path, task: Task, labels: Sequence[str] | None = None) -> StartingPoint:
    """The model in a folder of Hugging Face's format.

    One of another architecture than ours runs as it is, with our attention where its implementation takes another and
    ours is registered with transformers, and with its own where not.

    Args:
        folder: with config.json and weights.
        task: decides the head.
        labels: of the classes, for classify and tag; a single one for regression. None leaves them as they are.

    Raises:
        OSError: there is no model in the folder.
        ValueError: the model cannot have the task's head, or weights beside the head's are missing.
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
    except (ValueError, ImportError):  # not registered, or a model whose attention is not to be replaced
        model, new = load_model(auto, folder, **options)
        return model, new, model.config._attn_implementation


def untrained(folder: str | Path, task: Task, labels: Sequence[str] | None = None) -> StartingPoint:
    """The architecture in a folder of Hugging Face's format with new weights: what pretraining is to be measured by.

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
            raise ValueError(f"the model in {folder} brings code of its own, which is never run") from error
        raise


def _add_match_type(model: FastformerPreTrainedModel) -> None:
    """Words of the context that the question has get a token type of their own, which begins as the context's."""
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
    """Our model with random weights: an encoder, for generate a decoder, for summarize and translate both.

    Encoders are BERT's kind, for qa one with rotary positions; decoders are of today's kind.

    Args:
        size: a name known to `fastformer.models.presets`.
        task: decides stack and head.
        tokenizer: its vocabulary and special tokens.
        max_length: tokens of the longest sequence.
        labels: of the classes, for classify and tag.
        overrides: fields of `FastformerConfig` that differ.
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
        # BERT's 0.02 is for its width: in a narrow model attention would begin as a mean, and what writes would long
        # not look at what it has read.
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
