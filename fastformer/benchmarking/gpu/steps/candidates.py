"""Launch configurations of each kernel beside the shipped one: the fastest, and tables of them ready to be used."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from fastformer_kernels.launch import architecture_of

from fastformer.benchmarking.gpu.step import Record, Setting, Step
from fastformer.benchmarking.gpu.timing import timed
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.timing import seconds_of
from fastformer.tuning.compilation import compiled_ahead
from fastformer.tuning.measurement import Finding, Prepare, Timer, measure
from fastformer.tuning.problem import FULL, GROUPS, TINY, Problem
from fastformer.tuning.problems import problems
from fastformer.tuning.tune import store_plans, winners

SHIPPED = "shipped configuration"
# Of measuring a configuration, and what has to be left for another problem.
_SECONDS = 0.03
_RESERVE = 10.0
# In a dry run, beside the default.
_MOST_DRY = 1


def run(setting: Setting) -> Iterator[Record]:
    """The fastest configuration of every problem, in the order of their worth, and the shipped one."""
    to_solve = _problems(setting.dry)
    architecture = architecture_of(torch.empty(0, device=setting.device)).name
    found: list[Finding] = []
    with _compiling(to_solve, architecture, setting) as prepare:
        most = _MOST_DRY if setting.dry else None
        for finding in measure(to_solve, setting.device, _timer(setting), prepare, most):
            yield from _records(finding)
            found.append(finding)
            _write_tables(found, architecture, setting.out)
            if setting.left < _RESERVE:
                break


def _problems(dry: bool) -> list[Problem]:
    if not dry:
        return problems([torch.bfloat16], GROUPS, FULL)
    by_operation: dict[str, Problem] = {}
    for problem in problems([torch.bfloat16], GROUPS, TINY):
        by_operation.setdefault(problem.operation, problem)
    return list(by_operation.values())


def _compiling(
    to_solve: Sequence[Problem], architecture: str, setting: Setting
) -> contextlib.AbstractContextManager[Prepare]:
    if setting.dry:
        return contextlib.nullcontext(lambda problem: {})
    return compiled_ahead(to_solve, architecture, os.cpu_count() or 1)


def _timer(setting: Setting) -> Timer:
    if setting.dry:
        return lambda runs: seconds_of(runs[0], 1, setting.device)
    return lambda runs: timed(runs, setting.device, _SECONDS).median


def _records(finding: Finding) -> Iterator[Record]:
    """The times of the fastest configuration and of the shipped one."""
    details = {
        "class": finding.key,
        "winner": repr(finding.winner),
        "us": {repr(configuration): round(1e6 * each, 2) for configuration, each in finding.seconds.items()},
        "not launched": {repr(configuration): reason for configuration, reason in finding.failures.items()},
    }
    case, seconds = finding.problem.case, finding.seconds
    yield Record(case, OURS, "time", 1e6 * seconds[finding.winner], "us", details=details)
    yield Record(case, SHIPPED, "time", 1e6 * seconds[finding.default], "us")


def _write_tables(found: Sequence[Finding], architecture: str, out: Path) -> None:
    """A plans.json for FASTFORMER_CACHE, and the winners as the launch data is written."""
    store_plans(out / "plans.json", architecture, winners(found))
    lines = [f"# {architecture}, triton {triton.__version__}: what beats the shipped configurations"]
    for finding in found:
        if finding.winner != finding.default:
            lines += [
                f"# {finding.key}",
                f"# {finding.gain:.3f} times as fast as {as_source(finding.default)} at {finding.problem.case}",
                f"{as_source(finding.winner)},",
            ]
    (out / "launch_table.py").write_text("\n".join(lines) + "\n")


def as_source(configuration: Any) -> str:
    """A configuration as it is written in the launch data: fields with a default only where they differ from it."""
    arguments = []
    for field in fields(configuration):
        value = getattr(configuration, field.name)
        if field.default is MISSING:
            arguments.append(repr(value))
        elif value != field.default:
            arguments.append(f"{field.name}={value!r}")
    return f"{type(configuration).__name__}({', '.join(arguments)})"


def launches() -> Iterator[Callable[[], object]]:
    """Of the shipped configurations."""
    return (partial(_launch, problem) for problem in _problems(dry=False))


def _launch(problem: Problem) -> None:
    problem.call(*problem.tensors(torch.device("meta")))


STEP = Step(
    name="candidates",
    title="a dozen launch configurations of each kernel beside the shipped one: the fastest",
    seconds=110,
    run=run,
    launches=launches,
)
