"""What a call costs before any work is done."""

from __future__ import annotations

from collections.abc import Callable


def test_launch(reach_goals: Callable[[str], None]) -> None:
    reach_goals("launch")
