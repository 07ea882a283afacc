"""Greedy generation: one and a half times Hugging Face's speed for prompts of different lengths, no less for one."""

from __future__ import annotations

from collections.abc import Callable


def test_generation(reach_goals: Callable[[str], None]) -> None:
    reach_goals("generation")
