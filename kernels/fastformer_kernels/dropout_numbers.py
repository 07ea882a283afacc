"""The two numbers that dropout with a given probability needs. Every backend shares them: no triton is needed."""

from __future__ import annotations


def dropout_threshold(dropout_p: float) -> int:
    """Return the 32-bit word below which an element's random word drops it; the largest word for a probability of 1."""
    return min(round(dropout_p * 2**32), 2**32 - 1)


def kept_scale(dropout_p: float) -> float:
    """Return the factor of a kept element, ``1 / (1 - dropout_p)``; zero if all are dropped."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
