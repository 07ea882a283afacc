"""What the kernels compile to on each architecture."""

from __future__ import annotations

from collections.abc import Callable


def test_kernels(reach_goals: Callable[[str], None]) -> None:
    reach_goals("kernels")
