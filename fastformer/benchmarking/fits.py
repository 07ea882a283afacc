"""Costs as sums of terms: coefficients fitted to what was measured, and the costs of sizes that were not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

Terms = Mapping[str, float]
"""How much of each thing that costs something there is: operations, bytes."""


@dataclass(frozen=True)
class Fit:
    """A cost for each unit of every term, none below zero."""

    coefficients: Mapping[str, float]

    def __call__(self, terms: Terms) -> float:
        """The cost of `terms`."""
        return sum(self.coefficients[name] * amount for name, amount in terms.items())


def fit(points: Sequence[Terms], costs: Sequence[float]) -> Fit:
    """Non-negative least squares of the relative errors (Lawson and Hanson 1974): small sizes count as large ones do.

    Args:
        points: the terms of what was measured, the same in each.
        costs: of each point, above 0.

    Raises:
        ValueError: there are no points, they differ in their terms, or a cost is not above 0.
    """
    if not points or len(points) != len(costs):
        raise ValueError(f"points must be as many as costs, 1 or more; got {len(points)} and {len(costs)}")
    names = list(points[0])
    if any(set(each) != set(names) for each in points):
        raise ValueError(f"points must all have the terms {', '.join(names)}")
    if min(costs) <= 0:
        raise ValueError(f"costs must be above 0; got {min(costs)}")
    relative = np.array([[each[name] for name in names] for each in points], dtype=float) / np.asarray(costs)[:, None]
    # Columns of one size, since a step has 10^12 operations and 10^7 parameters.
    scale = relative.max(0)
    scale[scale == 0] = 1
    coefficients, _ = nnls(relative / scale, np.ones(len(points)))
    return Fit(dict(zip(names, (coefficients / scale).tolist(), strict=True)))
