"""Results as rows of text, for a terminal or Markdown."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastformer import markdown
from fastformer.benchmarking.comparison import Change
from fastformer.benchmarking.crossovers import Comparison
from fastformer.benchmarking.measurement import OURS, TIME, Measurement, Metric, Verdict, ratio
from fastformer.planning.gpus import GPUS

# The unit of a rate by unit of work, and its size.
_RATES = {"FLOP": ("TFLOP/s", 1e12), "bytes": ("GB/s", 1e9)}


@dataclass(frozen=True)
class Rows:
    """A table: headings, and rows with a text for each heading."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table in GitHub's Markdown, with numbers aligned right."""
        return markdown.table(self.headings, "ll".ljust(len(self.headings), "r"), self.rows)


def study_tables(measurements: Sequence[Measurement], device: str) -> list[Rows]:
    """The tables of a study: one for each set of metrics, with the cases that have these metrics."""
    metrics: dict[str, dict[Metric, None]] = {}
    for each in measurements:
        metrics.setdefault(each.case, {})[each.metric] = None
    kinds = dict.fromkeys(tuple(found) for found in metrics.values())
    return [study_rows([m for m in measurements if tuple(metrics[m.case]) == kind], device) for kind in kinds]


def study_rows(measurements: Sequence[Measurement], device: str) -> Rows:
    """A table with a row for each case and peer: median and range of each metric, work per second, and the ratio.

    Args:
        measurements: the measurements of one study.
        device: the product's name. If its peak is known, rates are also given as a fraction of it.
    """
    by_key = {(each.case, each.peer, each.metric): each for each in measurements}
    metrics = list(dict.fromkeys(each.metric for each in measurements))
    units = list(dict.fromkeys(unit for each in measurements if each.metric == TIME for unit in each.work))
    compared = {each.metric for each in measurements if each.peer != OURS}
    everywhere = _missing_everywhere(measurements)
    headings = ["case", "by"]
    for metric in metrics:
        headings += [f"{metric.name} ({metric.unit})" if metric.unit else metric.name]
        if metric == TIME:
            headings += [_RATES.get(unit, (f"{unit}/s", 1))[0] for unit in units]
        if metric in compared:
            headings += ["fastformer's speed" if metric == TIME else f"fastformer's {metric.name}"]
    rows = []
    cases = list(dict.fromkeys(each.case for each in measurements))
    pairs = dict.fromkeys((each.case, each.peer) for each in measurements if each.peer not in everywhere)
    for case, peer in sorted(pairs, key=lambda pair: cases.index(pair[0])):
        cells = [case, peer]
        for metric in metrics:
            cells += _cells(by_key.get((case, peer, metric)), metric, units, device)
            if metric in compared:
                cells += [_compared(by_key.get((case, peer, metric)), by_key.get((case, OURS, metric)))]
        rows.append(cells)
    blanks = [""] * (len(headings) - 3)
    rows += [["every case", peer, f"not measured: {reason}", *blanks] for peer, reason in everywhere.items()]
    return Rows(headings, rows)


def _missing_everywhere(measurements: Sequence[Measurement]) -> dict[str, str]:
    """Peers that are missing from all of their several cases for the same reason, with the reason: it is shown once."""
    found: dict[str, set[str | None]] = {}
    cases: dict[str, set[str]] = {}
    for each in measurements:
        found.setdefault(each.peer, set()).add(None if each.values else each.missing)
        cases.setdefault(each.peer, set()).add(each.case)
    return {
        peer: reason
        for peer, reasons in found.items()
        if len(reasons) == 1 and len(cases[peer]) > 1 and (reason := next(iter(reasons))) is not None
    }


def _cells(found: Measurement | None, metric: Metric, units: Sequence[str], device: str) -> list[str]:
    rates = list(units) if metric == TIME else []
    if found is None:
        return ["", *[""] * len(rates)]
    if not found.values:
        return [f"not measured: {found.missing}", *[""] * len(rates)]
    return [_range(found), *[_rate(found, unit, device) for unit in rates]]


def _compared(found: Measurement | None, ours: Measurement | None) -> str:
    if found is None or ours is None or found.peer == OURS or not found.values or not ours.values:
        return ""
    return f"{ratio(ours, found):.2f} x"


def _range(measurement: Measurement) -> str:
    low, high = measurement.spread
    if len(measurement.values) == 1 or low == high:
        return number(measurement.median) + (" (modelled)" if measurement.modelled else "")
    return f"{number(measurement.median)} ({number(low)} to {number(high)})"


def _rate(measurement: Measurement, unit: str, device: str) -> str:
    if unit not in measurement.work:
        return ""
    per_second = measurement.work[unit] / measurement.median
    shown = number(per_second / _RATES.get(unit, ("", 1.0))[1])
    peak = _peak(unit, device)
    return shown if peak is None else f"{shown} ({per_second / peak:.0%} of peak)"


def _peak(unit: str, device: str) -> float | None:
    """The device's peak per second, if it is in `GPUS`, else None. FLOP are in half precision."""
    if "pcie" in device.lower():  # slower than the product of the same name in `GPUS`
        return None
    for gpu in GPUS.values():
        if gpu.name.split(" SXM")[0].lower() in device.lower():
            return {"FLOP": gpu.flops[16], "bytes": gpu.bandwidth}.get(unit)
    return None


def crossover_rows(comparisons: Sequence[Comparison]) -> Rows:
    """A table of the better peer along each curve."""
    return Rows(
        ("curve", "metric", "better", "along"),
        [
            (
                f"{each.curve} (modelled)" if each.modelled else each.curve,
                each.metric.name,
                _winners(each),
                f"{number(each.low)} to {number(each.high)} {each.axis}",
            )
            for each in comparisons
        ],
    )


def _winners(comparison: Comparison) -> str:
    if comparison.first_winner is None:
        return f"{' and '.join(comparison.peers)} are equal"
    winners = itertools.cycle((comparison.first_winner, comparison.other(comparison.first_winner)))
    parts = [f"{winner} up to {number(at)}" for at, winner in zip(comparison.at, winners, strict=False)]
    last = comparison.last_winner
    return f"{', '.join(parts)}, then {last}" if parts else f"{last} throughout, compared with {comparison.other(last)}"


def verdict_rows(verdicts: Sequence[Verdict]) -> Rows:
    """A table of the goals, the values found, and whether they are met."""
    answers = {True: "met", False: "missed", None: "not measured"}
    return Rows(
        ("study", "case", "compared with", "metric", "goal", "found", ""),
        [
            (
                each.study,
                each.case,
                each.goal.peer or "",
                "speed" if each.goal.metric == TIME and each.goal.peer else each.goal.metric.name,
                each.goal.bound,
                "" if each.found is None else f"{each.found:.2f} {each.goal.unit}",
                answers[each.met],
            )
            for each in verdicts
        ],
    )


def change_rows(changes: Sequence[Change]) -> Rows:
    """A table of the changes since another run, regressions first."""
    ordered = sorted(changes, key=lambda change: not change.regression)
    return Rows(
        ("study", "case", "metric", "compared with", "then", "now", ""),
        [
            (
                each.study,
                each.case,
                each.metric,
                each.peer or "",
                number(each.old),
                number(each.new),
                "worse" if each.regression else "",
            )
            for each in ordered
        ],
    )


def environment_rows(rows: Sequence[tuple[str, str]]) -> Rows:
    """A table of the machine and its versions."""
    return Rows(("environment", ""), rows)


def number(value: float) -> str:
    """Format a number with three significant digits. There is no exponent between a nanosecond and a billion."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if digits <= 11 else f"{value:.2e}"
