"""Results as rows of text, for a terminal or Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastformer.benchmarking.comparison import Change
from fastformer.benchmarking.measurement import OURS, TIME, Measurement, Metric, Verdict, ratio
from fastformer.inspection.gpus import GPUS

# What a second of a unit of work is called, and how many of the unit that is.
_RATES = {"FLOP": ("TFLOP/s", 1e12), "bytes": ("GB/s", 1e9)}


@dataclass(frozen=True)
class Rows:
    """A table: headings, and as many texts in each row."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As GitHub reads it, numbers at the right."""
        rule = ["---" if place < 2 else "---:" for place in range(len(self.headings))]
        lines = [self.headings, rule, *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def study_rows(measurements: Sequence[Measurement], device: str) -> Rows:
    """A row for each case and peer: every metric's median and range, what it is in work per second, and the ratio.

    Args:
        measurements: of one study.
        device: the product's name, for the fraction of its peak where that is known.
    """
    by_key = {(each.case, each.peer, each.metric): each for each in measurements}
    metrics = list(dict.fromkeys(each.metric for each in measurements))
    units = list(dict.fromkeys(unit for each in measurements if each.metric == TIME for unit in each.work))
    headings = ["case", "by"]
    for metric in metrics:
        headings += [f"{metric.name} ({metric.unit})" if metric.unit else metric.name]
        if metric == TIME:
            headings += [_RATES.get(unit, (f"{unit}/s", 1))[0] for unit in units]
        headings += ["fastformer's speed" if metric == TIME else f"fastformer's {metric.name}"]
    rows = []
    for case, peer in dict.fromkeys((each.case, each.peer) for each in measurements):
        cells = [case, peer]
        for metric in metrics:
            cells += _cells(by_key.get((case, peer, metric)), by_key.get((case, OURS, metric)), metric, units, device)
        rows.append(cells)
    return Rows(headings, rows)


def _cells(
    found: Measurement | None, ours: Measurement | None, metric: Metric, units: Sequence[str], device: str
) -> list[str]:
    blanks = len(units) + 2 if metric == TIME else 2
    if found is None:
        return [""] * blanks
    if not found.values:
        return [f"not measured: {found.missing}", *[""] * (blanks - 1)]
    cells = [_range(found)]
    if metric == TIME:
        cells += [_rate(found, unit, device) for unit in units]
    compared = found.peer != OURS and ours is not None and ours.values
    return [*cells, f"{ratio(ours, found):.2f} x" if compared else ""]  # type: ignore[arg-type]


def _range(measurement: Measurement) -> str:
    low, high = measurement.spread
    if len(measurement.values) == 1 or low == high:
        return number(measurement.median)
    return f"{number(measurement.median)} ({number(low)} to {number(high)})"


def _rate(measurement: Measurement, unit: str, device: str) -> str:
    if unit not in measurement.work:
        return ""
    per_second = measurement.work[unit] / measurement.median
    shown = number(per_second / _RATES.get(unit, ("", 1.0))[1])
    peak = _peak(unit, device)
    return shown if peak is None else f"{shown} ({per_second / peak:.0%} of peak)"


def _peak(unit: str, device: str) -> float | None:
    """The device's most per second, where it is one that training is planned on; FLOP in half precision."""
    for gpu in GPUS.values():
        if gpu.name.split()[0].lower() in device.lower():
            return {"FLOP": gpu.flops[16], "bytes": gpu.bandwidth}.get(unit)
    return None


def verdict_rows(verdicts: Sequence[Verdict]) -> Rows:
    """The goals, what was found, and whether that is enough."""
    answers = {True: "met", False: "missed", None: "not measured"}
    return Rows(
        ("case", "goal", "found", ""),
        [
            (
                each.case,
                str(each.goal),
                "" if each.found is None else f"{each.found:.2f} {each.goal.unit}",
                answers[each.met],
            )
            for each in verdicts
        ],
    )


def change_rows(changes: Sequence[Change]) -> Rows:
    """What changed since another run, regressions first."""
    ordered = sorted(changes, key=lambda change: not change.regression)
    return Rows(
        ("study", "case", "metric", "beside", "then", "now", ""),
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
    """The machine and its versions."""
    return Rows(("environment", ""), rows)


def number(value: float) -> str:
    """With three significant digits, and no exponent between a nanosecond and a billion."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}" if digits <= 11 else f"{value:.2e}"
