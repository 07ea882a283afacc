"""Split labelled examples. The split depends on the inputs alone, so two copies of an example are never separated."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Hashable
from typing import TypeVar

from fastformer.data.labelled.examples import Examples, Splits
from fastformer.data.pretraining.splitting import document_key

Example = TypeVar("Example", bound=tuple)

_TRAIN, _VALIDATION, _TEST = range(3)
_PARTS = 10


def split_examples(
    examples: Examples[Example], names: Callable[[Example], Collection[str]], input_of: Callable[[Example], Hashable]
) -> Splits[Example]:
    """Split examples by a hash of their inputs: 8 tenths for training, 1 for validation, 1 for testing.

    Then some examples move, so that each class or tag is in the training split and, if it has enough examples, in both
    other splits. Examples with the same input stay together.

    Args:
        examples: the examples of one file or several.
        names: returns the classes or tags of an example.
        input_of: returns the input of an example, without what is to be predicted: a text, or a context that several
            questions share.

    Raises:
        ValueError: a split would have no example.
    """
    alike: dict[int, list[int]] = {}
    for number, example in enumerate(examples):
        alike.setdefault(document_key(repr(input_of(example))), []).append(number)
    sides = _balanced(
        {key: max(key % _PARTS - (_PARTS - 3), _TRAIN) for key in alike},
        {
            key: {"", *(name for number in numbers for name in names(examples[number]))}  # "": no empty split
            for key, numbers in alike.items()
        },
    )
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for key, numbers in alike.items():
        parts[sides[key]].extend(numbers)
    if not all(parts):
        raise ValueError(
            f"{len(alike)} different texts are too few to split into training, validation and test examples, with "
            "every class or tag in the training split; give more, or a folder with files train, validation and test"
        )
    return Splits(*(examples.part(sorted(part)) for part in parts))


def _balanced(sides: dict[int, int], names: dict[int, set[str]]) -> dict[int, int]:
    """Move examples into splits that lack one of their names, out of splits where other examples have the name too.

    Every name must be in the training split, so examples move there even if their old split loses the name.
    """
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
            f"too few examples have {', '.join(alone[:5])}{' ...' * (len(alone) > 5)}: all of them are in the training "
            "split, so no score tells how well they are learnt",
            stacklevel=3,
        )
    return sides
