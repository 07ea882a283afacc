"""The pictures of a study: curves where cases differ in a size, otherwise bars of the ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from fastformer.benchmarking.measurement import OURS, TIME, Goal, Measurement, ratio
from fastformer.data.files import atomic_file

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's palette, distinguishable without red-green vision.
_WIN, _LOSS = "#0072B2", "#D55E00"
_COLORS = (_WIN, "#E69F00", "#009E73", _LOSS, "#CC79A7", "#56B4E9", "#F0E442", "#555555")


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
    """A row for each metric, a column for each curve; the peers' lines with their ranges."""
    curves = list(dict.fromkeys(each.curve for each in measured))
    metrics = list(dict.fromkeys(each.metric for each in measured))
    peers = list(dict.fromkeys(each.peer for each in measured))
    size = (1.5 + 4.5 * len(curves), 0.8 + 3.4 * len(metrics))
    figure, axes = plt.subplots(len(metrics), len(curves), figsize=size, squeeze=False, layout="constrained")
    for row, metric in zip(axes, metrics, strict=True):
        for axis, curve in zip(row, curves, strict=True):
            points = [each for each in measured if each.metric == metric and each.curve == curve]
            for color, peer in zip(_colors(peers), peers, strict=True):
                line = sorted((each for each in points if each.peer == peer), key=lambda each: each.at or 0)
                if line:
                    _line(axis, line, peer, color)
            axis.set(title=curve or "", ylabel=f"{metric.name} ({metric.unit})", xscale="log", yscale="log")
            if points:
                axis.set_xlabel(points[0].axis or "")
            axis.grid(True, which="major", linewidth=0.3)
            axis.legend(fontsize=7)
    return figure


def _line(axis: plt.Axes, line: Sequence[Measurement], peer: str, color: str) -> None:
    at = [each.at or 0.0 for each in line]
    axis.plot(at, [each.median for each in line], color=color, marker="o", markersize=4, label=peer)
    low, high = ([each.spread[end] for each in line] for end in (0, 1))
    axis.fill_between(at, low, high, color=color, alpha=0.2)


def _colors(peers: Sequence[str]) -> list[str]:
    return [_COLORS[place % len(_COLORS)] for place in range(len(peers))]


def _bars(measured: Sequence[Measurement], goals: Sequence[Goal]) -> plt.Figure | None:
    """A panel for each metric, with a bar for each case and peer: how much better ours is, 1 is equal."""
    ours = {(each.case, each.metric): each for each in measured if each.peer == OURS}
    compared = [
        each
        for each in measured
        if each.peer != OURS
        and (each.case, each.metric) in ours
        and math.isfinite(ratio(ours[each.case, each.metric], each))
    ]
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
