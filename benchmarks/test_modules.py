"""Twins of torch.nn's modules beside them."""

from __future__ import annotations

from collections.abc import Callable


def test_modules(reach_goals: Callable[[str], None]) -> None:
    reach_goals("modules")
