"""Attention over lengths and features beside every implementation that is here."""

from __future__ import annotations

from collections.abc import Callable


def test_attention(reach_goals: Callable[[str], None]) -> None:
    reach_goals("attention")
