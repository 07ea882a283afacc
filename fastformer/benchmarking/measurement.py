"""What a benchmark finds: values of a metric, one for each round, for whoever did a case's work."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

OURS = "fastformer"


@dataclass(frozen=True)
class Metric:
    """Something measured.

    Attributes:
        name: as in "time".
        unit: of its values.
        higher_is_better: whether more of it is a win.
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
        study, case: what was done.
        peer: who did it; `OURS` is Fastformer.
        metric: what was measured.
        values: one for each round, in rounds that the peers took in turns; none where there is no `peer`.
        work: what one run does, by unit: tokens, FLOP, bytes.
        curve, at: cases of one curve differ in `at`, the place on the x axis that `axis` names.
        missing: why there are no values.
        modelled: whether they were computed rather than measured.
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
        """The middle one of the values."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """The lowest and the highest of the values."""
        return min(self.values), max(self.values)


def ratio(ours: Measurement, peer: Measurement) -> float:
    """How many times the peer's time ours fits into (2 is twice as fast); for other metrics ours as a part of theirs.

    The median over the rounds of each round's ratio: what else the machine did in a round fell on both. Of nothing,
    whatever there is is infinitely much.
    """
    rounds = list(zip(ours.values, peer.values, strict=False))
    if ours.metric == TIME:
        return statistics.median(theirs / mine for mine, theirs in rounds)
    return statistics.median(_part(mine, theirs) for mine, theirs in rounds)


def _part(mine: float, theirs: float) -> float:
    """`mine` as a part of `theirs`, of which there may be none: of spilled bytes, for one."""
    if theirs == 0:
        return 1.0 if mine == 0 else math.inf
    return mine / theirs


@dataclass(frozen=True)
class Goal:
    """What a study is to show: a ratio (see `ratio`) beside a peer, in the cases whose name begins with `case`.

    Attributes:
        case: one beginning, or several.
        peer: whose ratio; without a peer, our own median is meant.
        metric: of what.
        at_least, at_most: bounds of it; one of them is given.
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
        """In words."""
        bound = f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"
        return f"{bound} {self.unit}"

    @property
    def unit(self) -> str:
        """Of what is bounded."""
        return self.metric.unit if self.peer is None else "x"


@dataclass(frozen=True)
class Verdict:
    """A goal, the study and the case it was looked for in, and what was found (None where the peer is missing)."""

    goal: Goal
    study: str
    case: str
    found: float | None

    @property
    def met(self) -> bool | None:
        """None where nothing could be compared."""
        return None if self.found is None else self.goal.met(self.found)


def verdicts(goals: Sequence[Goal], measurements: Sequence[Measurement]) -> list[Verdict]:
    """Each goal with what was found, in every case it is for.

    Raises:
        ValueError: a goal is for no case that was measured.
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
    """Of each goal of each study the verdict on the case that is furthest from it, or nothing was found in."""
    kept: dict[tuple[str, Goal], Verdict] = {}
    for each in verdicts:
        key = each.study, each.goal
        if key not in kept or _distance(each) < _distance(kept[key]):
            kept[key] = each
    return list(kept.values())


def _distance(verdict: Verdict) -> float:
    """How far beyond its bound what was found is."""
    if verdict.found is None:
        return -math.inf
    goal = verdict.goal
    return verdict.found - goal.at_least if goal.at_least is not None else (goal.at_most or 0.0) - verdict.found
