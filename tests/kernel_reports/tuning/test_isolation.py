"""A configuration that hangs or kills its process does not stop the measurement of the others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from fastformer_kernels.configurations import chosen
from fastformer_kernels.rows import RowConfiguration, row_candidates
from torch import Tensor

from fastformer.kernel_reports.tuning.isolation import measure_apart
from fastformer.kernel_reports.tuning.measurement import Finding, Timer, Unmeasured
from fastformer.kernel_reports.tuning.problem import Problem, Results

pytestmark = pytest.mark.cpu

SHIPPED = RowConfiguration(tile_elements=4096, thread_elements=16)
HANGS, DIES, RAISES, FASTER, REFUSED = row_candidates(SHIPPED)[:5]


def shape() -> tuple[str, ...]:
    return ("any",)


def call(x: Tensor) -> Results:
    configuration = chosen("norm_forward", x, SHIPPED, shape)
    if configuration == HANGS:
        time.sleep(600)
    if configuration == DIES:
        os._exit(3)
    if configuration == RAISES:
        raise RuntimeError("OutOfResources")
    return (x + 1.0,)


def dies(x: Tensor) -> Results:
    os._exit(4)


def ones(device: torch.device) -> list[Tensor]:
    return [torch.ones(3, dtype=torch.bfloat16, device=device)]


def two_problems() -> list[Problem]:
    first = Problem("norm", "norm_forward", "the first", torch.bfloat16, ones, call)
    return [replace(first, case="dies at once", call=dies), first]


def timer_of(device: torch.device) -> Timer:
    def timer(runs: Sequence[Callable[[], object]]) -> float:
        return 1.0 if chosen("norm_forward", torch.zeros(1), SHIPPED, shape) == FASTER else 2.0

    return timer


def test_what_hangs_or_dies_is_passed_over() -> None:
    beforehand: list[dict[RowConfiguration, str]] = [{}, {REFUSED: "needs more shared memory"}]
    broken, found = measure_apart(two_problems, torch.device("cpu"), timer_of, beforehand.__getitem__, longest=2.0)
    assert isinstance(broken, Unmeasured) and broken.reason == "ended its process, exit status 4"
    assert isinstance(found, Finding)
    assert found.failures == {
        HANGS: "hangs",
        DIES: "ended its process, exit status 3",
        RAISES: "RuntimeError: OutOfResources",
        REFUSED: "needs more shared memory",
    }
    assert (found.winner, found.gain, found.key) == (FASTER, 2.0, "norm_forward any")
    assert len(found.seconds) == len(row_candidates(SHIPPED)) + 1 - 4
