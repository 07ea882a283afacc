"""The steps of the GPU benchmark, a module each, that has it as `STEP`."""

from __future__ import annotations

import importlib

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
"""Their names, in order of worth."""


def module_of(name: str) -> str:
    """The module of a step.

    Raises:
        ValueError: there is no such step.
    """
    if name not in STEPS:
        raise ValueError(f"step must be one of {', '.join(STEPS)}, got {name!r}")
    return f"{__name__}.{name}"


def load(name: str) -> Step:
    """The step of that name.

    Raises:
        ValueError: there is no such step.
    """
    return importlib.import_module(module_of(name)).STEP
