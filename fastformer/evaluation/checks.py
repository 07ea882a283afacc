"""The check that every metric makes of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_as_many(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """Raise ValueError unless there are equally many predictions and references, and at least one of each."""
    if len(predictions) != len(references):
        raise ValueError(f"got {len(predictions)} predictions and {len(references)} references; give one for each")
    if not len(predictions):
        raise ValueError("predictions are empty; give at least one")
