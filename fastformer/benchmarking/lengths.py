"""Lengths of sequences like those of real text: different values up to the longest."""

from __future__ import annotations

_OFFSET = 0.63


def natural_lengths(batch: int, longest: int) -> tuple[int, ...]:
    """Return `batch` unsorted lengths, spread evenly up to `longest`, which is last.

    An odd offset within each step keeps the other lengths off multiples of a tile.
    """
    spread = [max(1, int(longest * (place + _OFFSET) / batch)) for place in range(batch - 1)]
    return (*spread[1::2], *spread[::2], longest)
