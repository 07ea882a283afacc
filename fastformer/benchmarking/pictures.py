"""The pictures of a study: curves for cases that differ in a size, bars of ratios for all others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import matplotlib

from fastformer.benchmarking.crossovers import comparisons
from fastformer.benchmarking.measurement import OURS, TIME, Goal, Measurement, Metric, ratio
from fastformer.benchmarking.tables import number
from fastformer.files import atomic_file

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's palette, which colour-blind readers can distinguish.
_WIN, _LOSS = "#0072B2", "#D55E00"
_COLORS = (_WIN, "#E69F00", "#009E73", _LOSS, "#CC79A7", "#56B4E9", "#F0E442", "#555555")
# The most panels in a row.
_COLUMNS = 4
# The largest ratio with a bar of its own length; longer bars end here.
_WIDEST = 32.0


def draw(measurements: Sequence[Measurement], goals: Sequence[Goal], title: str, path: Path) -> list[Path]:
    """Draw a study as PNG: its curves to `path`, and its ratios to `path` or, if there are curves, to a second file.

    Returns:
        The files that were written; none if there is nothing to compare.
    """
    measured = [each for each in measurements if each.values]
    curved = [each for each in measured if each.at is not None]
    bars = path.with_stem(f"{path.stem}-ratios") if curved else path
    drawn = []
    for figure, place in (
        (_curves(curved) if curved else None, path),
        (_bars([each for each in measured if each.at is None], goals), bars),
    ):
        if figure is None:
            continue
        figure.suptitle(title)
        with atomic_file(place) as file:
            figure.savefig(file, format="png", dpi=110)
        plt.close(figure)
        drawn.append(place)
    return drawn


def _curves(measured: Sequence[Measurement]) -> plt.Figure:
    """Draw a panel for each metric and curve, with the peers' lines and their ranges."""
    metrics = list(dict.fromkeys(each.metric for each in measured))
    panels = sorted(
        dict.fromkeys((each.metric, each.curve) for each in measured), key=lambda panel: metrics.index(panel[0])
    )
    # Each metric begins a new row.
    rows: list[list[tuple[Metric, str | None]]] = []
    for panel in panels:
        if not rows or len(rows[-1]) == _COLUMNS or rows[-1][0][0] != panel[0]:
            rows.append([])
        rows[-1].append(panel)
    columns = max(len(row) for row in rows)
    size = (1.5 + 4.5 * columns, 0.8 + 3.4 * len(rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for row, row_axes in zip(rows, axes, strict=True):
        for axis in row_axes[len(row) :]:
            axis.set_axis_off()
        for (metric, curve), axis in zip(row, row_axes, strict=False):
            _panel(axis, [each for each in measured if (each.metric, each.curve) == (metric, curve)])
    return figure


def _panel(axis: plt.Axes, points: Sequence[Measurement]) -> None:
    """Draw a metric along a curve, with marks where lines cross and a grey background beyond the measured range."""
    points = sorted(points, key=lambda each: (each.peer != OURS, each.at))
    for peer, color in zip(dict.fromkeys(each.peer for each in points), itertools.cycle(_COLORS), strict=False):
        _line(axis, [each for each in points if each.peer == peer], peer, color)
    metric = points[0].metric
    axis.set(title=points[0].curve or "", ylabel=f"{metric.name} ({metric.unit})", xscale="log", yscale="log")
    axis.set_xlabel(points[0].axis or "")
    places = sorted({float(each.at or 0) for each in points})
    axis.set_xticks(places, [f"{at:,.0f}" if at.is_integer() else number(at) for at in places], fontsize=7, rotation=30)
    axis.set_xticks([], minor=True)
    for at in (at for comparison in comparisons(points) for at in comparison.at):
        axis.axvline(at, color="black", linestyle=":", linewidth=1)
        axis.text(at, 0.02, f" {number(at)}", transform=axis.get_xaxis_transform(), fontsize=7)
    measured = [each.at or 0 for each in points if not each.modelled]
    if measured and max(measured) < (last := max(each.at or 0 for each in points)):
        axis.axvspan(max(measured), last, color="#999999", alpha=0.15, label="extrapolated")
    axis.grid(True, which="major", linewidth=0.3)
    axis.legend(fontsize=7)


def _line(axis: plt.Axes, line: Sequence[Measurement], peer: str, color: str) -> None:
    """Draw a peer's line with its range; a modelled line is dashed."""
    at = [each.at or 0.0 for each in line]
    style = {"linestyle": "--"} if line[0].modelled else {"marker": "o", "markersize": 4}
    axis.plot(at, [each.median for each in line], color=color, label=peer, **style)
    low, high = ([each.spread[end] for each in line] for end in (0, 1))
    axis.fill_between(at, low, high, color=color, alpha=0.2)


def _bars(measured: Sequence[Measurement], goals: Sequence[Goal]) -> plt.Figure | None:
    """Draw a panel for each metric, with a group for each case and a bar for each peer: the `ratio`, where 1 is equal.

    The axis is logarithmic, so that 2 and 0.5 are equally far from 1.
    """
    ours = {(each.case, each.metric): each for each in measured if each.peer == OURS}
    compared = [each for each in measured if each.peer != OURS and (each.case, each.metric) in ours]
    metrics = list(dict.fromkeys(each.metric for each in compared))
    if not metrics:
        return None
    groups = [[each for each in compared if each.metric == metric] for metric in metrics]
    # Between cases there is space for one bar.
    tallest = max(len(group) + len({each.case for each in group}) for group in groups)
    size = (8 * len(metrics), 1.4 + 0.2 * tallest)
    figure, axes = plt.subplots(1, len(metrics), figsize=size, squeeze=False, layout="constrained")
    for axis, metric, group in zip(axes[0], metrics, groups, strict=True):
        cases = list(dict.fromkeys(each.case for each in group))
        places = [place + cases.index(each.case) for place, each in enumerate(group)]
        for place, each in zip(places, group, strict=True):
            _bar(axis, place, ratio(ours[each.case, metric], each), each, goals)
        middles = [
            sum(found) / len(found)
            for case in cases
            for found in [[place for place, each in zip(places, group, strict=True) if each.case == case]]
        ]
        axis.axvline(1, color="#555555", linewidth=1)
        axis.set_yticks(middles, [fill(case, 40) for case in cases], fontsize=7)
        axis.set(xscale="log", ylim=(places[-1] + 1, -1))
        _about_one(axis)
        axis.set_xlabel("fastformer's speed, the peer's is 1" if metric == TIME else f"{metric.name}, the peer's is 1")
    return figure


def _bar(axis: plt.Axes, place: int, value: float, peer: Measurement, goals: Sequence[Goal]) -> None:
    """Draw a bar from 1 to the ratio, with the number and the peer's name at its right."""
    metric = peer.metric
    good = value >= 1 if metric == TIME or metric.higher_is_better else value <= 1
    end = min(max(value, 1 / _WIDEST), _WIDEST)
    axis.barh(place, end - 1, left=1, color=_WIN if good else _LOSS, height=0.8)
    axis.text(max(end, 1), place, f" {number(value)}  {peer.peer}", va="center", fontsize=7)
    for goal in goals:
        if goal.metric == metric and goal.peer == peer.peer and peer.case.startswith(goal.case):
            bound = goal.at_least or goal.at_most or 1.0
            axis.plot([bound, bound], [place - 0.5, place + 0.5], color="black")


def _about_one(axis: plt.Axes) -> None:
    """Set limits that leave space for the names at the bars, and ticks at powers of two."""
    low, high = axis.get_xlim()
    low, high = min(low, 0.5) / 1.1, max(high, 2.0) * 4
    ticks = [2.0**power for power in range(-6, 6) if low <= 2.0**power <= high]
    axis.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks], fontsize=7)
    axis.set_xticks([], minor=True)
    axis.set_xlim(low, high)
