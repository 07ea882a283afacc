"""Every operator once, forward and backward, against float64 beside PyTorch; then the tests that need a GPU."""

from __future__ import annotations

import os
import re
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
from fastformer.benchmarking.timing import in_a_line
from fastformer.inspection.numerics import DTYPES, Error, Problem, errors_of, problems

_UNIT = "roundings"
# All others run on any machine, and would have to be collected first.
_FOLDERS = ("tests/gpu", "tests/executed")
# pytest says so of each test, with and without processes.
_OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR)\b.*?\b(tests/\S+)|\b(tests/\S+) (PASSED|FAILED|ERROR)\b")
_REASON = re.compile(r"^(?:FAILED|ERROR) (tests/\S+) - (.+)")


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
    """The largest error of our kernels and of PyTorch, and whether the rule holds."""
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
    outcomes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    last = ""
    folders = [folder for folder in _FOLDERS if (root / folder).is_dir()]
    arguments = [*folders, "-m", "gpu", "--no-header", "-p", "no:cacheprovider", "--tb=short", *selection]
    for line in _lines(arguments, root, setting.left - 3):
        last = line or last
        if found := _OUTCOME.search(line):
            outcome, test, other_test, other_outcome = found.groups()
            outcomes[test or other_test] = outcome or other_outcome
        if found := _REASON.search(line):
            reasons[found[1]] = found[2]
    for outcome in ("PASSED", "FAILED", "ERROR"):
        number = sum(each == outcome for each in outcomes.values())
        yield Record(case, OURS, outcome.lower(), number, "tests", details={"summary": last})
    for test, outcome in outcomes.items():
        if outcome != "PASSED":
            yield Record(test, OURS, "test", None, "", reasons.get(test, outcome.lower()))


def _lines(arguments: list[str], root: Path, seconds: float) -> Iterator[str]:
    """Of what pytest prints within so many seconds; they go to this process's own output too."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout
    end = threading.Timer(max(seconds, 0.0), process.kill)
    end.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            yield line.strip()
    finally:
        end.cancel()
        process.kill()


def _launch(problem: Problem, dtype: str) -> None:
    tensors = [each.to("meta", DTYPES[dtype]).requires_grad_(problem.differentiable) for each in problem.make()]
    output = problem.ours(*tensors)
    if problem.differentiable:
        torch.autograd.grad(output, tensors, torch.empty_like(output))


def _launches() -> Iterator[Launch]:
    return (partial(_launch, problem, dtype) for problem, dtype in _cases(dry=False))


STEP = Step("smoke", "every operator, forward and backward, against float64; then pytest -m gpu", 90, _run, _launches)
