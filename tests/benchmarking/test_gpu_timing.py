"""What is timed, and the ceilings that rates are shares of."""

from __future__ import annotations

import time

import pytest
import torch

from fastformer.benchmarking.gpu.ceilings import copy_ceiling, matrix_ceiling
from fastformer.benchmarking.gpu.timing import timed, timed_parts

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

    def prepare() -> object:
        done["before"] += 1
        time.sleep(0.01)
        return run

    timing = timed_parts([prepare], CPU, seconds=0.01, most=3)  # type: ignore[list-item]
    assert timing.median < 0.005
    assert done["before"] == done["run"] >= 4


def test_ceilings_are_the_work_per_second() -> None:
    matrix, copy = matrix_ceiling(CPU, dry=True), copy_ceiling(CPU, dry=True)
    assert matrix.value * 1e12 * matrix.timing.median == pytest.approx(2 * 64**3)
    assert copy.value * 1e9 * copy.timing.median == pytest.approx(2 * 4096)
    assert (matrix.unit, copy.unit) == ("TFLOP/s", "GB/s")
