"""Tests of the scaling study: its counts are those of its note, and its fits recover what made the data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastformer.benchmarking.data_parallel import data_parallel_steps
from fastformer.benchmarking.measurement import OURS, PEAK_MEMORY, TIME, Measurement, Metric
from fastformer.benchmarking.processes import in_processes
from fastformer.benchmarking.studies.scaling import KINDS, Terms, memory_terms, points, predictions, time_terms
from fastformer.benchmarking.training_steps import Kind, Shape, counted, training_step

CPU = torch.device("cpu")


def by_position(terms: Terms) -> list[float]:
    return list(terms.values())


@pytest.mark.parametrize(("kind", "pairs"), [("BERT-like", 1.0), ("GPT-like", 0.5)])
def test_operations_are_those_of_the_note(kind: Kind, pairs: float) -> None:
    """The operations that two more layers add are those of the note."""
    few = Shape(kind, layers=1, hidden=64, tokens=4096, length=1024, vocabulary=512)
    many = replace(few, layers=3)
    added = [b - a for a, b in zip(by_position(time_terms(few)), by_position(time_terms(many)), strict=True)]
    assert added[1] * 1e12 == pytest.approx(72 * few.tokens * 2 * few.hidden**2)
    assert added[2] * 1e12 == pytest.approx(pairs * 12 * few.tokens * few.length * 2 * few.hidden, rel=1e-3)


def test_memory_has_sixteen_bytes_for_each_parameter_and_what_is_kept() -> None:
    few = Shape("BERT-like", layers=2, hidden=64, tokens=128, length=64, vocabulary=512)
    many = replace(few, layers=3)
    parameters, kept = (getattr(counted(many), of) - getattr(counted(few), of) for of in ("parameters", "saved"))
    added = by_position(memory_terms(many))[1] - by_position(memory_terms(few))[1]
    assert added * 2**20 == pytest.approx(16 * parameters + kept * few.sequences, rel=1e-3)


@pytest.mark.parametrize("quick", [True, False])
def test_held_out_sizes_are_the_largest_measured(quick: bool) -> None:
    for kind in KINDS:
        steps = points(kind, quick)
        for axis in {step.axis for step in steps}:
            roles = [step.role for step in sorted(steps, key=lambda step: step.at) if step.axis == axis]
            fitted = roles.count("fitted")
            assert roles == ["fitted"] * fitted + ["held out"] + ["extrapolated"] * (len(roles) - fitted - 1)
    cases = [step.case for kind in KINDS for step in points(kind, quick)]
    assert len(set(cases)) == len(cases)


def test_predictions_recover_what_made_the_measurements() -> None:
    cost = {TIME: (0.01, 20.0, 40.0, 0.3, 2.0), PEAK_MEMORY: (50.0, 1.1)}
    terms = {TIME: time_terms, PEAK_MEMORY: memory_terms}

    def value(shape: Shape, metric: Metric) -> float:
        return sum(a * b for a, b in zip(cost[metric], by_position(terms[metric](shape)), strict=True))

    steps = [step for kind in KINDS for step in points(kind, quick=False)]
    measured = [
        Measurement("scaling", step.case, OURS, metric, [value(step.shape, metric)], {}, step.curve, step.axis, step.at)
        for step in steps
        for metric in cost
        if step.role == "fitted"
    ]
    predicted = {(each.case, each.metric): each for each in predictions(False, measured)}
    for step in steps:
        for metric in cost:
            found = predicted[step.case, metric]
            assert found.modelled and found.median == pytest.approx(value(step.shape, metric), rel=1e-4)
    coefficients = [
        each.median for (case, _), each in predicted.items() if case.startswith("BERT-like, time of a step")
    ]
    assert coefficients == pytest.approx(cost[TIME], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_step_trains(kind: Kind) -> None:
    step = training_step(Shape(kind, layers=1, hidden=64, tokens=128, length=32, vocabulary=64), CPU)
    losses = [step() for _ in range(8)]
    assert losses[-1] < losses[0]


def fails(device: torch.device) -> None:
    raise RuntimeError(f"nothing to do on {device}")


@pytest.mark.slow
def test_failure_of_a_process_is_raised() -> None:
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="nothing to do on cpu"):
        in_processes(fails, 1, CPU)


@pytest.mark.slow
def test_steps_of_two_processes() -> None:
    shape = Shape("BERT-like", layers=1, hidden=64, tokens=128, length=32, vocabulary=64)
    found = data_parallel_steps(shape, 3, CPU, rounds=2)
    parts = {"share": found.share, "processes": found.processes, "threads": found.threads, "exchange": found.exchange}
    assert {name: list(part) for name, part in parts.items()} == {
        "share": [1, 2],
        "processes": [2],
        "threads": [2],
        "exchange": [2],
    }
    assert all(len(values) == 2 and min(values) > 0 for part in parts.values() for values in part.values())
