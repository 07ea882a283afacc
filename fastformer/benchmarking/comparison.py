"""Comparison with an earlier run: find what became slower, larger or worse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastformer.benchmarking.measurement import OURS, Measurement, ratio
from fastformer.benchmarking.results import Results

# A median of a few rounds on a shared machine varies by some per cent from run to run.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Change:
    """The change of one of our metrics between two runs, by itself or compared with a peer of the same run.

    Attributes:
        study, case, metric: the study, the case and the metric.
        peer: the peer that both values are compared with. None for the value itself, which also depends on the machine.
        old, new: the values, or their ratios to the peer's.
        regression: whether `new` is worse by more than `TOLERANCE` and, if it is a value, worse than all old rounds.
    """

    study: str
    case: str
    metric: str
    peer: str | None
    old: float
    new: float
    regression: bool


def changes(old: Results, new: Results) -> Iterator[Change]:
    """Yield the changes of all our metrics that both runs have measured: of the values, and of their ratios to peers.

    Raises:
        ValueError: one run had the quick sizes, the other the full ones.
    """
    if old.quick != new.quick:
        raise ValueError("one of the runs to compare was --quick, the other was not")
    before = {_key(each): each for each in _all(old)}
    for each in _all(new):
        past = before.get(_key(each))
        if past is None or each.modelled or not (past.values and each.values):
            continue
        if each.peer == OURS:
            yield _change(past, each)
        elif (mine := before.get(_key(each, OURS))) and mine.values:
            now = next(other for other in new.studies[each.study] if _key(other) == _key(each, OURS))
            yield _relative(past, each, ratio(mine, past), ratio(now, each))


def _all(results: Results) -> Iterator[Measurement]:
    for study in results.studies.values():
        yield from study


def _key(measurement: Measurement, peer: str | None = None) -> tuple[str, str, str, str]:
    return measurement.study, measurement.case, peer or measurement.peer, measurement.metric.name


def _change(old: Measurement, new: Measurement) -> Change:
    low, high = old.spread
    if new.metric.higher_is_better:
        worse = new.median < min(low, old.median * (1 - TOLERANCE))
    else:
        worse = new.median > max(high, old.median * (1 + TOLERANCE))
    return Change(new.study, new.case, new.metric.name, None, old.median, new.median, worse)


def _relative(old: Measurement, new: Measurement, past: float, now: float) -> Change:
    better_when_larger = new.metric.higher_is_better or new.metric.name == "time"
    worse = now < past * (1 - TOLERANCE) if better_when_larger else now > past * (1 + TOLERANCE)
    return Change(new.study, new.case, new.metric.name, old.peer, past, now, worse)
