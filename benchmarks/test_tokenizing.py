"""Tokenizing and packing: five megabytes of text a second on a core, in memory that does not grow with the text."""

from __future__ import annotations

from collections.abc import Callable


def test_tokenizing(reach_goals: Callable[[str], None]) -> None:
    reach_goals("tokenizing")
