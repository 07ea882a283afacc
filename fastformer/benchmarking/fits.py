"""Costs as sums of terms: coefficients are fitted to measured sizes, and predict the costs of other sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

Terms = Mapping[str, float]
"""Amounts by name of everything that costs something, such as operations and bytes."""


@dataclass(frozen=True)
class Fit:
    """The cost of one unit of each term, zero or more."""

    coefficients: Mapping[str, float]

    def __call__(self, terms: Terms) -> float:
        """The cost of `terms`."""
        return sum(self.coefficients[name] * amount for name, amount in terms.items())


def fit(points: Sequence[Terms], costs: Sequence[float]) -> Fit:
    """Fit by non-negative least squares of the relative errors (Lawson and Hanson 1974): all sizes count equally.

    Args:
        points: the terms of each measured size. All have the same names.
        costs: the cost of each point, above 0.

    Raises:
        ValueError: there are no points, their terms have different names, or a cost is not above 0.
    """
    if not points or len(points) != len(costs):
        raise ValueError(f"there must be one cost for each point, 1 or more; got {len(points)} and {len(costs)}")
    names = list(points[0])
    if any(set(each) != set(names) for each in points):
        raise ValueError(f"points must all have the terms {', '.join(names)}")
    if min(costs) <= 0:
        raise ValueError(f"costs must be above 0; got {min(costs)}")
    relative = np.array([[each[name] for name in names] for each in points], dtype=float) / np.asarray(costs)[:, None]
    # Scale the columns to the same size: a step has 10^12 operations and 10^7 parameters.
    scale = relative.max(0)
    scale[scale == 0] = 1
    coefficients, _ = nnls(relative / scale, np.ones(len(points)))
    return Fit(dict(zip(names, (coefficients / scale).tolist(), strict=True)))
