"""Conversion of a model of another architecture to one of Fastformer's, and back, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from fastformer.models.configuration import FastformerConfig
from fastformer.models.conversion.architecture import Architecture, Head
from fastformer.models.conversion.configurations import read_config, write_config
from fastformer.models.conversion.tensors import Place, Problems, Tensors, find
from fastformer.models.modeling import FastformerModel, FastformerPreTrainedModel


@dataclass(frozen=True)
class Checkpoint:
    """A model that need not be in memory.

    Attributes:
        model_class: the model's class, Fastformer's or Hugging Face's.
        config: the model's configuration.
        tensors: the model's parameters; a tied one appears once.
    """

    model_class: type[PreTrainedModel]
    config: Any
    tensors: Tensors


def read_checkpoint(
    architecture: Architecture, head: Head, config: PreTrainedConfig, tensors: Tensors, drop: Sequence[str] = ()
) -> Checkpoint:
    """Return Fastformer's model that computes what a model of `head` computes.

    Args:
        config: Hugging Face's configuration.
        tensors: those of a checkpoint of the class, or of its `state_dict`.
        drop: patterns, like a shell's, of tensors to leave out.

    Raises:
        ValueError: the configuration has no counterpart; or tensors are missing, left over, of another shape, or differ
            from those they must copy. The message lists all of them.
    """
    problems = Problems()
    tensors = _canonical(architecture, head, tensors)
    tensors, unmatched = _without(tensors, drop)
    problems.add("nothing to drop matches", unmatched)
    config = deepcopy(config)
    own = read_config(architecture, head, config, tensors.shapes.keys())
    tensors = _with_prefix(architecture, head, own, tensors)
    if _is_untied(architecture, head, own, tensors):
        own.tie_word_embeddings = False
    places, shapes = _places(architecture, head, own, problems)
    expected = _their_shapes(places, shapes, own)
    tensors = _without_copies(architecture, _tied(architecture, head, own), tensors, expected, problems)
    tensors = _without_computed(architecture, own, tensors, problems)
    _compare(tensors.shapes, expected, architecture.buffers, problems)
    problems.check(f"this is not a complete checkpoint of {head.theirs.__name__}")

    def load(name: str) -> Tensor:
        place = places[name]
        return place.source.read([tensors.load(part) for part in place.names])

    return Checkpoint(head.ours, own, Tensors(shapes, load))


def write_checkpoint(architecture: Architecture, checkpoint: Checkpoint) -> Checkpoint:
    """Return the model of `architecture` that computes what Fastformer's model computes.

    Raises:
        ValueError: the architecture has no such head, or cannot express the model.
    """
    assert issubclass(checkpoint.model_class, FastformerPreTrainedModel)
    head = architecture.head_for(checkpoint.model_class)
    own, tensors = as_built(checkpoint), checkpoint.tensors
    problems = Problems()
    places, _ = _places(architecture, head, own, problems)
    config = write_config(architecture, head, own, {name for place in places.values() for name in place.names})
    problems.check(f"{head.theirs.__name__} cannot express this model")
    shapes = _their_shapes(places, tensors.shapes, own)
    origins = {part: (name, index) for name, place in places.items() for index, part in enumerate(place.names)}
    if not own.tie_word_embeddings:  # transformers then ties nothing, not even a decoder's words to its encoder's
        copies = {copy: original for copy, original in architecture.copies.items() if original in shapes}
        shapes |= {copy: shapes[original] for copy, original in copies.items()}
        origins |= {copy: origins[original] for copy, original in copies.items()}

    def load(part: str) -> Tensor:
        name, index = origins[part]
        return places[name].source.write(tensors.load(name), own)[index]

    return Checkpoint(head.theirs, config, Tensors(shapes, load))


def own_checkpoint(model: FastformerPreTrainedModel) -> Checkpoint:
    """Make a checkpoint of a Fastformer model in memory."""
    tied = _tied_names(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return Checkpoint(type(model), model.config, Tensors.of(tensors))


def check_own(checkpoint: Checkpoint) -> None:
    """Raise ValueError for tensors missing, left over or of another shape in a checkpoint of Fastformer."""
    problems = Problems()
    assert issubclass(checkpoint.model_class, FastformerPreTrainedModel)
    _compare(checkpoint.tensors.shapes, own_shapes(checkpoint.model_class, as_built(checkpoint)), (), problems)
    problems.check(f"this is not a complete checkpoint of {checkpoint.model_class.__name__}")


def own_shapes(model_class: type[FastformerPreTrainedModel], config: FastformerConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters in a checkpoint of a Fastformer model, in their order."""
    model = _skeleton(model_class, config)
    tied = _tied_names(model)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def as_built(checkpoint: Checkpoint) -> FastformerConfig:
    """The configuration of a Fastformer model; without a pooler if the model was made without one."""
    config = checkpoint.config
    if checkpoint.model_class is FastformerModel and "pooler.dense.weight" not in checkpoint.tensors.shapes:
        config = deepcopy(config)
        config.pooler_act = "none"
    return config


