"""Which launch configuration of a call is the fastest of those that compute the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from fastformer_kernels.configurations import forced, shipped_defaults, use_measured
from fastformer_kernels.launch import Architecture, architecture_of
from torch import Tensor

from fastformer.gpu_timing import timed
from fastformer.tuning.candidates import candidates
from fastformer.tuning.problem import Problem, Results, Tensors

# Seconds of measuring a configuration.
_SECONDS = 0.03

Timer = Callable[[Sequence[Callable[[], object]]], float]
"""Seconds of a call, which is given for several sets of buffers."""
Failures = Mapping[Any, str]
"""Why configurations cannot be launched."""

# A candidate that is not faster by more may owe it to chance.
LEAST_GAIN = 0.02
# By element size: float32 results are the exact ones for 16-bit types. In float32 itself nothing is more exact than the
# shipped configuration, from which sums in another order differ by some roundings.
_ROUNDINGS = {2: 1, 4: 64}
# Sets of buffers together are larger than any cache.
_BUFFER_BYTES = 256 << 20
_MOST_BUFFERS = 4


@dataclass(frozen=True)
class Finding:
    """What was found of a problem.

    Attributes:
        problem: the call.
        key: of the class of shapes it stands for.
        default: the shipped configuration.
        seconds: that each configuration takes, the default's first.
        failures: why other configurations have no time: what the compiler said, or a result that is too far off.
    """

    problem: Problem
    key: str
    default: Any
    seconds: dict[Any, float]
    failures: dict[Any, str]

    @property
    def winner(self) -> Any:
        """The fastest configuration; the default where none is faster by `LEAST_GAIN`."""
        best = min(self.seconds, key=self.seconds.__getitem__)
        return best if self.seconds[best] < (1 - LEAST_GAIN) * self.seconds[self.default] else self.default

    @property
    def gain(self) -> float:
        """How many times as fast as the default the winner is."""
        return self.seconds[self.default] / self.seconds[self.winner]


@dataclass(frozen=True)
class Unmeasured:
    """A problem whose shipped configuration could not be measured, and why."""

    problem: Problem
    reason: str


def measure(
    problems: Iterable[Problem], device: torch.device, timer: Timer, most: int | None = None
) -> Iterator[Finding]:
    """The findings of each problem, one by one.

    What was found earlier is launched by the problems that follow. While this goes on nothing else that was measured
    is used.

    Args:
        problems: what to measure.
        device: where.
        timer: seconds of a call; on a GPU of the work it launches.
        most: configurations beside the default, at most; None for all.
    """
    found: dict[str, dict[str, int]] = {}
    for problem in problems:
        use_measured(architecture_of(torch.empty(0, device=device)).name, found)
        finding = finding_of(problem, device, timer, {}, most)
        found = {**found, **winners([finding])}
        yield finding


def winners(findings: Iterable[Finding | Unmeasured]) -> dict[str, dict[str, int]]:
    """What is stored: the fields of the fastest configurations by class of shapes."""
    return {finding.key: asdict(finding.winner) for finding in findings if isinstance(finding, Finding)}


def others(problem: Problem, default: Any, architecture: Architecture) -> list[Any]:
    """The configurations that are measured beside the default."""
    return candidates(problem.operation, default, architecture, problem.head_dim, problem.dtype.itemsize)


def class_and_default(problem: Problem, tensors: Tensors) -> tuple[str, Any]:
    """The key of the class that the call belongs to, and its shipped configuration, found by making the call."""
    with shipped_defaults() as asked:
        problem.call(*tensors)
    return next((key, default) for key, default in asked.items() if key.split()[0] == problem.operation)


def finding_of(
    problem: Problem,
    device: torch.device,
    timer: Timer,
    known: Failures,
    most: int | None = None,
    trying: Callable[[Any], None] = lambda configuration: None,
) -> Finding:
    """The finding of one problem.

    Args:
        problem, device, timer, most: as of `measure`.
        known: failures that are known beforehand.
        trying: told of each configuration before it is launched; of the default as None.
    """
    trying(None)
    failures = dict(known)
    torch.manual_seed(0)
    given = problem.tensors(device)
    key, default = class_and_default(problem, _copies(given))
    size = sum(tensor.nbytes for tensor in given)
    buffers = [_copies(given) for _ in range(min(_MOST_BUFFERS, math.ceil(_BUFFER_BYTES / max(size, 1))))]
    exact = results_of(problem, widened(_copies(given)))
    with forced({problem.operation: default}):
        shipped = results_of(problem, _copies(given))
        seconds = {default: _seconds(problem, buffers, timer)}
    for configuration in others(problem, default, architecture_of(given[0]))[:most]:
        if configuration in failures:
            continue
        trying(configuration)
        try:
            with forced({problem.operation: configuration}):
                results = results_of(problem, _copies(given))
                if far := too_far(results, shipped, exact, _ROUNDINGS[problem.dtype.itemsize]):
                    failures[configuration] = far
                else:
                    seconds[configuration] = _seconds(problem, buffers, timer)
        except Exception as error:
            failures[configuration] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            # After an illegal access nothing works on the GPU any more: that is no fault of the next configuration.
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return Finding(problem, key, default, seconds, failures)


def _seconds(problem: Problem, buffers: Sequence[Tensors], timer: Timer) -> float:
    return timer([partial(problem.call, *tensors) for tensors in buffers])


def widened(tensors: Tensors) -> Tensors:
    """The arguments in float32, from which results come that are exact beside those of 16-bit types."""
    return [tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors]


def too_far(
    results: Sequence[Tensor], shipped: Sequence[Tensor], exact: Sequence[Tensor], roundings: int
) -> str | None:
    """What is wrong with results: an error of more than twice that of the shipped configuration and some roundings."""
    for number, (result, default, reference) in enumerate(zip(results, shipped, exact, strict=True)):
        unit = torch.finfo(result.dtype).eps * reference.abs().max().item()
        allowed = 2 * (default.float() - reference).abs().max().item() + roundings * unit
        error = (result.float() - reference).abs().max().item()
        if not error <= allowed:
            return f"result {number} is off by {error:.3g}, allowed is {allowed:.3g}"
    return None


def results_of(problem: Problem, tensors: Tensors) -> list[Tensor]:
    """What is compared."""
    results: Results = problem.call(*tensors)
    return [result for result in results if result is not None and result.is_floating_point() and result.numel()]


def _copies(tensors: Tensors) -> Tensors:
    """Copies with the same strides."""
    return [tensor.clone() for tensor in tensors]


def event_timer(device: torch.device) -> Timer:
    """Times runs on a GPU by its events, for a short while each."""
    return lambda runs: timed(runs, device, _SECONDS).median
