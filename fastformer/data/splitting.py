"""Which documents and examples are held out: a function of them alone, so that no copy of one is on the other side."""

from __future__ import annotations

import hashlib
import math
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastformer.data.corpus import Document
from fastformer.data.examples import Examples, Splits

Example = TypeVar("Example", bound=tuple)

_KEYS = 1 << 64
_TOKENIZER_TRAINING_CHARACTERS = 1 << 28


def document_key(text: str) -> int:
    """64 bits of a hash of a document, white space not counted."""
    return int.from_bytes(hashlib.blake2b("".join(text.split()).encode(), digest_size=8).digest(), "big")


class Split(NamedTuple):
    """Says of any document on which side it is.

    Attributes:
        heldout_below: documents with a lower key are held out.
        sample_from: documents with at least this key are enough to train a tokenizer on.
    """

    heldout_below: int
    sample_from: int

    def is_heldout(self, text: str) -> bool:
        return document_key(text) < self.heldout_below

    def is_for_training(self, text: str) -> bool:
        return not self.is_heldout(text)

    def is_sampled(self, text: str) -> bool:
        return document_key(text) >= max(self.heldout_below, self.sample_from)


def find_split(texts: Iterable[str], heldout_fraction: float) -> Split:
    """Reads the documents once, keeping 8 bytes of each.

    The distinct documents with the lowest keys are held out: ``max(1, round(heldout_fraction * distinct))`` of them,
    whatever their order.

    Raises:
        ValueError: no document, or `heldout_fraction` out of range or with fewer than two distinct documents.
    """
    _check_fraction(heldout_fraction)
    keys = array("Q")
    characters = 0
    for text in texts:
        keys.append(document_key(text))
        characters += len(text)
    sampled = min(1.0, _TOKENIZER_TRAINING_CHARACTERS / max(characters, 1))
    return Split(_heldout_below(np.frombuffer(keys, np.uint64), heldout_fraction), int((1 - sampled) * _KEYS))


def split_documents(documents: Sequence[Document], heldout_fraction: float) -> tuple[list[Document], list[Document]]:
    """Splits documents into those to train on and those held out, both in their given order; see `find_split`.

    Args:
        documents: at least two distinct ones, unless `heldout_fraction` is 0.
        heldout_fraction: share of the distinct documents, in [0, 1); 0 holds nothing out.
    """
    split = find_split(("\n".join(document) for document in documents), heldout_fraction)
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        sides[split.is_heldout("\n".join(document))].append(document)
    return sides


def _heldout_below(keys: NDArray[np.uint64], heldout_fraction: float) -> int:
    if heldout_fraction == 0:
        return 0
    distinct = np.unique(keys)
    if len(distinct) < 2:
        raise ValueError(
            f"heldout_fraction={heldout_fraction} of {len(distinct)} distinct document(s) leaves nothing to train on; "
            "separate documents by blank lines, or set heldout_fraction=0"
        )
    count = min(max(1, math.floor(heldout_fraction * len(distinct) + 0.5)), len(distinct) - 1)
    return int(distinct[count])


def _check_fraction(heldout_fraction: float) -> None:
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction must be in [0, 1), got {heldout_fraction}")


# --- Labelled examples ------------------------------------------------------------------------------------------------

_TRAIN, _VALIDATION, _TEST = range(3)
_PARTS = 10


def split_examples(
    examples: Examples[Example], names: Callable[[Example], Collection[str]], given: Callable[[Example], Hashable]
) -> Splits[Example]:
    """Splits examples by a hash of what is given in each: 8 parts in 10 to train on, 1 to choose by, 1 to judge by.

    Then some change sides, so that each class or tag is among those to train on and, where there are enough examples of
    it, on both other sides. Examples in which the same is given stay together.

    Args:
        examples: of one file or several.
        names: the classes or tags of an example.
        given: what is given in an example, without what is to be predicted: a text, or a context of many questions.

    Raises:
        ValueError: a side has no example.
    """
    alike: dict[int, list[int]] = {}
    for number, example in enumerate(examples):
        alike.setdefault(document_key(repr(given(example))), []).append(number)
    sides = _balanced(
        {key: max(key % _PARTS - (_PARTS - 3), _TRAIN) for key in alike},
        {
            key: {"", *(name for number in numbers for name in names(examples[number]))}  # "" is of every example
            for key, numbers in alike.items()
        },
    )
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for key, numbers in alike.items():
        parts[sides[key]].extend(numbers)
    if not all(parts):
        raise ValueError(
            f"{len(alike)} different texts are too few to train on some, choose by others and judge by the rest, "
            "with every class or tag among the first; give more, or a folder with files train, validation and test"
        )
    return Splits(*(examples.part(sorted(part)) for part in parts))


def _balanced(sides: dict[int, int], names: dict[int, set[str]]) -> dict[int, int]:
    """The sides of examples, some moved: to where none has one of their names, from where others have it too."""
    of_name: dict[str, list[int]] = {}
    for key, of_one in names.items():
        for name in of_one:
            of_name.setdefault(name, []).append(key)
    counts = [Counter[str](), Counter[str](), Counter[str]()]
    for key, side in sides.items():
        counts[side].update(names[key])
    rare_first = sorted(of_name, key=lambda name: (len(of_name[name]), name))
    for wanted in (_TRAIN, _VALIDATION, _TEST):
        for name in rare_first:
            if counts[wanted][name]:
                continue
            for key in of_name[name]:
                side = sides[key]
                if wanted == _TRAIN or all(counts[side][of_one] > 1 for of_one in names[key]):
                    counts[side].subtract(names[key])
                    counts[wanted].update(names[key])
                    sides[key] = wanted
                    break
    if alone := [name for name in rare_first if not counts[_VALIDATION][name] and not counts[_TEST][name] and name]:
        warnings.warn(
            f"too few examples have {', '.join(alone[:5])}{' ...' * (len(alone) > 5)}: all of them are trained on, and "
            "nothing tells how well that is learnt",
            stacklevel=3,
        )
    return sides
