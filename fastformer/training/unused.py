"""Options that would have no effect: those of a mode that is off, and those of another task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jsonargparse import Namespace

# The options of a group, or one option, and the option that they are for.
_NEEDS = {"adapter": "lora", "adversary": "adversarial", "privacy": "privacy_epsilon", "monitor": "patience"}

WRITING = ("summarize", "translate", "generate")
"""The tasks whose models write texts."""

_OF_TASKS: dict[str, tuple[str, ...]] = {
    "text.stride": ("qa",),
    "text.no_answer": ("qa",),
    "text.prefix": ("summarize", "translate"),
    "text.languages": ("translate",),
    "text.beams": WRITING,
}


def check_used(options: Namespace, defaults: Namespace) -> None:
    """Check that each option with another value than its default has an effect.

    Args:
        options: the options of a training command.
        defaults: the defaults of all of them.

    Raises:
        ValueError: an option has no effect; the error names it, and what it is for.
    """
    for name in changed(options, defaults):
        needed = _NEEDS.get(name.partition(".")[0])
        if needed is not None and not options[needed]:
            raise ValueError(f"--{name} is for --{needed}, which is not given")
        tasks = _OF_TASKS.get(name)
        if tasks is not None and options.task not in tasks:
            raise ValueError(f"--{name} is for {' and '.join(tasks)}, not for {options.task}")


def changed(options: Namespace, defaults: Namespace) -> Iterator[str]:
    """Yield the names of the options whose value is not the default, such as ``text.beams``."""
    usual: dict[str, Any] = dict(defaults.items())
    yield from (name for name, value in options.items() if name in usual and value != usual[name])
