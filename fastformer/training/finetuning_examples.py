"""Find the examples of a task, in a set or in files, divided into training, validation and test."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastformer.data.labelled.examples import Examples, Splits
from fastformer.data.labelled.readers import find_splits
from fastformer.data.labelled.sets import SETS, load_set
from fastformer.data.labelled.splitting import split_examples
from fastformer.training.starting_point import Task
from fastformer.training.tasks import RECIPES, TextOptions


def sets_of(task: Task) -> list[str]:
    return [name for name, labelled in SETS.items() if labelled.task == task]


def load_examples(task: Task, data: str, options: TextOptions, cache_dir: str | None = None) -> Splits[Any]:
    """Return the examples of a set or of files.

    A tenth of the training examples becomes the validation split if there is no validation file, and likewise for test.

    Args:
        task: the task.
        data: name of a set, a file, or a folder with files for each split.
        options: the text options.
        cache_dir: the folder of fetched sets.

    Raises:
        FileNotFoundError: there is no such set or path.
        ValueError: the set is for another task, or a file cannot be read.
    """
    if data in SETS:
        if SETS[data].task != task:
            raise ValueError(f"--data {data} is for {SETS[data].task}, not for {task}; there are {sets_of(task)}")
        return Splits(*(_of_set(data, part) for part in load_set(data, cache_dir, options.languages[1])))
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(f"--data {data} is neither a set ({', '.join(sets_of(task))}) nor a file or folder")
    files = find_splits(path) if path.is_dir() else {"train": [path]}
    read = {split: _read(task, found, options, targets=split != "test") for split, found in files.items()}
    kind = RECIPES[task]
    if "test" in read:
        read["test"] = kind.to_predict(read["test"], kind.label_names(read["train"]))
    if "validation" in read and "test" in read:
        return Splits(read["train"], read["validation"], read["test"])
    try:
        drawn = split_examples(read["train"], kind.names, kind.input_of)
    except ValueError as error:
        raise ValueError(f"--data {data}: {error}") from error
    if "validation" not in read and "test" not in read:
        return drawn
    kept = _joined([drawn.train, drawn.test if "test" in read else drawn.validation])
    return Splits(kept, read.get("validation", drawn.validation), read.get("test", drawn.test))


def _of_set(name: str, part: Sequence[Any]) -> Examples[Any]:
    return Examples((f"{name}, example {number}", example) for number, example in enumerate(part, 1))


def _read(task: Task, files: Sequence[Path], options: TextOptions, targets: bool) -> Examples[Any]:
    return _joined([RECIPES[task].read(file, options, targets) for file in files])


def _joined(parts: Sequence[Any]) -> Examples[Any]:
    return Examples(pair for part in parts for pair in zip(part.places, part, strict=True))


def drawn_examples(examples: Examples[Any], count: int, seed: int) -> Examples[Any]:
    """Draw at most `count` examples, without repetition."""
    if count < 1:
        raise ValueError(f"--max_train_examples must be at least 1; got {count}")
    return examples.part(random.Random(seed).sample(range(len(examples)), min(count, len(examples))))
