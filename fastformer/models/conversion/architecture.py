"""What describes an architecture of Hugging Face's: its configuration, its tensors and its heads, as tables."""

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
    """One class of an architecture, and Fastformer's that computes the same.

    Attributes:
        theirs: Hugging Face's class.
        ours: Fastformer's class.
        tensors: what the head has beyond the base model.
        prefix: of the base model's tensors in theirs.
        implied: fields of `FastformerConfig` that the head fixes.
        fields: fields of their configuration and of `FastformerConfig` that mean the same; one that is missing or None
            leaves what is implied.
        absent: fields of `FastformerConfig` where a checkpoint lacks a tensor.
        untied: places that differ where the output projection is not the word embedding.
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
    """An architecture whose models are settings of Fastformer's.

    A configuration is read by `implied`, `fields`, `read` and the head's, in this order, and written by `fields` and
    `write`. Both ways it is then taken back and compared, so that a field that one side cannot express is never lost:
    what stands in no table must have its default.

    Attributes:
        config_class: Hugging Face's configuration.
        implied: fields of `FastformerConfig` that the architecture fixes, where they are not its defaults.
        fields: fields of their configuration and of `FastformerConfig` that mean the same.
        read: fields of `FastformerConfig` that take more than another name.
        write: fields of theirs that take more, from ours.
        translated: fields of theirs that `read` and `write` have checked.
        without_effect: fields of theirs that change no number in inference.
        undeclared: what fields that their configuration does not declare must be, where a checkpoint has them.
        tensors: the base model's.
        heads: its classes.
        copies: tensors that a checkpoint may hold beside those that they are copies of.
        computed: tensors that a checkpoint may hold and that Fastformer computes itself; they must be equal.
        buffers: patterns of tensors that a checkpoint may hold and that nothing reads.
        renamed: patterns of other names of tensors, and what replaces them.
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
        """The head whose class is so called.

        Raises:
            ValueError: there is none.
        """
        for head in self.heads:
            if head.theirs.__name__ == class_name:
                return head
        known = ", ".join(head.theirs.__name__ for head in self.heads)
        raise ValueError(f"the class must be one of {known} in {self.name}; got {class_name!r}")

    def head_for(self, ours: type[FastformerPreTrainedModel]) -> Head:
        """The head that computes what Fastformer's class does.

        Raises:
            ValueError: there is none.
        """
        for head in self.heads:
            if head.ours is ours:
                return head
        known = ", ".join(dict.fromkeys(head.ours.__name__ for head in self.heads))
        raise ValueError(f"the model must be one of {known} to become a {self.name}; got {ours.__name__}")
