"""Conversion of models of other architectures in memory."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn
from transformers import PreTrainedModel

from fastformer.models.conversion.architecture import Architecture
from fastformer.models.conversion.bart import BART, MARIAN, MBART
from fastformer.models.conversion.bert import BERT, ROBERTA
from fastformer.models.conversion.distilbert import DISTILBERT
from fastformer.models.conversion.engine import Checkpoint, own_checkpoint, read_checkpoint, write_checkpoint
from fastformer.models.conversion.gpt import GPT2, GPT_NEO
from fastformer.models.conversion.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from fastformer.models.conversion.t5 import T5
from fastformer.models.conversion.tensors import Tensors
from fastformer.models.conversion.vit import VIT
from fastformer.models.modeling import FastformerPreTrainedModel

_KNOWN = (BERT, ROBERTA, DISTILBERT, GPT2, GPT_NEO, LLAMA, QWEN2, QWEN3, MISTRAL, T5, BART, MBART, MARIAN, VIT)
ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in _KNOWN}
"""All architectures, by Hugging Face's model type."""


def architecture_of(name: str) -> Architecture:
    """Return the architecture with Hugging Face's name `name`.

    Raises:
        ValueError: there is no such architecture.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"the architecture must be one of {', '.join(ARCHITECTURES)}; got {name!r}")
    return ARCHITECTURES[name]


def from_hugging_face(model: PreTrainedModel) -> FastformerPreTrainedModel:
    """Return the Fastformer model that computes what a Hugging Face model computes, with copies of its weights.

    It is on the same device, in evaluation mode.

    Args:
        model: a model of one of the classes in `ARCHITECTURES`. ``fastformer convert`` converts a folder.

    Raises:
        ValueError: Fastformer has no such architecture or class, or does not support a setting of the model; the
            message names it.

    >>> model = from_hugging_face(transformers.GPT2LMHeadModel.from_pretrained("gpt2"))
    >>> model.save_pretrained("gpt2-fastformer")
    """
    architecture = architecture_of(model.config.model_type)
    head = architecture.head_of(type(model).__name__)
    own = build(read_checkpoint(architecture, head, model.config, Tensors.of(model.state_dict())))
    assert isinstance(own, FastformerPreTrainedModel)
    _copy_generation(model, own)
    nn.Module.to(own, model.device)
    return own


def to_hugging_face(model: FastformerPreTrainedModel, architecture: str) -> PreTrainedModel:
    """Return the Hugging Face model that computes what a Fastformer model computes, with copies of its weights.

    It is on the same device, in evaluation mode.

    Args:
        architecture: Hugging Face's model type, one of `ARCHITECTURES`.

    Raises:
        ValueError: the architecture has no such head, or cannot express the model; the message names each field, its
            value and what is accepted.

    >>> to_hugging_face(model, "gpt2").save_pretrained("gpt2")
    """
    theirs = build(write_checkpoint(architecture_of(architecture), own_checkpoint(model)))
    _copy_generation(model, theirs)
    nn.Module.to(theirs, model.device)
    return theirs


def build(checkpoint: Checkpoint) -> PreTrainedModel:
    """Build the model in the CPU's memory, wherever the tensors are."""
    tensors = {name: checkpoint.tensors.load(name).clone() for name in checkpoint.tensors.shapes}
    config = deepcopy(checkpoint.config)
    config.dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    return checkpoint.model_class.from_pretrained(None, config=config, state_dict=tensors)


def _copy_generation(source: PreTrainedModel, target: PreTrainedModel) -> None:
    if source.can_generate() and target.can_generate():
        target.generation_config = deepcopy(source.generation_config)
