"""Where along a curve one peer overtakes another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastformer.benchmarking.measurement import OURS, Measurement, Metric

EQUAL = 0.03
"""By which share two medians may differ and be equal: lines that lie on each other do not cross."""


@dataclass(frozen=True)
class Comparison:
    """Two peers along a curve.

    Attributes:
        curve, axis, metric: which.
        peers: the two.
        low, high: the ends of what both have.
        first_winner: who is better at the low end; None if they are equal all along.
        at: where the other one becomes better, and so on in turns; interpolated between the points of the curve, both
            its axis and the ratio on logarithmic scales.
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
        """The one of the two that `peer` is not."""
        return self.peers[1] if peer == self.peers[0] else self.peers[0]

    @property
    def last_winner(self) -> str | None:
        """Who is better at the high end."""
        return self.other(self.first_winner) if len(self.at) % 2 else self.first_winner


def comparisons(measurements: Sequence[Measurement]) -> list[Comparison]:
    """Each curve's lines beside ours, or beside its first where ours is none of them.

    What is measured is compared with what is measured, what is modelled with what is modelled.
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
    # Ratios have no logarithm where one of the two is zero.
    places = sorted(at for at in ours.keys() & theirs.keys() if ours[at].median > 0 < theirs[at].median)
    if len(places) < 2:
        return None
    mine, other = ours[places[0]], theirs[places[0]]
    # Above 0 where ours is better.
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
    """Where the lead passes from one to the other, between points that are clearly ahead on either side."""
    since: int | None = None
    for index, lead in enumerate(leads):
        if abs(lead) <= math.log1p(EQUAL):
            continue
        if since is not None and leads[since] * lead < 0:
            # Of the points between the two, the first that is not on the old side.
            after = next(i for i in range(since + 1, index + 1) if leads[i] * lead >= 0)
            share = leads[after - 1] / (leads[after - 1] - leads[after])
            yield math.exp(math.log(places[after - 1]) + share * math.log(places[after] / places[after - 1]))
        since = index
