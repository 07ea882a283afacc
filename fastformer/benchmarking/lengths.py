"""Lengths of sequences as text has them: anything up to the longest, where equal ones would be the exception."""

from __future__ import annotations


def natural_lengths(batch: int, longest: int) -> tuple[int, ...]:
    """`batch` lengths spread evenly up to `longest`, the last of them, in no order and of no round size."""
    spread = [max(1, int(longest * (place + 0.63) / batch)) for place in range(batch - 1)]
    return (*spread[1::2], *spread[::2], longest)