def _skeleton(model_class: type[FastformerPreTrainedModel], config: FastformerConfig) -> FastformerPreTrainedModel:
    """Make the model without memory for its parameters."""
    with torch.device("meta"):
        return model_class(config)


def _tied_names(model: FastformerPreTrainedModel) -> Mapping[str, str]:
    """Map parameters that are copies to their originals."""
    return (model._tied_weights_keys or {}) if model.config.tie_word_embeddings else {}


def _place(architecture: Architecture, head: Head, config: FastformerConfig, name: str) -> Place | None:
    """The place of Fastformer's tensor `name` in a checkpoint of `head`."""
    untied = {} if config.tie_word_embeddings else head.untied
    if (place := find({**head.tensors, **untied}, name)) is not None:
        return place
    prefix = f"{head.ours.base_model_prefix}."
    base = name if _is_base(head) else name.removeprefix(prefix)
    if base == name and not _is_base(head):
        return None
    place = find(architecture.tensors(config), base)
    return None if place is None else place.prefixed(head.prefix)


def _is_base(head: Head) -> bool:
    """Whether the class has no head, so that its tensors are the base model's."""
    return not head.tensors


def _places(
    architecture: Architecture, head: Head, config: FastformerConfig, problems: Problems
) -> tuple[dict[str, Place], dict[str, tuple[int, ...]]]:
    """The places of Fastformer's tensors in the checkpoint, and the tensors' shapes."""
    shapes = own_shapes(head.ours, config)
    found = {name: _place(architecture, head, config, name) for name in shapes}
    problems.add("no counterpart of", [name for name, place in found.items() if place is None])
    return {name: place for name, place in found.items() if place is not None}, shapes


