"""Lengths of sequences like those of real text: different values up to the longest."""

from __future__ import annotations


def natural_lengths(batch: int, longest: int) -> tuple[int, ...]:
    """Return `batch` unsorted lengths, spread evenly up to `longest`, which is last. The others are not round."""
    spread = [max(1, int(longest * (place + 0.63) / batch)) for place in range(batch - 1)]
    return (*spread[1::2], *spread[::2], longest)
