"""Tables that describe an architecture of Hugging Face's: its configuration, its tensors and its heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from fastformer.models.configuration import FastformerConfig
from fastformer.models.conversion.tensors import Table
from fastformer.models.modeling import FastformerPreTrainedModel

Fields = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """A class of an architecture, and Fastformer's class that computes the same.

    Attributes:
        theirs: Hugging Face's class.
        ours: Fastformer's class.
        tensors: the head's tensors, beyond those of the base model.
        prefix: the prefix of the base model's tensors in Hugging Face's class.
        implied: fields of `FastformerConfig` that the head fixes.
        fields: fields with the same meaning in their configuration and in `FastformerConfig`; if one is missing or
            None, the implied value stays.
        absent: fields of `FastformerConfig` that apply if a checkpoint lacks a tensor.
        untied: places that differ if the output projection is not the word embedding.
    """

    theirs: type[PreTrainedModel]
    ours: type[FastformerPreTrainedModel]
    tensors: Table = field(default_factory=dict)
    prefix: str = ""
    implied: Fields = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, Fields] = field(default_factory=dict)
    untied: Table = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """An architecture whose models are special cases of Fastformer's.

    A configuration is read with `implied`, `fields`, `read` and the head's tables, in this order, and written with
    `fields` and `write`. Both ways it is then converted back and compared, so that a field that one side cannot express
    is never lost: a field that is in no table must have its default.

    Attributes:
        config_class: Hugging Face's configuration.
        implied: fields of `FastformerConfig` that the architecture fixes to other values than the defaults.
        fields: fields with the same meaning in their configuration and in `FastformerConfig`.
        read: computes fields of `FastformerConfig` that need more than another name.
        write: computes their fields that need more than another name, from ours.
        translated: their fields that `read` and `write` check.
        without_effect: their fields that change no number in inference.
        undeclared: required values of fields that their configuration does not declare but a checkpoint may have.
        tensors: the base model's tensors.
        heads: the architecture's classes.
        copies: tensors that a checkpoint may hold in addition to those that they copy.
        computed: tensors that a checkpoint may hold and that Fastformer computes itself; they must be equal.
        buffers: patterns of tensors that a checkpoint may hold and that are not used.
        renamed: patterns of other names of tensors, and their replacements.
    """

    config_class: type[PreTrainedConfig]
    heads: tuple[Head, ...]
    tensors: Callable[[FastformerConfig], Table]
    implied: Fields = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Any], Fields] = lambda config: {}
    write: Callable[[FastformerConfig], Fields] = lambda config: {}
    translated: frozenset[str] = frozenset()
    without_effect: frozenset[str] = frozenset()
    undeclared: Fields = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    computed: Callable[[FastformerConfig], Mapping[str, Tensor]] = lambda config: {}
    buffers: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Hugging Face's model type."""
        return self.config_class.model_type

    def head_of(self, class_name: str) -> Head:
        """Return the head whose class has this name.

        Raises:
            ValueError: there is no such head.
        """
        for head in self.heads:
            if head.theirs.__name__ == class_name:
                return head
        known = ", ".join(head.theirs.__name__ for head in self.heads)
        raise ValueError(f"the class must be one of {known} in {self.name}; got {class_name!r}")

    def head_for(self, ours: type[FastformerPreTrainedModel]) -> Head:
        """Return the head that computes the same as Fastformer's class.

        Raises:
            ValueError: there is no such head.
        """
        for head in self.heads:
            if head.ours is ours:
                return head
        known = ", ".join(dict.fromkeys(head.ours.__name__ for head in self.heads))
        raise ValueError(f"the model must be one of {known} to become a {self.name}; got {ours.__name__}")
