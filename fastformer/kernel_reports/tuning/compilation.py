"""Compile the candidates of the next problems in parallel processes, while other problems are measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from fastformer_kernels.configurations import forced
from fastformer_kernels.launch import ARCHITECTURES, architecture_of

from fastformer.kernel_reports.compilation import Specialization, compiler, specializations_of
from fastformer.kernel_reports.tuning.measurement import Failures, class_and_default, others, widened
from fastformer.kernel_reports.tuning.problem import Problem

Launch = Callable[[], object]

# The number of problems, including the current one, whose compilation is requested in advance.
_AHEAD = 12


Prepare = Callable[[int], Failures]
"""Waits until the kernels of the problem with that number are compiled. Returns the configurations that failed."""


@contextlib.contextmanager
def compiled_ahead(problems: Sequence[Problem], architecture: str, processes: int) -> Iterator[Prepare]:
    """Compile the kernels of these problems into Triton's cache, in this order, before they are needed."""
    with compiler(Path(triton.knobs.cache.dir), processes) as submit:
        yield _Ahead(problems, architecture, submit).failures


def launches(problem: Problem, architecture: str) -> dict[Any, Launch]:
    """The problem's call on meta tensors for each configuration, the default first.

    Run the calls under a stand-in for `architecture`.
    """
    tensors: list[torch.Tensor] = []
    defaults: list[Any] = []

    def ask() -> None:
        tensors.extend(problem.tensors(torch.device("meta")))
        defaults.append(class_and_default(problem, tensors)[1])

    # The launches are stopped before anything is compiled.
    specializations_of([ask], architecture)
    configurations = (*defaults, *others(problem, defaults[0], ARCHITECTURES[architecture]))
    return {configuration: partial(_launch, problem, configuration, tensors) for configuration in configurations}


def launch_candidates(problem: Problem) -> None:
    """Make the problem's call on meta tensors with each configuration, the default first. Run it under a stand-in."""
    tensors = problem.tensors(torch.device("meta"))
    _, default = class_and_default(problem, tensors)
    for configuration in others(problem, default, architecture_of(tensors[0])):
        _launch(problem, configuration, tensors)


def launch_exact(problem: Problem) -> None:
    """Make the float32 call that results are compared with, on meta tensors. Run it under a stand-in."""
    problem.call(*widened(problem.tensors(torch.device("meta"))))


def _launch(problem: Problem, configuration: Any, tensors: Sequence[torch.Tensor]) -> None:
    with forced({problem.operation: configuration}):
        problem.call(*tensors)


class _Ahead:
    def __init__(
        self,
        problems: Sequence[Problem],
        architecture: str,
        submit: Callable[[Specialization], Future[str | None]],
    ) -> None:
        self._problems, self._architecture, self._submit = problems, architecture, submit
        self._compiled: dict[Specialization, Future[str | None]] = {}
        self._exact: list[list[Future[str | None]]] = []
        self._asked: list[dict[Any, list[Future[str | None]]]] = []

    def failures(self, number: int) -> Failures:
        """Wait until problem `number` is compiled. Returns the configurations that cannot be launched, with reasons."""
        for problem in self._problems[len(self._asked) : number + _AHEAD]:
            self._ask(problem)
        for future in self._exact[number]:
            future.result()
        reasons = {choice: [future.result() for future in asked] for choice, asked in self._asked[number].items()}
        return {choice: reason for choice, found in reasons.items() for reason in found if reason}

    def _ask(self, problem: Problem) -> None:
        self._exact.append(self._compile(partial(launch_exact, problem)))
        try:
            choices = launches(problem, self._architecture)
        except Exception:
            # Even the shipped configuration is refused: its measurement will report the reason.
            choices = {}
        self._asked.append({choice: self._compile(launch) for choice, launch in choices.items()})

    def _compile(self, launch: Launch) -> list[Future[str | None]]:
        try:
            specializations = specializations_of([launch], self._architecture)
        except Exception as error:
            refused: Future[str | None] = Future()
            refused.set_result(f"{type(error).__name__}: {error}")
            return [refused]
        for specialization in specializations:
            if specialization not in self._compiled:
                self._compiled[specialization] = self._submit(specialization)
        return [self._compiled[specialization] for specialization in specializations]
