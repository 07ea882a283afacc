"""Accelerated Hugging Face models on a CPU: no slower than they were, and faster where there is padding."""

from __future__ import annotations

from collections.abc import Callable


def test_accelerated(reach_goals: Callable[[str], None]) -> None:
    reach_goals("accelerated")
