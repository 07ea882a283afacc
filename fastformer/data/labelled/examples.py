"""The labelled examples of each task, as people write them: before any tokenizer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar


class ClassifiedText(NamedTuple):
    """One text or two, and the class, or a number for regression; None if it is to be predicted."""

    text: str
    second: str | None
    label: str | float | None


class TaggedWords(NamedTuple):
    """Words and the tag of each; no tags if they are to be predicted."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None


class Answer(NamedTuple):
    """A part of the context that begins at character `start`."""

    text: str
    start: int


class Question(NamedTuple):
    """A question about a context; `answers` are all accepted answers, empty if the context has no answer.

    `answers` is None if the answer is to be predicted.
    """

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] | None


class SourceTarget(NamedTuple):
    """A document and its summary, or a sentence and its translation; no target if it is to be predicted."""

    source: str
    target: str | None


class Message(NamedTuple):
    """One message of a conversation; the role is system, user or assistant."""

    role: str
    content: str


class UnlearntMessage(Message):
    """A message of the assistant that the model must not learn."""


class Conversation(NamedTuple):
    """Messages in order. The model learns the assistant's messages, except each `UnlearntMessage`."""

    messages: tuple[Message, ...]


class SimilarTexts(NamedTuple):
    """Two texts that mean about the same, and optionally one with another meaning than the first."""

    anchor: str
    positive: str
    negative: str | None


Example = TypeVar("Example", bound=tuple)
OtherExample = TypeVar("OtherExample", bound=tuple)


class Examples(list[Example]):
    """The examples of a file, in order.

    Args:
        located: the place of each example, in words, and the example.

    Attributes:
        places: the place of each example.
    """

    def __init__(self, located: Iterable[tuple[str, Example]] = ()) -> None:
        super().__init__()
        self.places: list[str] = []
        for place, example in located:
            self.places.append(place)
            self.append(example)

    def part(self, numbers: Iterable[int]) -> Examples[Example]:
        """Return the examples of these numbers."""
        return Examples((self.places[number], self[number]) for number in numbers)


_NUMBER = re.compile(r"[ \t]*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?[ \t]*")


def in_order(names: Iterable[str]) -> list[str]:
    """Sort the names of classes or tags, each once: by value if all of them are numbers, else alphabetically."""
    distinct = sorted(set(names))
    values = {name: written_number(name) for name in distinct}
    return sorted(distinct, key=values.__getitem__) if all(map(math.isfinite, values.values())) else distinct


def written_number(text: str) -> float:
    """Return the number written in a text in decimal notation, else NaN.

    Python's `float` would also accept 1_0 and digits of other scripts.
    """
    return float(text) if _NUMBER.fullmatch(text) else math.nan


_MISSING = re.compile(r"\s*|[+-]?nan|null|<na>|#n/a|\\n", re.IGNORECASE)


def check_is_told(name: str, where: str, what: str) -> str:
    """Return the name of a class or tag; raise ValueError if programs write this name for a missing value.

    None, NA and N/A may be names: see `fastformer.data.labelled.features.label_names`.
    """
    if _MISSING.fullmatch(name):
        raise ValueError(f"{where}: {what} {name!r} stands for a missing {what}; give it, or leave the example out")
    return name


def place_of(examples: Sequence[tuple], number: int) -> str:
    """Return the place of an example for an error message: file and line, or the number of the example."""
    return examples.places[number] if isinstance(examples, Examples) else f"example {number + 1}"


class Splits(NamedTuple, Generic[Example]):
    """Examples for training, for validation and for testing."""

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]

    def map(self, function: Callable[[Example], OtherExample]) -> Splits[OtherExample]:
        """Apply a function to each example."""
        return Splits(*([function(example) for example in part] for part in self))
