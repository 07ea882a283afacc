"""What is fine-tuned on: one labelled example of each task, as people write it, before any tokenizer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar


class ClassifiedText(NamedTuple):
    """A text, or two, and the class; for regression a number; None where it is to be predicted."""

    text: str
    second: str | None
    label: str | float | None


class TaggedWords(NamedTuple):
    """Words and the tag of each; no tags where they are to be predicted."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None


class Answer(NamedTuple):
    """A stretch of the context, from character `start` on."""

    text: str
    start: int


class Question(NamedTuple):
    """A question about a context; `answers` are all that are accepted, none where the context has no answer.

    `answers` is None where it is to be predicted.
    """

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...] | None


class SourceTarget(NamedTuple):
    """A document and its summary, or a sentence and its translation; no target where it is to be predicted."""

    source: str
    target: str | None


class Message(NamedTuple):
    """What one side says; the role is system, user or assistant."""

    role: str
    content: str


class UnlearntMessage(Message):
    """What the assistant says, but is not to be learnt."""


class Conversation(NamedTuple):
    """Messages in order. What the assistant says is to be learnt, but for an `UnlearntMessage`."""

    messages: tuple[Message, ...]


class SimilarTexts(NamedTuple):
    """Two texts that mean about the same, and perhaps one that does not mean what the first does."""

    anchor: str
    positive: str
    negative: str | None


Example = TypeVar("Example", bound=tuple)
OtherExample = TypeVar("OtherExample", bound=tuple)


class Examples(list[Example]):
    """Examples of a file, in order.

    Args:
        located: of each where it is, in words, and itself.

    Attributes:
        places: of each, where it is.
    """

    def __init__(self, located: Iterable[tuple[str, Example]] = ()) -> None:
        super().__init__()
        self.places: list[str] = []
        for place, example in located:
            self.places.append(place)
            self.append(example)

    def part(self, numbers: Iterable[int]) -> Examples[Example]:
        """Those of these numbers."""
        return Examples((self.places[number], self[number]) for number in numbers)


_NUMBER = re.compile(r"[ \t]*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?[ \t]*")


def in_order(names: Iterable[str]) -> list[str]:
    """The names of classes or tags, each once: by value where all of them are numbers, otherwise by letter."""
    distinct = sorted(set(names))
    values = {name: written_number(name) for name in distinct}
    return sorted(distinct, key=values.__getitem__) if all(map(math.isfinite, values.values())) else distinct


def written_number(text: str) -> float:
    """The number that a text is in decimal notation, NaN where it is none: `float` would take 1_0 and other digits."""
    return float(text) if _NUMBER.fullmatch(text) else math.nan


_MISSING = re.compile(r"\s*|[+-]?nan|null|<na>|#n/a|\\n", re.IGNORECASE)


def check_is_told(name: str, where: str, what: str) -> str:
    """The name of a class or tag; raises ValueError where it is what programs write for a value that is missing.

    None, NA and N/A may be names: see `fastformer.data.labelled.features.label_names`.
    """
    if _MISSING.fullmatch(name):
        raise ValueError(f"{where}: {what} {name!r} stands for one that is missing; give it, or leave the example out")
    return name


def place_of(examples: Sequence[tuple], number: int) -> str:
    """Where an example is, for an error: in which file and line, or which of the examples."""
    return examples.places[number] if isinstance(examples, Examples) else f"example {number + 1}"


class Splits(NamedTuple, Generic[Example]):
    """Examples to train on, to choose by and to judge by."""

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]

    def map(self, function: Callable[[Example], OtherExample]) -> Splits[OtherExample]:
        """Each example changed in the same way."""
        return Splits(*([function(example) for example in part] for part in self))
