"""What the records of a step come to: Fastformer's figure of each case beside its peers'."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastformer.benchmarking.gpu.records import Entry
from fastformer.benchmarking.measurement import OURS

ERROR = "error"
"""The metric of how far a result is from the exact one."""

CEILING = "ceiling"
"""The metric of what the step `environment` found to be the most, in TFLOP/s and GB/s."""


@dataclass(frozen=True)
class Finding:
    """A metric of a case.

    Attributes:
        case, metric, unit: as in the records.
        values: of everybody who has one.
    """

    case: str
    metric: str
    unit: str
    values: dict[str, float]

    @property
    def ours(self) -> float | None:
        return self.values.get(OURS)

    @property
    def peers(self) -> list[str]:
        return [name for name in self.values if name != OURS]

    @property
    def best_peer(self) -> str | None:
        """The best of the others."""
        best = max if more_is_better(self.unit) else min
        return best(self.peers, key=self.values.__getitem__, default=None)

    @property
    def ratio(self) -> float | None:
        """How many times as good as the best peer Fastformer is; None where one of them has no figure."""
        if self.ours is None or self.best_peer is None:
            return None
        ours, theirs = self.ours, self.values[self.best_peer]
        better, worse = (ours, theirs) if more_is_better(self.unit) else (theirs, ours)
        return better / worse if worse else None


def more_is_better(unit: str) -> bool:
    """Of a figure in this unit."""
    return "/s" in unit or unit == "%"


def findings_of(records: Iterable[Entry]) -> list[Finding]:
    """In the order in which they were found."""
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    for record in records:
        if record["value"] is not None:
            values.setdefault((record["case"], record["metric"], record["unit"]), {})[record["peer"]] = record["value"]
    return [Finding(*key, by_peer) for key, by_peer in values.items()]


def worst_error(findings: Sequence[Finding]) -> Finding | None:
    """The error that is largest beside the peers', else the largest."""
    errors = [each for each in findings if each.metric == ERROR and each.ours is not None]
    compared = [each for each in errors if each.ratio is not None]
    if compared:
        return min(compared, key=lambda each: each.ratio or 0.0)
    return max(errors, key=lambda each: each.ours or 0.0, default=None)


def mean_ratio(findings: Sequence[Finding]) -> tuple[float, float, float, int] | None:
    """Geometric mean, least, most and number of the ratios to the best peer, errors left out."""
    ratios = [each.ratio for each in findings if each.metric != ERROR and each.ratio]
    if not ratios:
        return None
    return math.exp(sum(map(math.log, ratios)) / len(ratios)), min(ratios), max(ratios), len(ratios)


def ceilings(records: Iterable[Entry]) -> dict[str, float]:
    """By unit, of the records of the step `environment`."""
    return {record["unit"]: record["value"] for record in records if record["metric"] == CEILING and record["value"]}
