"""Scaling: what a step of the largest sizes takes is what a model fitted to smaller ones says, within bounds."""

from __future__ import annotations

from collections.abc import Callable


def test_scaling(reach_goals: Callable[[str], None]) -> None:
    reach_goals("scaling")
