"""Which labelled examples are held out: a function of what is given in them, so that no copy is on both sides."""

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
