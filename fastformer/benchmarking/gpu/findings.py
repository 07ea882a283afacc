"""Findings from the records of a step: Fastformer's figure of each case, compared with its peers'."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastformer.benchmarking.gpu.records import Entry
from fastformer.benchmarking.measurement import OURS

ERROR = "error"
"""The metric of the distance of a result from the exact one."""

CEILING = "ceiling"
"""The metric of the ceilings that the step `environment` measures, in TFLOP/s and GB/s."""


@dataclass(frozen=True)
class Finding:
    """The values of a metric in a case.

    Attributes:
        case, metric, unit: the fields of the records.
        values: the values by peer, for all that have one.
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
        """The name of the best peer other than Fastformer."""
        best = max if more_is_better(self.unit) else min
        return best(self.peers, key=self.values.__getitem__, default=None)

    @property
    def ratio(self) -> float | None:
        """The ratio of Fastformer to the best peer, above 1 if Fastformer is better; None if a figure is missing."""
        if self.ours is None or self.best_peer is None:
            return None
        ours, theirs = self.ours, self.values[self.best_peer]
        better, worse = (ours, theirs) if more_is_better(self.unit) else (theirs, ours)
        return better / worse if worse else None


def more_is_better(unit: str) -> bool:
    """Whether a higher figure in this unit is better."""
    return "/s" in unit or unit == "%"


def findings_of(records: Iterable[Entry]) -> list[Finding]:
    """The findings from these records, in order."""
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    for record in records:
        if record["value"] is not None:
            values.setdefault((record["case"], record["metric"], record["unit"]), {})[record["peer"]] = record["value"]
    return [Finding(*key, by_peer) for key, by_peer in values.items()]


def worst_error(findings: Sequence[Finding]) -> Finding | None:
    """The error that is largest compared with the peers' errors. If no peer has an error, our largest error."""
    errors = [each for each in findings if each.metric == ERROR and each.ours is not None]
    compared = [each for each in errors if each.ratio is not None]
    if compared:
        return min(compared, key=lambda each: each.ratio or 0.0)
    return max(errors, key=lambda each: each.ours or 0.0, default=None)


def mean_ratio(findings: Sequence[Finding]) -> tuple[float, float, float, int] | None:
    """Geometric mean, minimum, maximum and number of all ratios to the best peer, except the ratios of errors."""
    ratios = [each.ratio for each in findings if each.metric != ERROR and each.ratio]
    if not ratios:
        return None
    return math.exp(sum(map(math.log, ratios)) / len(ratios)), min(ratios), max(ratios), len(ratios)


def ceilings(records: Iterable[Entry]) -> dict[str, float]:
    """The ceilings by unit, from the records of the step `environment`."""
    return {record["unit"]: record["value"] for record in records if record["metric"] == CEILING and record["value"]}
