"""Tests of ratios, goals, and changes since an earlier run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from fastformer.benchmarking.comparison import changes
from fastformer.benchmarking.environment import Environment
from fastformer.benchmarking.measurement import (
    OURS,
    PEAK_MEMORY,
    TIME,
    Goal,
    Measurement,
    Metric,
    ratio,
    verdicts,
    worst,
)
from fastformer.benchmarking.results import Results, load_results
from fastformer.benchmarking.tables import number, study_rows

pytestmark = pytest.mark.quick

MACHINE = Environment("a CPU", False, None, {}, None, "2026-01-01T00:00:00+00:00", None)
ACCURACY = Metric("accuracy", "", higher_is_better=True)


def found(peer: str, *values: float, metric: Metric = TIME, missing: str | None = None) -> Measurement:
    return Measurement("a-study", "a case", peer, metric, values, {"tokens": 100.0}, missing=missing)


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # In the second round the machine was four times as slow for both peers.
    ours, theirs = found(OURS, 1.0, 4.0, 1.0), found("peer", 2.0, 8.0, 3.0)
    assert ratio(ours, theirs) == 2.0
    assert ratio(found(OURS, 10.0, metric=PEAK_MEMORY), found("peer", 40.0, metric=PEAK_MEMORY)) == 0.25
    assert ratio(found(OURS, 0.5, metric=ACCURACY), found("peer", 0.0, metric=ACCURACY)) == math.inf


@pytest.mark.parametrize(("ours", "theirs", "expected"), [(0.0, 0.0, 1.0), (0.0, 4.0, 0.0), (4.0, 0.0, math.inf)])
def test_ratio_of_nothing(ours: float, theirs: float, expected: float) -> None:
    assert ratio(found(OURS, ours, metric=PEAK_MEMORY), found("peer", theirs, metric=PEAK_MEMORY)) == expected


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("a case", "peer", at_least=2.0), True),
        (Goal("a", "peer", at_least=2.5), False),
        (Goal(("a case", "another"), "peer", at_least=2.0), True),
        (Goal("", "peer", PEAK_MEMORY, at_most=0.5), True),
        (Goal("", "peer", PEAK_MEMORY, at_most=0.2), False),
        (Goal("", "absent", at_least=1.0), None),
        (Goal("", None, at_most=1.0), True),
        (Goal("", None, PEAK_MEMORY, at_most=9.0), False),
    ],
)
def test_goal(goal: Goal, met: bool | None) -> None:
    measured = [
        found(OURS, 1.0),
        found("peer", 2.0),
        found("absent", missing="it is not installed"),
        found(OURS, 10.0, metric=PEAK_MEMORY),
        found("peer", 40.0, metric=PEAK_MEMORY),
    ]
    assert [verdict.met for verdict in verdicts([goal], measured)] == [met]


@pytest.mark.parametrize(
    ("goal", "case"), [(Goal("", "peer", at_least=1.0), "b"), (Goal("", "peer", at_most=1.0), "c")]
)
def test_worst_case_of_a_goal(goal: Goal, case: str) -> None:
    measured = [
        replace(each, case=name)
        for name, seconds in (("a", 2.0), ("b", 1.5), ("c", 3.0))
        for each in (found(OURS, 1.0), found("peer", seconds))
    ]
    assert [verdict.case for verdict in worst(verdicts([goal], measured))] == [case]


def test_goal_for_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no case for the goal 'another: time at least 1 x peer'"):
        verdicts([Goal("another", "peer", at_least=1.0)], [found(OURS, 1.0), found("peer", 1.0)])


def results(*measurements: Measurement) -> Results:
    return Results(MACHINE, studies={"a-study": list(measurements)}, seconds={"a-study": 1.0})


@pytest.mark.parametrize(
    ("old", "new", "worse"),
    [
        (found(OURS, 1.0, 1.1), found(OURS, 1.2, 1.2), True),
        (found(OURS, 1.0, 1.3), found(OURS, 1.2, 1.2), False),  # within the range of the old values
        (found(OURS, 1.0), found(OURS, 1.04), False),
        (found(OURS, 1.0), found(OURS, 0.5), False),
        (found(OURS, 0.9, metric=ACCURACY), found(OURS, 0.8, metric=ACCURACY), True),
        (found(OURS, 0.8, metric=ACCURACY), found(OURS, 0.9, metric=ACCURACY), False),
    ],
)
def test_regression_of_a_value(old: Measurement, new: Measurement, worse: bool) -> None:
    (change,) = changes(results(old), results(new))
    assert (change.old, change.new, change.regression) == (old.median, new.median, worse)


@pytest.mark.parametrize(("metric", "worse"), [(TIME, True), (PEAK_MEMORY, False), (ACCURACY, False)])
def test_regression_beside_a_peer(metric: Metric, worse: bool) -> None:
    """Between two machines only the ratio to the peer counts: here both are faster, but ours has gained less."""
    old = results(found(OURS, 4.0, metric=metric), found("peer", 8.0, metric=metric))
    new = results(found(OURS, 2.0, metric=metric), found("peer", 2.0, metric=metric))
    beside = next(change for change in changes(old, new) if change.peer == "peer")
    assert (beside.old, beside.new) == ((2.0, 1.0) if metric == TIME else (0.5, 1.0))
    assert beside.regression == (worse or metric == PEAK_MEMORY)


def test_a_models_error_is_no_regression() -> None:
    old, new = (results(found(OURS, 1.0), replace(found("model", guess), modelled=True)) for guess in (1.0, 2.0))
    assert [change.peer for change in changes(old, new)] == [None]


def test_quick_and_full_runs_do_not_compare() -> None:
    with pytest.raises(ValueError, match="--quick"):
        list(changes(results(), replace(results(), quick=True)))


def test_results_travel_through_a_file(tmp_path) -> None:
    saved = results(found(OURS, 1.0, 2.0), found("peer", missing="it is not installed"))
    saved.save(tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == replace(
        saved, studies={"a-study": [replace(each, values=list(each.values)) for each in saved.studies["a-study"]]}
    )
    lines = (tmp_path / "results.json").read_text().splitlines()
    assert [line for line in lines if '"values"' in line] == [
        '{"case": "a case", "peer": "fastformer", "metric": {"name": "time", "unit": "s"}, "values": [1.0, 2.0], '
        '"work": {"tokens": 100.0}},',
        '{"case": "a case", "peer": "peer", "metric": {"name": "time", "unit": "s"}, "values": [], '
        '"work": {"tokens": 100.0}, "missing": "it is not installed"}',
    ]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json has no results"):
        load_results(tmp_path / "other.json")


def test_table_has_rates_ratios_and_who_is_missing() -> None:
    table = study_rows([found(OURS, 2.0), found("peer", 4.0), found("absent", missing="it is not installed")], "a CPU")
    assert table.headings == ["case", "by", "time (s)", "tokens/s", "fastformer's speed"]
    assert table.rows == [
        ["a case", OURS, "2.00", "50.0", ""],
        ["a case", "peer", "4.00", "25.0", "2.00 x"],
        ["a case", "absent", "not measured: it is not installed", "", ""],
    ]


def test_who_is_missing_everywhere_is_named_once() -> None:
    cases = [
        replace(each, case=case)
        for case in ("one", "two")
        for each in (found(OURS, 2.0), found("absent", missing="it is not installed"))
    ]
    assert [row[:3] for row in study_rows(cases, "a CPU").rows] == [
        ["one", OURS, "2.00"],
        ["two", OURS, "2.00"],
        ["every case", "absent", "not measured: it is not installed"],
    ]


@pytest.mark.parametrize("device", ["NVIDIA H100 PCIe", "NVIDIA GeForce RTX 3090", "a CPU"])
def test_rate_on_an_unknown_device_is_of_no_peak(device: str) -> None:
    measured = Measurement("a-study", "a case", OURS, TIME, [1.0], {"FLOP": 1e12})
    assert study_rows([measured], device).rows[0][3] == "1.00"


def test_rate_on_a_known_gpu_is_a_part_of_its_peak() -> None:
    measured = Measurement("a-study", "a case", OURS, TIME, [1.0], {"FLOP": 494.7e12})
    assert study_rows([measured], "NVIDIA H100 80GB HBM3").rows[0][3] == "495 (50% of peak)"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1234567, "1,234,567"), (12.345, "12.3"), (0.000123456, "0.000123"), (1e-12, "1.00e-12")],
)
def test_number(value: float, shown: str) -> None:
    assert number(value) == shown
