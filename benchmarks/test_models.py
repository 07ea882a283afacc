"""Models beside Hugging Face's with the same weights."""

from __future__ import annotations

from collections.abc import Callable


def test_models(reach_goals: Callable[[str], None]) -> None:
    reach_goals("models")
