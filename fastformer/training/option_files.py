"""Files of options, and the spelling of options there and on the command line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

_MOST_ALIASED = 10_000

# Former names of options, and those of Lightning's options that one of ours sets; each with the spelling to use.
_SPELLING = {
    **{
        f"model.{name}": f"optimizer.{name}"
        for name in ("learning_rate", "weight_decay", "betas", "eps", "warmup_steps", "schedule")
    },
    "model.overrides": "overrides",
    "corpus.vocab_size": "vocab_size",
    "corpus.max_length": "max_length",
    "corpus.tokens_per_batch": "tokens_per_batch",
    "corpus.num_workers": "num_workers",
    "corpus.cache_dir": "cache_dir",
    "text.max_length": "max_length",
    "trainer.accelerator": "accelerator",
    "trainer.accumulate_grad_batches": "accumulate",
    "trainer.devices": "devices",
    "trainer.max_epochs": "epochs",
    "trainer.max_steps": "max_steps",
    "trainer.precision": "precision",
    "trainer.strategy": "strategy",
    "trainer.val_check_interval": "evaluate_every",
    "privacy-epsilon": "privacy_epsilon",
}
_GROUPS = {name.partition(".")[0] for name in _SPELLING if "." in name}


def given_options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the options of a command line without their dashes, each with its value; "" if there is none."""
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, given, value = argument.partition("=")
        if name.startswith("--"):
            yield name.removeprefix("--"), value if given else following


def check_spelling(arguments: Sequence[str]) -> None:
    """Check the spelling of the options on a command line and in the files that it names.

    Raises:
        ValueError: an option has another spelling, which the error names; a file cannot be read; or an option would
            remove an earlier one.
    """
    before: list[str] = []
    for name, value in given_options(arguments):
        if name == "config" and value:
            read_options(Path(value))
        for each in _spelt({name: value}, Path()):
            _check_name(each, "--")
        if name == "overrides" and (removed := [f"--{each}" for each in before if each.startswith("overrides.")]):
            raise ValueError(f"--overrides would remove {', '.join(removed)}: give --overrides first")
        before.append(name)


def read_options(path: Path) -> dict[str, Any]:
    """Read the options in a file.

    Raises:
        ValueError: the file is not YAML with options, has an option twice or in another spelling, or names another
            file of options. The error names the file.
    """
    options = _read_yaml(path)
    if not isinstance(options, dict):
        raise ValueError(f"{path} must hold options, each with its value; it holds none")
    if "config" in options:
        raise ValueError(f"{path} names another file of options: give each of them with --config")
    names: set[str] = set()
    try:
        for name in _spelt(options, path.parent):
            _check_name(name)
            if "." in name and name in names:
                raise ValueError(f"{name} is there twice")
            names.add(name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return options


def _check_name(name: str, dashes: str = "") -> None:
    for other, spelling in _SPELLING.items():
        if name == other or name.startswith(f"{other}."):
            raise ValueError(f"{dashes}{name} is spelt {dashes}{spelling}{name.removeprefix(other)}")


def _spelt(options: Mapping[Any, Any], folder: Path) -> Iterator[str]:
    """Yield the names of options and of their parts, such as ``optimizer`` and ``optimizer.eps``.

    Args:
        options: the options; a group's value may be YAML, or the name of a file in `folder`.
        folder: the folder of the file with the options.
    """
    for name, value in options.items():
        if isinstance(value, str) and name in _GROUPS:
            value = _read_group(value, folder)
        yield str(name)
        if isinstance(value, dict):
            yield from (f"{name}.{part}" for part in _spelt(value, folder))


def _read_group(value: str, folder: Path) -> Any:
    """Return the options that a group's value stands for; None if it is neither YAML nor a file."""
    try:
        return _read_yaml(folder / value) if (folder / value).is_file() else yaml.safe_load(value)
    except (OSError, RecursionError, yaml.YAMLError):
        return None  # The parser of options has a better error.


def _read_yaml(path: Path) -> Any:
    """Read a YAML file whose aliases do not stand for very many values."""
    try:
        text = path.read_text()
        root = yaml.compose(text, yaml.SafeLoader)
        sizes: dict[int, float] = {}
        if root is not None and _written_out(root, sizes) > len(sizes) + _MOST_ALIASED:
            raise ValueError(f"its aliases stand for more than {_MOST_ALIASED:,} values")
        if root is not None and (key := _key_again(root)) is not None:
            raise ValueError(f"{key.value} is there twice, again in line {key.start_mark.line + 1}")
        return yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error


def _key_again(node: yaml.Node) -> yaml.Node | None:
    """Return the first key that its mapping has twice, or None. YAML's loader would drop the earlier value."""
    if isinstance(node, yaml.MappingNode):
        keys: set[Any] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                return key
            keys.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
            if (found := _key_again(value)) is not None:
                return found
    elif isinstance(node, yaml.SequenceNode):
        return next((found for part in node.value if (found := _key_again(part)) is not None), None)
    return None


def _written_out(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Count the nodes of a YAML node with each alias written out; infinite if the node contains itself.

    Args:
        node: the node.
        sizes: the known counts, by the node's identity.
    """
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for each in inside for part in (each if isinstance(each, tuple) else (each,))]
        sizes[id(node)] = 1 + sum(_written_out(part, sizes) for part in parts)
    return sizes[id(node)]
