"""Startup: the package adds little to PyTorch's import, and help comes at once."""

from __future__ import annotations

from collections.abc import Callable


def test_startup(reach_goals: Callable[[str], None]) -> None:
    reach_goals("startup")
