"""Rules for how a tensor of Fastformer's is made of another architecture's tensors, and the reverse."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastformer.models.configuration import FastformerConfig
from fastformer.models.finite import finite


@dataclass(frozen=True)
class Tensors:
    """A checkpoint's tensors by name, each read when it is needed.

    Attributes:
        shapes: the shape of each tensor.
        load: reads one tensor, and raises ValueError if it is not finite.
    """

    shapes: Mapping[str, tuple[int, ...]]
    load: Callable[[str], Tensor]

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Tensors:
        """Make them from a state_dict."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return Tensors(shapes, lambda name: finite(name, tensors[name]))

    def without(self, names: Container[str]) -> Tensors:
        """Return the tensors without `names`."""
        return Tensors({name: shape for name, shape in self.shapes.items() if name not in names}, self.load)

    def renamed(self, rename: Callable[[str], str]) -> Tensors:
        """Return the same tensors under other names.

        Raises:
            ValueError: two tensors get the same name.
        """
        originals: dict[str, str] = {}
        for name in self.shapes:
            if (other := originals.setdefault(rename(name), name)) != name:
                raise ValueError(f"the checkpoint holds {rename(name)} twice, as {other} and as {name}")
        shapes = {new: self.shapes[old] for new, old in originals.items()}
        return Tensors(shapes, lambda name: self.load(originals[name]))


@dataclass(frozen=True)
class Same:
    """The tensor itself.

    Attributes:
        name: the name of a tensor, or of a module for its weight and bias; ``*`` stands for the number of the block.
    """

    name: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, parts: Sequence[Tensor]) -> Tensor:
        """Make Fastformer's tensor from the parts."""
        return parts[0]

    def write(self, tensor: Tensor, config: FastformerConfig) -> list[Tensor]:
        """Make the parts from Fastformer's tensor."""
        return [tensor]


@dataclass(frozen=True)
class Transposed(Same):
    """A weight stored transposed, for products from the right (GPT-2's Conv1D); a bias is unchanged."""

    def read(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].T

    def write(self, tensor: Tensor, config: FastformerConfig) -> list[Tensor]:
        return [tensor.T]


@dataclass(frozen=True)
class LaterRows(Same):
    """A table of positions whose first rows belong to no position; they are written as zeros."""

    first: int = 0

    def read(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0][self.first :]

    def write(self, tensor: Tensor, config: FastformerConfig) -> list[Tensor]:
        return [torch.cat([tensor.new_zeros(self.first, *tensor.shape[1:]), tensor])]


@dataclass(frozen=True)
class Broadcast(Same):
    """A tensor stored with leading dimensions of size 1."""

    dimensions: int = 1

    def read(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].flatten(0, self.dimensions)

    def write(self, tensor: Tensor, config: FastformerConfig) -> list[Tensor]:
        return [tensor.view(*[1] * self.dimensions, *tensor.shape)]


@dataclass(frozen=True)
class Joined:
    """A projection joined from several: of queries, keys and values, or of keys and values.

    Attributes:
        names: the names of the parts.
    """

    names: tuple[str, ...]

    def read(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def write(self, tensor: Tensor, config: FastformerConfig) -> list[Tensor]:
        heads = [config.num_attention_heads, config.kv_heads, config.kv_heads][-len(self.names) :]
        return list(tensor.split([count * config.size_per_head for count in heads]))


Source = Same | Joined
Table = Mapping[str, Source | str | tuple[str, ...]]
"""A map from Fastformer's modules or tensors to their sources; a name means `Same`, several mean `Joined`."""


@dataclass(frozen=True)
class Place:
    """The source of one tensor of Fastformer's.

    Attributes:
        names: the tensors that it is made of.
        source: the rule that makes it.
    """

    names: tuple[str, ...]
    source: Source

    def prefixed(self, prefix: str) -> Place:
        return Place(tuple(prefix + name for name in self.names), self.source)


def find(table: Table, name: str) -> Place | None:
    """Return the place of Fastformer's tensor `name`; None if the table has none."""
    module, _, kind = name.rpartition(".")
    for pattern, entry in table.items():
        for subject, suffix in ((name, ""), (module, f".{kind}")):
            match = re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+)"), subject)
            if match is None:
                continue
            source: Source = (
                Same(entry) if isinstance(entry, str) else Joined(entry) if isinstance(entry, tuple) else entry
            )
            if isinstance(source, Transposed) and kind == "bias":
                source = Same(source.name)
            layer = match[1] if match.re.groups else ""
            return Place(tuple(part.replace("*", layer) + suffix for part in source.names), source)
    return None


@dataclass
class Problems:
    """The faults of a checkpoint, collected so that one error lists all."""

    found: list[str] = field(default_factory=list)

    def add(self, kind: str, names: object) -> None:
        self.found += [f"{kind} {name}" for name in sorted(names)]  # type: ignore[call-overload]

    def check(self, what: str) -> None:
        """Raise ValueError if any fault was found."""
        if self.found:
            raise ValueError(f"{what}: {'; '.join(self.found)}")
