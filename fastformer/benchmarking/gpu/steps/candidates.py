"""Launch configurations of each kernel compared with the shipped one: the fastest, and tables ready for use."""

from __future__ import annotations

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
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.timing import seconds_of
from fastformer.kernel_reports.tuning.compilation import compiled_ahead, launch_candidates, launch_exact
from fastformer.kernel_reports.tuning.isolation import measure_apart
from fastformer.kernel_reports.tuning.measurement import Finding, Unmeasured, event_timer, measure, winners
from fastformer.kernel_reports.tuning.problem import GROUPS, TINY, Problem
from fastformer.kernel_reports.tuning.problems import problems
from fastformer.kernel_reports.tuning.results import store_plans

SHIPPED = "shipped configuration"
# The number of problems whose candidates are compiled ahead of time: attention with the most keys. The candidates of
# all problems would make the cache too large.
_BEFOREHAND = 8
# Another problem is begun only if at least this number of seconds is left.
_RESERVE = 10.0


def run(setting: Setting) -> Iterator[Record]:
    """Yield the times of the fastest and of the shipped configuration of each problem, in order of importance."""
    architecture = architecture_of(torch.empty(0, device=setting.device)).name
    found: list[Finding | Unmeasured] = []
    for finding in _dry_findings(setting) if setting.dry else _findings(setting, architecture):
        yield from _records(finding)
        found.append(finding)
        _write_tables(found, architecture, setting.out)
        if setting.left < _RESERVE:
            return


def _findings(setting: Setting, architecture: str) -> Iterator[Finding | Unmeasured]:
    with compiled_ahead(_problems(), architecture, os.cpu_count() or 1) as prepare:
        yield from measure_apart(_problems, setting.device, event_timer, prepare)


def _problems() -> list[Problem]:
    return problems([torch.bfloat16], GROUPS)


def _dry_findings(setting: Setting) -> Iterator[Finding]:
    """Measure one problem of each operation, with one configuration in addition to the shipped one."""
    by_operation: dict[str, Problem] = {}
    for problem in problems([torch.bfloat16], GROUPS, TINY):
        by_operation.setdefault(problem.operation, problem)
    yield from measure(
        by_operation.values(), setting.device, lambda runs: seconds_of(runs[0], 1, setting.device), most=1
    )


def _records(finding: Finding | Unmeasured) -> Iterator[Record]:
    """Yield the times of the fastest configuration and of the shipped one."""
    if isinstance(finding, Unmeasured):
        yield Record(finding.problem.case, OURS, "time", None, "us", missing=finding.reason)
        return
    details = {
        "class": finding.key,
        "winner": repr(finding.winner),
        "us": {repr(configuration): round(1e6 * each, 2) for configuration, each in finding.seconds.items()},
        "not launched": {repr(configuration): reason for configuration, reason in finding.failures.items()},
    }
    case, seconds = finding.problem.case, finding.seconds
    yield Record(case, OURS, "time", 1e6 * seconds[finding.winner], "us", details=details)
    yield Record(case, SHIPPED, "time", 1e6 * seconds[finding.default], "us")


def _write_tables(found: Sequence[Finding | Unmeasured], architecture: str, out: Path) -> None:
    """Write a plans.json for FASTFORMER_CACHE, and the winners in the format of the launch data."""
    store_plans(out / "plans.json", architecture, winners(found))
    lines = [f"# {architecture}, triton {triton.__version__}: configurations that are faster than the shipped ones"]
    for finding in found:
        if isinstance(finding, Finding) and finding.winner != finding.default:
            lines += [
                f"# {finding.key}",
                f"# {finding.gain:.3f} times as fast as {as_source(finding.default)} at {finding.problem.case}",
                f"{as_source(finding.winner)},",
            ]
    (out / "launch_table.py").write_text("\n".join(lines) + "\n")


def as_source(configuration: Any) -> str:
    """A configuration in the format of the launch data: fields that are equal to their default are left out."""
    arguments = []
    for field in fields(configuration):
        value = getattr(configuration, field.name)
        if field.default is MISSING:
            arguments.append(repr(value))
        elif value != field.default:
            arguments.append(f"{field.name}={value!r}")
    return f"{type(configuration).__name__}({', '.join(arguments)})"


def launches() -> Iterator[Callable[[], object]]:
    """Yield the launches of the first problems. While these are measured, this step's processes compile the others."""
    for problem in _problems()[:_BEFOREHAND]:
        yield partial(launch_candidates, problem)
        yield partial(launch_exact, problem)


STEP = Step(
    name="candidates",
    title="a dozen launch configurations of each kernel, compared with the shipped one",
    seconds=102,
    run=run,
    launches=launches,
)
