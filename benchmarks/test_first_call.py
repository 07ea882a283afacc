"""The first step of a new process, compilation included."""

from __future__ import annotations

from collections.abc import Callable


def test_first_call(reach_goals: Callable[[str], None]) -> None:
    reach_goals("first-call")
