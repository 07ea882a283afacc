"""Measurements of a benchmark: values of a metric, one for each round, of each peer that did a case's work."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

OURS = "fastformer"


@dataclass(frozen=True)
class Metric:
    """A quantity that is measured.

    Attributes:
        name: the name, such as "time".
        unit: the unit of the values.
        higher_is_better: whether a higher value is better.
    """

    name: str
    unit: str
    higher_is_better: bool = False


TIME = Metric("time", "s")
PEAK_MEMORY = Metric("peak memory", "MiB")


@dataclass(frozen=True)
class Measurement:
    """One metric of one peer in one case.

    Attributes:
        study, case: the work that was done.
        peer: the peer that did it; `OURS` is Fastformer.
        metric: the metric that was measured.
        values: one value for each round. In each round the peers take turns. Empty if the peer could not take part.
        work: the amount of work of one run, by unit: tokens, FLOP, bytes.
        curve, axis, at: the curve that the case is a point of, the name of its x axis, and the place on that axis.
        missing: the reason why there are no values.
        modelled: whether the values were computed rather than measured.
    """

    study: str
    case: str
    peer: str
    metric: Metric
    values: Sequence[float]
    work: dict[str, float] = field(default_factory=dict)
    curve: str | None = None
    axis: str | None = None
    at: float | None = None
    missing: str | None = None
    modelled: bool = False

    @property
    def median(self) -> float:
        """The median of the values."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest of the values."""
        return min(self.values), max(self.values)


def ratio(ours: Measurement, peer: Measurement) -> float:
    """The median ratio of all rounds: for time, peer / ours (2 is twice as fast); for other metrics, ours / peer.

    Ratios are taken within a round, because other work on the machine slows down both peers. If only the peer's value
    is 0, the ratio is infinite.
    """
    rounds = list(zip(ours.values, peer.values, strict=False))
    if ours.metric == TIME:
        return statistics.median(theirs / mine for mine, theirs in rounds)
    return statistics.median(_part(mine, theirs) for mine, theirs in rounds)


def _part(mine: float, theirs: float) -> float:
    """`mine` divided by `theirs`. If `theirs` is 0 (spilled bytes, for example): 1 if both are 0, else infinity."""
    if theirs == 0:
        return 1.0 if mine == 0 else math.inf
    return mine / theirs


@dataclass(frozen=True)
class Goal:
    """A goal of a study: a bound on the ratio to a peer (see `ratio`), in all cases whose name begins with `case`.

    Attributes:
        case: the beginning of the names of cases, or several.
        peer: the peer to compare with; None if the bound is for our own median.
        metric: the metric.
        at_least, at_most: the bounds; exactly one of them is given.
    """

    case: str | tuple[str, ...]
    peer: str | None
    metric: Metric = TIME
    at_least: float | None = None
    at_most: float | None = None

    def met(self, found: float) -> bool:
        """Whether the ratio `found` is within the bounds."""
        return (self.at_least is None or found >= self.at_least) and (self.at_most is None or found <= self.at_most)

    def __str__(self) -> str:
        case = self.case if isinstance(self.case, str) else " or ".join(self.case)
        return f"{case}: {self.metric.name} {self.bound}{'' if self.peer is None else f' {self.peer}'}"

    @property
    def bound(self) -> str:
        """The bound in words, such as "at least 2 x"."""
        bound = f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"
        return f"{bound} {self.unit}"

    @property
    def unit(self) -> str:
        """The unit of the bound: that of the metric, or "x" for a ratio."""
        return self.metric.unit if self.peer is None else "x"


@dataclass(frozen=True)
class Verdict:
    """A goal, and the value that was found in a case of a study (None if the peer is missing)."""

    goal: Goal
    study: str
    case: str
    found: float | None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None if nothing could be compared."""
        return None if self.found is None else self.goal.met(self.found)


def verdicts(goals: Sequence[Goal], measurements: Sequence[Measurement]) -> list[Verdict]:
    """Judge each goal in each of its cases.

    Raises:
        ValueError: no measured case belongs to a goal.
    """
    by_key = {(each.case, each.peer, each.metric): each for each in measurements}
    judged = []
    for goal in goals:
        cases = [
            case
            for case, peer, metric in by_key
            if case.startswith(goal.case) and (peer, metric) == (goal.peer or OURS, goal.metric)
        ]
        if not cases:
            raise ValueError(f"no case for the goal {str(goal)!r}; measured were {sorted({k[0] for k in by_key})}")
        for case in cases:
            ours, peer = by_key[case, OURS, goal.metric], by_key[case, goal.peer or OURS, goal.metric]
            found = None
            if ours.values and peer.values:
                found = ours.median if goal.peer is None else ratio(ours, peer)
            judged.append(Verdict(goal, ours.study, case, found))
    return judged


def worst(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdict of the worst case for each goal of each study. A case without a measurement counts as worst."""
    kept: dict[tuple[str, Goal], Verdict] = {}
    for each in verdicts:
        key = each.study, each.goal
        if key not in kept or _distance(each) < _distance(kept[key]):
            kept[key] = each
    return list(kept.values())


def _distance(verdict: Verdict) -> float:
    """The distance of the value beyond the bound: negative if the goal is missed, minus infinity without a value."""
    if verdict.found is None:
        return -math.inf
    goal = verdict.goal
    return verdict.found - goal.at_least if goal.at_least is not None else (goal.at_most or 0.0) - verdict.found
