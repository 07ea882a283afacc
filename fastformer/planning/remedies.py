"""Changes with which a training run that does not fit into memory would fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastformer.models import FastformerConfig
from fastformer.planning.needs import Setup, plan


def what_fits(config: FastformerConfig, kind: str, setup: Setup) -> dict[str, Any] | None:
    """Return the first of several changes of `setup` with which the run would fit; None if none helps.

    Args:
        config, kind: see `plan`.
        setup: the settings of a run that does not fit.

    Returns:
        The fields of `Setup` to change, with their new values.
    """
    smallest = {"batch_size": 1, "checkpointing": True}
    candidates: list[dict[str, Any]] = [{"checkpointing": True}, {"batch_size": 1}, smallest]
    if setup.devices > 1:
        candidates += [{"strategy": "fsdp"}, {"strategy": "fsdp", **smallest}]
    for changes in candidates:
        if plan(config, kind, replace(setup, **changes)).fits:
            return {name: value for name, value in changes.items() if getattr(setup, name) != value}
    return None
