"""Crossovers: the places along a curve at which one peer overtakes another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastformer.benchmarking.measurement import OURS, Measurement, Metric

EQUAL = 0.03
"""The relative difference below which two medians count as equal: lines that overlap do not cross."""


@dataclass(frozen=True)
class Comparison:
    """Two peers along a curve.

    Attributes:
        curve, axis, metric: the curve, its axis and the metric.
        peers: the two peers.
        low, high: the ends of the range in which both have values.
        first_winner: the peer that is better at the low end; None if they are equal everywhere.
        at: the places at which the better peer changes, in order. They are interpolated between the points of the
            curve, with logarithmic scales for both the axis and the ratio.
        modelled: whether both are computed, not measured.
    """

    curve: str
    axis: str
    metric: Metric
    peers: tuple[str, str]
    low: float
    high: float
    first_winner: str | None
    at: Sequence[float]
    modelled: bool

    def other(self, peer: str | None) -> str:
        """The peer of the two that is not `peer`."""
        return self.peers[1] if peer == self.peers[0] else self.peers[0]

    @property
    def last_winner(self) -> str | None:
        """The peer that is better at the high end."""
        return self.other(self.first_winner) if len(self.at) % 2 else self.first_winner


def comparisons(measurements: Sequence[Measurement]) -> list[Comparison]:
    """Compare each line of a curve with ours, or with the first line if there is none of ours.

    Measured lines are compared with measured ones, modelled lines with modelled ones.
    """
    lines: dict[tuple[str, Metric, bool], dict[str, dict[float, Measurement]]] = {}
    for each in measurements:
        if each.values and each.at is not None:
            peers = lines.setdefault((each.curve or "", each.metric, each.modelled), {})
            peers.setdefault(each.peer, {})[each.at] = each
    found = []
    for peers in lines.values():
        ours = OURS if OURS in peers else next(iter(peers))
        found += [_comparison(peers[ours], peers[peer]) for peer in peers if peer != ours]
    return [comparison for comparison in found if comparison is not None]


def _comparison(ours: dict[float, Measurement], theirs: dict[float, Measurement]) -> Comparison | None:
    # A ratio has no logarithm if one of the two values is zero.
    places = sorted(at for at in ours.keys() & theirs.keys() if ours[at].median > 0 < theirs[at].median)
    if len(places) < 2:
        return None
    mine, other = ours[places[0]], theirs[places[0]]
    # A lead is above 0 if ours is better.
    better = 1 if mine.metric.higher_is_better else -1
    leads = [better * math.log(ours[at].median / theirs[at].median) for at in places]
    clear = [lead for lead in leads if abs(lead) > math.log1p(EQUAL)]
    first = None if not clear else mine.peer if clear[0] > 0 else other.peer
    return Comparison(
        mine.curve or "",
        mine.axis or "",
        mine.metric,
        (mine.peer, other.peer),
        places[0],
        places[-1],
        first,
        list(_crossings(places, leads)),
        mine.modelled,
    )


def _crossings(places: Sequence[float], leads: Sequence[float]) -> Iterator[float]:
    """Yield the places at which the lead changes, between two points at which different peers are clearly ahead."""
    since: int | None = None
    for index, lead in enumerate(leads):
        if abs(lead) <= math.log1p(EQUAL):
            continue
        if since is not None and leads[since] * lead < 0:
            # The first point between the two that is not on the old side.
            after = next(i for i in range(since + 1, index + 1) if leads[i] * lead >= 0)
            share = leads[after - 1] / (leads[after - 1] - leads[after])
            yield math.exp(math.log(places[after - 1]) + share * math.log(places[after] / places[after - 1]))
        since = index
