"""Tests of what is timed, and of the ceilings with which rates are compared."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch

from fastformer.benchmarking.gpu.ceilings import copy_ceiling, matrix_ceiling
from fastformer.gpu_timing import Prepare, Run, timed, timed_parts

CPU = torch.device("cpu")


def test_buffers_take_turns() -> None:
    order: list[int] = []
    timing = timed([lambda: order.append(0), lambda: order.append(1)], CPU, seconds=1.0, most=6)
    assert timing.repeats == 6
    assert timing.low <= timing.median <= timing.high
    assert order[-6:] == [0, 1, 0, 1, 0, 1]


def test_what_is_done_before_a_run_is_not_in_its_time() -> None:
    done = {"before": 0, "run": 0}

    def run() -> None:
        done["run"] += 1

    def prepare() -> Run:
        done["before"] += 1
        time.sleep(0.01)
        return run

    timing = timed_parts([prepare], CPU, seconds=0.01, most=3)
    assert timing.median < 0.005
    assert done["before"] == done["run"] >= 4


def test_what_is_before_the_runs_is_done_for_all_buffers_before_any_of_them() -> None:
    did: list[str] = []

    def prepared(name: str) -> Prepare:
        def prepare() -> Run:
            did.append(f"before {name}")
            return lambda: did.append(name)

        return prepare

    assert timed_parts([prepared("a"), prepared("b")], CPU, seconds=1.0, most=3).repeats == 3
    assert did[-6:] == ["before a", "before b", "a", "b", "before a", "a"]


def test_a_gpu_waits_until_all_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the GPU's clock shows that what comes before a run lies outside the two events."""
    did: list[str] = []
    asked: list[float] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            did.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 4.0  # milliseconds

    def prepare() -> Run:
        did.append("before")
        time.sleep(0.002)
        return lambda: did.append("run")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: (did.append("sleep"), asked.append(cycles / 2e9)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: did.append("wait"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    timing = timed_parts([prepare], torch.device("cuda"), seconds=0.02, most=200)
    assert (timing.median, timing.repeats) == (0.004, 5)
    one = ["before", "event", "run", "event"]
    assert did == ["before", "run", "sleep", *3 * one, "wait", "sleep", *5 * one, "wait"]
    # The GPU sleeps longer than the host takes to ask for all runs.
    assert asked[1] > 5 * 0.002


def test_ceilings_are_the_work_per_second() -> None:
    matrix, copy = matrix_ceiling(CPU, dry=True), copy_ceiling(CPU, dry=True)
    assert matrix.value * 1e12 * matrix.timing.median == pytest.approx(2 * 64**3)
    assert copy.value * 1e9 * copy.timing.median == pytest.approx(2 * 4096)
    assert (matrix.unit, copy.unit) == ("TFLOP/s", "GB/s")
