"""The pictures of a study: curves where cases differ in a size, otherwise bars of the ratios."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from fastformer.benchmarking.crossovers import comparisons
from fastformer.benchmarking.measurement import OURS, TIME, Goal, Measurement, Metric, ratio
from fastformer.benchmarking.tables import number
from fastformer.data.files import atomic_file

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's palette, distinguishable without red-green vision.
_WIN, _LOSS = "#0072B2", "#D55E00"
_COLORS = (_WIN, "#E69F00", "#009E73", _LOSS, "#CC79A7", "#56B4E9", "#F0E442", "#555555")
# Panels in a row.
_COLUMNS = 4


def draw(measurements: Sequence[Measurement], goals: Sequence[Goal], title: str, path: Path) -> bool:
    """Draw a study to `path`, a PNG; False if it has nothing to compare, and nothing was drawn."""
    measured = [each for each in measurements if each.values]
    curved = [each for each in measured if each.at is not None]
    figure = _curves(curved) if curved else _bars(measured, goals)
    if figure is None:
        return False
    figure.suptitle(title)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return True


def _curves(measured: Sequence[Measurement]) -> plt.Figure:
    """A panel for each metric and curve, metric by metric; the peers' lines with their ranges."""
    metrics = list(dict.fromkeys(each.metric for each in measured))
    panels: dict[tuple[Metric, str | None], list[Measurement]] = {}
    for each in sorted(measured, key=lambda each: metrics.index(each.metric)):
        panels.setdefault((each.metric, each.curve), []).append(each)
    columns = min(_COLUMNS, len({curve for _, curve in panels}))
    rows = math.ceil(len(panels) / columns)
    size = (1.5 + 4.5 * columns, 0.8 + 3.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, points in itertools.zip_longest(axes.flat, panels.values()):
        if points is None:
            axis.set_axis_off()
        else:
            _panel(axis, points)
    return figure


def _panel(axis: plt.Axes, points: Sequence[Measurement]) -> None:
    """One metric along one curve, with the places where the lines cross, and a grey ground beyond what was measured."""
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
    """Dashed where it is modelled."""
    at = [each.at or 0.0 for each in line]
    style = {"linestyle": "--"} if line[0].modelled else {"marker": "o", "markersize": 4}
    axis.plot(at, [each.median for each in line], color=color, label=peer, **style)
    low, high = ([each.spread[end] for each in line] for end in (0, 1))
    axis.fill_between(at, low, high, color=color, alpha=0.2)


def _bars(measured: Sequence[Measurement], goals: Sequence[Goal]) -> plt.Figure | None:
    """A panel for each metric, with a bar for each case and peer: how much better ours is, 1 is equal."""
    ours = {(each.case, each.metric): each for each in measured if each.peer == OURS}
    compared = [each for each in measured if each.peer != OURS and (each.case, each.metric) in ours]
    metrics = list(dict.fromkeys(each.metric for each in compared))
    if not metrics:
        return None
    tallest = max(sum(each.metric == metric for each in compared) for metric in metrics)
    size = (6.5 * len(metrics) + 2, 1.4 + 0.32 * tallest)
    figure, axes = plt.subplots(1, len(metrics), figsize=size, squeeze=False, layout="constrained")
    for axis, metric in zip(axes[0], metrics, strict=True):
        group = [each for each in compared if each.metric == metric]
        found = [ratio(ours[each.case, metric], each) for each in group]
        more_is_better = metric == TIME or metric.higher_is_better
        better = [value >= 1 if more_is_better else value <= 1 for value in found]
        places = range(len(group))
        axis.barh(places, found, color=[_WIN if good else _LOSS for good in better], height=0.7)
        for place, each, value in zip(places, group, found, strict=True):
            axis.text(value, place, f" {value:.2f}", va="center", fontsize=8)
            for goal in goals:
                if goal.metric == metric and goal.peer == each.peer and each.case.startswith(goal.case):
                    axis.plot([goal.at_least or goal.at_most] * 2, [place - 0.4, place + 0.4], color="black")
        axis.axvline(1, color="#555555", linewidth=1)
        axis.set_yticks(places, [f"{each.case}\nbeside {each.peer}" for each in group], fontsize=7)
        axis.set(xlim=(0, 1.15 * max([1.0, *found])), ylim=(len(group) - 0.4, -0.6))
        axis.set_xlabel("fastformer's speed, the peer's is 1" if metric == TIME else f"{metric.name}, the peer's is 1")
    return figure