def _their_shapes(
    places: Mapping[str, Place], shapes: Mapping[str, tuple[int, ...]], config: FastformerConfig
) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a checkpoint of the other architecture."""
    theirs: dict[str, tuple[int, ...]] = {}
    for name, place in places.items():
        parts = place.source.write(torch.empty(shapes[name], device="meta"), config)
        theirs |= {part: tuple(tensor.shape) for part, tensor in zip(place.names, parts, strict=True)}
    return theirs


def _tied(architecture: Architecture, head: Head, config: FastformerConfig) -> dict[str, str]:
    """Their names of tied parameters that a checkpoint may hold, mapped to the originals."""
    copies = {}
    if config.tie_word_embeddings:
        for copy, original in (head.ours._tied_weights_keys or {}).items():
            first, second = (_place(architecture, head, config, name) for name in (copy, original))
            if first is not None and second is not None:
                copies[first.names[0]] = second.names[0]
    return copies


def _is_untied(architecture: Architecture, head: Head, config: FastformerConfig, tensors: Tensors) -> bool:
    """Whether a checkpoint has different parameters although its configuration ties them, as T5 1.1 has."""
    return any(
        {copy, original} <= tensors.shapes.keys() and not _equal(tensors.load(copy), tensors.load(original))
        for copy, original in _tied(architecture, head, config).items()
    )


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def _canonical(architecture: Architecture, head: Head, tensors: Tensors) -> Tensors:
    """Rename `tensors` to the names of the tables; a base model read from a class with a head loses its prefix."""
    prefixes = {other.prefix for other in architecture.heads if other.prefix} if _is_base(head) else set()
    found = [prefix for prefix in prefixes if any(name.startswith(prefix) for name in tensors.shapes)]

    def rename(name: str) -> str:
        for pattern, replacement in architecture.renamed.items():
            name = re.sub(pattern, replacement, name)
        for prefix in found:
            name = name.removeprefix(prefix)
        return name

    return tensors.renamed(rename)


def _with_prefix(architecture: Architecture, head: Head, config: FastformerConfig, tensors: Tensors) -> Tensors:
    """Add the prefix of the head's base model to `tensors` if the checkpoint is a base model's and has none."""
    if any(name.startswith(head.prefix) for name in tensors.shapes):
        return tensors
    places, _ = _places(architecture, head, config, Problems())
    expected = {name for place in places.values() for name in place.names}
    return tensors.renamed(lambda name: head.prefix + name if head.prefix + name in expected else name)


def _without(tensors: Tensors, drop: Iterable[str]) -> tuple[Tensors, list[str]]:
    """Leave out the tensors to drop; also return the patterns that match no tensor."""
    matched = {pattern: [name for name in tensors.shapes if fnmatchcase(name, pattern)] for pattern in drop}
    dropped = {name for names in matched.values() for name in names}
    return tensors.without(dropped), [pattern for pattern, names in matched.items() if not names]


def _without_copies(
    architecture: Architecture,
    tied: Mapping[str, str],
    tensors: Tensors,
    expected: Mapping[str, Any],
    problems: Problems,
) -> Tensors:
    """Leave out copies; a copy takes the place of a missing original."""
    stand_ins: dict[str, str] = {}
    copies: set[str] = set()
    for copy, original in {**architecture.copies, **tied}.items():
        if copy not in tensors.shapes or copy in expected or original not in expected:
            continue
        if original not in tensors.shapes and original not in stand_ins.values():
            stand_ins[copy] = original
            continue
        copies.add(copy)
        stood_in = next((name for name, place in stand_ins.items() if place == original), original)
        if not _equal(tensors.load(copy), tensors.load(stood_in)):
            problems.add("not a copy, as it must be:", [f"{copy} of {original}"])
    return tensors.without(copies).renamed(lambda name: stand_ins.get(name, name))


def _without_computed(
    architecture: Architecture, config: FastformerConfig, tensors: Tensors, problems: Problems
) -> Tensors:
    """Leave out tensors that Fastformer computes itself, after a check that they are equal."""
    computed = {name: value for name, value in architecture.computed(config).items() if name in tensors.shapes}
    for name, value in computed.items():
        given = tensors.load(name)
        tolerance = max(1e-5, 2 * torch.finfo(given.dtype).eps)  # rounding, and two ways to compute angles in float32
        if given.shape != value.shape or not torch.allclose(given.float(), value, rtol=0.0, atol=tolerance):
            problems.add("not what Fastformer computes:", [name])
    return tensors.without(computed)


def _compare(
    given: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    buffers: Sequence[str],
    problems: Problems,
) -> None:
    problems.add("missing", expected.keys() - given.keys())
    left_over = given.keys() - expected.keys()
    problems.add("left over", [name for name in left_over if not any(re.fullmatch(each, name) for each in buffers)])
    for name in sorted(given.keys() & expected.keys()):
        if given[name] != expected[name]:
            problems.add("another shape:", [f"{name} has {given[name]}, not {expected[name]}"])
