"""Compiling the candidates of problems by parallel processes, while others are measured."""

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
from fastformer.tuning.measurement import Failures, class_and_default, others, widened
from fastformer.tuning.problem import Problem

Launch = Callable[[], object]

# Problems whose compilation is asked for before their turn.
_AHEAD = 12


Prepare = Callable[[int], Failures]
"""Waits until the kernels of the problem of that number are compiled; returns which configurations cannot be."""


@contextlib.contextmanager
def compiled_ahead(problems: Sequence[Problem], architecture: str, processes: int) -> Iterator[Prepare]:
    """Compiles these problems' kernels into Triton's cache, in this order, ahead of those that are asked for."""
    with compiler(Path(triton.knobs.cache.dir), processes) as submit:
        yield _Ahead(problems, architecture, submit).failures


def launches(problem: Problem, architecture: str) -> dict[Any, Launch]:
    """The call on meta tensors, by configuration, the default first; to be run under a stand-in for `architecture`."""
    tensors: list[torch.Tensor] = []
    defaults: list[Any] = []

    def ask() -> None:
        tensors.extend(problem.tensors(torch.device("meta")))
        defaults.append(class_and_default(problem, tensors)[1])

    # Its launches are stopped before they compile anything.
    specializations_of([ask], architecture)
    configurations = (*defaults, *others(problem, defaults[0], ARCHITECTURES[architecture]))
    return {configuration: partial(_launch, problem, configuration, tensors) for configuration in configurations}


def launch_candidates(problem: Problem) -> None:
    """The call on meta tensors with each configuration, the default first; to be run under a stand-in."""
    tensors = problem.tensors(torch.device("meta"))
    _, default = class_and_default(problem, tensors)
    for configuration in others(problem, default, architecture_of(tensors[0])):
        _launch(problem, configuration, tensors)


def launch_exact(problem: Problem) -> None:
    """The call on meta tensors in float32, with which results are compared; to be run under a stand-in."""
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
        """Why configurations of problem `number` cannot be launched; waits until all are compiled."""
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
            # Even the shipped configuration is refused: who measures it will find the reason.
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
