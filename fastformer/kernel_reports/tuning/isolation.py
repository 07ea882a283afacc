"""Measure in a separate process. A configuration that hangs or kills it is skipped; all other findings are kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from fastformer_kernels.configurations import use_measured
from fastformer_kernels.launch import architecture_of

from fastformer.console import in_a_line
from fastformer.kernel_reports.tuning.compilation import Prepare
from fastformer.kernel_reports.tuning.measurement import Failures, Finding, Timer, Unmeasured, finding_of, winners
from fastformer.kernel_reports.tuning.problem import Problem

MakeProblems = Callable[[], list[Problem]]
MakeTimer = Callable[[torch.device], Timer]
"""`MakeProblems` and `MakeTimer` are pickled: use functions of a module, or `partial` of them."""

# Seconds until a configuration counts as hanging. The second number is for the default configuration: its time includes
# the start of the process and the computation of the exact results.
_LONGEST, _LONGEST_DEFAULT = 30.0, 150.0
_PATIENCE = 10.0


def measure_apart(
    make_problems: MakeProblems,
    device: torch.device,
    make_timer: MakeTimer,
    prepare: Prepare,
    longest: float = _LONGEST,
) -> Iterator[Finding | Unmeasured]:
    """Do the work of `measure` in another process, which is replaced when it hangs or dies.

    Args:
        make_problems: returns the problems to measure.
        device: the device to measure on.
        make_timer: returns the timer.
        prepare: called before each problem, with its number.
        longest: seconds until a configuration counts as hanging.
    """
    found: dict[str, dict[str, int]] = {}
    measurer = _Measurer(make_problems, device, make_timer, longest)
    with contextlib.closing(measurer):
        for number, problem in enumerate(make_problems()):
            finding = measurer.measure(number, problem, dict(prepare(number)), found)
            found = {**found, **winners([finding])}
            yield finding


class _Measurer:
    def __init__(
        self, make_problems: MakeProblems, device: torch.device, make_timer: MakeTimer, longest: float
    ) -> None:
        self._arguments, self._longest = (make_problems, device, make_timer), longest
        self._start()

    def _start(self) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        # With this end closed here, the process's death is seen as the end of the connection.
        theirs.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        # A process that waits for a broken GPU may never end. It is replaced anyway.
        self._process.join(_PATIENCE)
        self._connection.close()

    def measure(
        self, number: int, problem: Problem, failures: dict[Any, str], found: dict[str, dict[str, int]]
    ) -> Finding | Unmeasured:
        """Measure problem `number`, with a new process after each that hangs or dies, until one succeeds."""
        while True:
            trying, outcome = self._try(number, failures, found)
            if isinstance(outcome, tuple):
                return Finding(problem, *outcome)
            self.close()
            self._start()
            if trying is None:
                return Unmeasured(problem, outcome)
            failures[trying] = outcome

    def _try(
        self, number: int, failures: Failures, found: dict[str, dict[str, int]]
    ) -> tuple[Any, tuple[Any, ...] | str]:
        """Measure once. Returns the configuration tried last, and the finding or the reason why there is none."""
        trying: Any = None
        try:
            self._connection.send((number, failures, found))
            while self._connection.poll(_LONGEST_DEFAULT if trying is None else self._longest):
                what, content = self._connection.recv()
                if what != "trying":
                    return trying, content
                trying = content
        except (EOFError, OSError):
            self._process.join(_PATIENCE)
            return trying, f"ended its process, exit status {self._process.exitcode}"
        return trying, "hangs"


def _serve(connection: Connection, make_problems: MakeProblems, device: torch.device, make_timer: MakeTimer) -> None:
    problems, timer = make_problems(), make_timer(device)
    architecture = architecture_of(torch.empty(0, device=device)).name
    while True:
        number, failures, found = connection.recv()
        use_measured(architecture, found)
        try:
            finding = finding_of(
                problems[number], device, timer, failures, trying=lambda choice: connection.send(("trying", choice))
            )
        except Exception as error:
            connection.send(("failed", in_a_line(error)))
            continue
        connection.send(("found", (finding.key, finding.default, finding.seconds, finding.failures)))
