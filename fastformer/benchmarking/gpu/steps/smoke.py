"""Errors of every operator, forward and backward, against float64, compared with PyTorch; then the tests for GPUs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import fastformer
from fastformer.benchmarking.gpu.findings import ERROR
from fastformer.benchmarking.gpu.step import Launch, Record, Setting, Step
from fastformer.benchmarking.measurement import OURS
from fastformer.console import in_a_line
from fastformer.diagnostics.numerics import DTYPES, Error, Problem, errors_of, problems
from fastformer.registry import OPERATORS, Make

_UNIT = "roundings"
# The folders with tests for GPUs. Other tests run on any machine, and collecting them would take time.
_FOLDERS = ("tests/gpu", "tests/executed")
# pytest's line for a test, with and without several processes. The test's name may have spaces.
_OUTCOME = re.compile(r"^\[gw\d+\] \[ *\d+%\] (PASSED|FAILED|ERROR) (tests/.+)$|^(tests/.+?) (PASSED|FAILED|ERROR)\b")
_REASON = re.compile(r"^(?:FAILED|ERROR) (tests/.+?) - (.+)")
_COLLECTED = re.compile(r"\[(\d+) items\]|(\d+)(?:/\d+)? tests collected")
# Seconds that pytest has to report why tests failed, once it is told to stop.
_TO_REPORT = 15.0


def _run(setting: Setting) -> Iterator[Record]:
    for problem, dtype in _cases(setting.dry):
        yield from _compared(problem, dtype, setting)
    yield from _tests(setting)


def _cases(dry: bool) -> Iterator[tuple[Problem, str]]:
    seen = set()
    for problem in problems():
        if not dry or problem.operator not in seen:
            yield from ((problem, dtype) for dtype in (["float32"] if dry else ["bfloat16", "float16", "float32"]))
        seen.add(problem.operator)


def _compared(problem: Problem, dtype: str, setting: Setting) -> Iterator[Record]:
    """Yield the largest errors of our kernels and of PyTorch, and a record if the rule of errors is broken."""
    case = f"{problem.operator}, {problem.regime}, {dtype}"
    try:
        errors = list(errors_of(problem, dtype, setting.device.type, seed=0))
    except Exception as error:
        yield Record(case, OURS, ERROR, None, _UNIT, in_a_line(error))
        return
    for peer, implementation in ((OURS, "triton"), ("PyTorch", "pytorch")):
        yield _largest(case, peer, [error for error in errors if error.implementation == implementation])
    broken = [error for error in errors if error.kept is False]
    if broken:
        reason = ", ".join(f"{error.result} of {error.implementation} {error.units}" for error in broken)
        yield Record(case, OURS, "rule of errors", None, _UNIT, f"broken: {reason}")


def _largest(case: str, peer: str, errors: list[Error]) -> Record:
    units = [error.units for error in errors]
    if not units:
        return Record(case, peer, ERROR, None, _UNIT, "did not run")
    if None in units:
        return Record(case, peer, ERROR, None, _UNIT, "not finite")
    return Record(case, peer, ERROR, max(unit for unit in units if unit is not None), _UNIT)


def _tests(setting: Setting) -> Iterator[Record]:
    root = Path(fastformer.__file__).parents[1]
    case = "pytest -m gpu"
    if not (root / "tests").is_dir():
        yield Record(case, OURS, "tests", None, "tests", f"there is no folder tests in {root}")
        return
    selection = ["--collect-only", "-q"] if setting.dry else ["-n", "8", "-v"]
    numbers = {"PASSED": 0, "FAILED": 0, "ERROR": 0}
    collected, last = None, ""
    folders = [folder for folder in _FOLDERS if (root / folder).is_dir()]
    arguments = [*folders, "-m", "gpu", "--no-header", "-p", "no:cacheprovider", "--tb=short", *selection]
    for line in _lines(arguments, root, setting.left - 3):
        last = line or last
        if found := _COLLECTED.search(line):
            collected = int(found[1] or found[2])
        if found := _REASON.search(line):
            yield Record(found[1], OURS, "reason", None, "", found[2])
        elif (named := outcome_of(line)) is not None:
            test, outcome = named
            numbers[outcome] += 1
            if outcome != "PASSED":
                yield Record(test, OURS, "test", None, "", outcome.lower())
    details = {"of": collected, "summary": last}
    for outcome, number in numbers.items():
        yield Record(case, OURS, outcome.lower(), number, "tests", details=details)


def outcome_of(line: str) -> tuple[str, str] | None:
    """The test and its outcome, from a line of pytest's output; None if the line is not about a test."""
    found = _OUTCOME.search(line)
    if found is None:
        return None
    outcome, test, other_test, other_outcome = found.groups()
    return (test, outcome) if test else (other_test, other_outcome)


def _lines(arguments: list[str], root: Path, seconds: float) -> Iterator[str]:
    """Yield and print the lines that pytest prints within `seconds` seconds.

    pytest is told to stop some seconds before, so that it can report why tests failed.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,  # without stderr: its processes would keep the pipe open after its end
        text=True,
    )
    assert process.stdout
    ends = [
        threading.Timer(max(seconds - _TO_REPORT, 0.0), process.send_signal, (signal.SIGINT,)),
        threading.Timer(max(seconds, 0.0), process.kill),
    ]
    for end in ends:
        end.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            yield line.strip()
    finally:
        for end in ends:
            end.cancel()
        process.kill()


def _launch(problem: Problem, dtype: str) -> None:
    operator = OPERATORS[problem.operator]
    call = operator.inputs(Make(DTYPES[dtype], torch.device("meta")), **problem.inputs)
    leaves = operator.leaves(call.tensors)
    output = operator.output(operator.ours, call._replace(tensors=leaves))
    if output.requires_grad:
        wanted = [each for each in leaves.values() if each.requires_grad]
        torch.autograd.grad(output, wanted, torch.empty_like(output))


def _launches() -> Iterator[Launch]:
    return (partial(_launch, problem, dtype) for problem, dtype in _cases(dry=False))


STEP = Step("smoke", "every operator, forward and backward, against float64; then pytest -m gpu", 90, _run, _launches)
