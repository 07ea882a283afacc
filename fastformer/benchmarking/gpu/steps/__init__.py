"""The steps of the GPU benchmark, one module for each. The module defines the step as `STEP`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from fastformer.benchmarking.gpu.step import Step

STEPS = (
    "environment",
    "smoke",
    "attention",
    "decode",
    "candidates",
    "rows",
    "feed_forward",
    "host",
    "first_call",
    "training",
    "sanitizer",
)
"""The names of the steps, in order of importance."""


def module_of(name: str) -> str:
    """The name of a step's module.

    Raises:
        ValueError: there is no such step.
    """
    if name not in STEPS:
        raise ValueError(f"step must be one of {', '.join(STEPS)}; got {name!r}")
    return f"{__name__}.{name}"


def load(name: str) -> Step:
    """Load a step by its name.

    Raises:
        ValueError: there is no such step.
    """
    return importlib.import_module(module_of(name)).STEP


def launches_of(names: Sequence[str]) -> list[Callable[[], object]]:
    """The launches of some steps, by name; what they launch is compiled ahead of time.

    Raises:
        ValueError: there is no such step.
    """
    steps = [load(name) for name in names]
    return [launch for step in steps if step.launches for launch in step.launches()]
