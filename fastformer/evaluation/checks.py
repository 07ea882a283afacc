"""What every metric asks of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_as_many(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    """Raises ValueError unless there are as many references as predictions, and at least one."""
    if len(predictions) != len(references):
        raise ValueError(f"got {len(predictions)} predictions and {len(references)} references; give one for each")
    if not len(predictions):
        raise ValueError("predictions are empty: there is nothing to judge")
