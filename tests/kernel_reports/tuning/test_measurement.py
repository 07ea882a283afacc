"""The fastest configuration is found, here without a GPU, with a timer that returns given times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from fastformer_kernels.attention.launch import AttentionConfiguration
from fastformer_kernels.configurations import chosen, forget_plans_read
from fastformer_kernels.plans import FeedForwardPlan
from fastformer_kernels.rows import RowConfiguration
from torch import Tensor

from fastformer.benchmarking.gpu.steps.candidates import as_source
from fastformer.kernel_reports.tuning import measurement
from fastformer.kernel_reports.tuning.measurement import Finding, Unmeasured, finding_of, measure, winners
from fastformer.kernel_reports.tuning.problem import FULL, GROUPS, TINY, Problem, Results
from fastformer.kernel_reports.tuning.problems import problems
from fastformer.kernel_reports.tuning.results import summary

CPU = torch.device("cpu")
SHIPPED, FASTER, SLOWER, WRONG, BROKEN = (RowConfiguration(size, 8) for size in (1, 2, 3, 4, 5))
SECONDS = {SHIPPED: 3.0, FASTER: 2.0, SLOWER: 4.0, WRONG: 1.0}


@pytest.fixture(autouse=True)
def nothing_measured() -> Iterator[None]:
    yield
    forget_plans_read()


def shape() -> tuple[str, ...]:
    return ("any",)


def double(x: Tensor) -> Results:
    configuration = chosen("test", x, SHIPPED, shape)
    if configuration == BROKEN:
        raise RuntimeError("PassManager::run failed")
    # In place, as some operators work: each call must get its own argument.
    return (x.mul_(2.0 if configuration != WRONG else 2.1),)


PROBLEM = Problem(
    "norm", "test", "a test", torch.bfloat16, lambda device: [torch.ones(3, dtype=torch.bfloat16)], double
)


def timer(runs: Sequence[Callable[[], object]]) -> float:
    for run in runs:
        run()
    return SECONDS[chosen("test", torch.zeros(1), SHIPPED, shape)]


def found(monkeypatch: pytest.MonkeyPatch, *candidates: RowConfiguration) -> Finding:
    monkeypatch.setattr(measurement, "others", lambda problem, default, architecture: list(candidates))
    return next(measure([PROBLEM], CPU, timer))


@pytest.mark.cpu
def test_the_fastest_that_computes_the_same_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = found(monkeypatch, WRONG, SLOWER, BROKEN, FASTER)
    assert (finding.key, finding.default, finding.winner, finding.gain) == ("test any", SHIPPED, FASTER, 1.5)
    assert finding.seconds == {SHIPPED: 3.0, SLOWER: 4.0, FASTER: 2.0}
    assert finding.failures[BROKEN] == "RuntimeError: PassManager::run failed"
    assert finding.failures[WRONG].startswith("result 0 is off by 0.09")
    assert winners([finding]) == {"test any": {**vars(FASTER)}}
    shown = str(summary([finding, Unmeasured(PROBLEM, "hangs")]))
    assert "1 of 1" in shown and "1.50x" in shown and "a test could not be measured: hangs" in " ".join(shown.split())


@pytest.mark.cpu
def test_the_default_stays_where_nothing_is_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECONDS, FASTER, 2.97)
    finding = found(monkeypatch, SLOWER, FASTER)
    assert (finding.winner, finding.gain) == (SHIPPED, 1.0)


@pytest.mark.cpu
def test_what_was_found_is_launched_by_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def follows(x: Tensor) -> Results:
        launched.append(chosen("test", x, SHIPPED, shape))
        chosen("later", x, SHIPPED, shape)
        return (x,)

    monkeypatch.setattr(measurement, "others", lambda problem, default, architecture: [FASTER])
    later = replace(PROBLEM, operation="later", call=follows)
    list(measure([PROBLEM, later], CPU, lambda runs: timer(runs) if runs[0].func is double else 1.0))
    # Once with shipped defaults, to learn the class of the call.
    assert launched[:1] == [SHIPPED] and set(launched[1:]) == {FASTER}


@pytest.mark.cpu
def test_configurations_that_failed_beforehand_are_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "others", lambda problem, default, architecture: [FASTER])
    finding = finding_of(PROBLEM, CPU, timer, {FASTER: "too much shared memory"})
    assert (finding.seconds, finding.failures) == ({SHIPPED: 3.0}, {FASTER: "too much shared memory"})


# One problem of each operation, and attention's forward of every kind.
TINY_PROBLEMS = {
    problem.case if problem.operation == "attention_forward" else problem.operation: problem
    for problem in reversed(problems([torch.bfloat16], GROUPS, TINY))
}


@pytest.mark.parametrize("name", TINY_PROBLEMS)
def test_every_candidate_computes_the_same(name: str, device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("hundreds of kernels would be compiled; `fastformer tune` compares the results there")
    finding = next(measure([TINY_PROBLEMS[name]], device, lambda runs: 1.0))
    assert len(finding.seconds) > 1
    assert finding.failures == {}


def test_problems_are_of_different_calls_and_the_most_valuable_is_first() -> None:
    measured = problems([torch.bfloat16], GROUPS, FULL)
    assert measured[0].case == "attention_forward causal head_dim 128, 8192 keys"
    assert len({(problem.operation, problem.case) for problem in measured}) == len(measured)
    assert {problem.group for problem in measured} == set(GROUPS)
    assert {problem.group for problem in problems([torch.bfloat16], ["norm"], FULL)} == {"norm"}


def test_a_configuration_as_source() -> None:
    configuration = AttentionConfiguration(128, 64, 4, 2, descriptors=True, warp_specialize=True)
    assert as_source(configuration) == "AttentionConfiguration(128, 64, 4, 2, descriptors=True, warp_specialize=True)"
    assert as_source(FeedForwardPlan(False)) == "FeedForwardPlan(False)"
