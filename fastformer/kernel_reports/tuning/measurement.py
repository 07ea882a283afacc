"""Find the fastest launch configuration of a call among those with correct results."""

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
from fastformer.kernel_reports.tuning.candidates import candidates
from fastformer.kernel_reports.tuning.problem import Problem, Results, Tensors

# Seconds of measuring a configuration.
_SECONDS = 0.03

Timer = Callable[[Sequence[Callable[[], object]]], float]
"""Returns the seconds of a call. The call is given once for each of several sets of buffers."""
Failures = Mapping[Any, str]
"""The configurations that cannot be launched, with reasons."""

# A smaller gain may be chance.
LEAST_GAIN = 0.02
# Allowed roundings by element size. 16-bit results are compared with exact float32 ones. For float32, nothing is more
# exact than the shipped configuration, and sums in another order differ from it by some roundings.
_ROUNDINGS = {2: 1, 4: 64}
# All sets of buffers together should be larger than any cache.
_BUFFER_BYTES = 256 << 20
_MOST_BUFFERS = 4


@dataclass(frozen=True)
class Finding:
    """The measured configurations of a problem.

    Attributes:
        problem: the call.
        key: the key of the class of shapes that the call stands for.
        default: the shipped configuration.
        seconds: seconds of the call by configuration, the default first.
        failures: the configurations without a time, with reasons: the compiler's message, or a wrong result.
    """

    problem: Problem
    key: str
    default: Any
    seconds: dict[Any, float]
    failures: dict[Any, str]

    @property
    def winner(self) -> Any:
        """The fastest configuration; the default if no other is faster by more than `LEAST_GAIN`."""
        best = min(self.seconds, key=self.seconds.__getitem__)
        return best if self.seconds[best] < (1 - LEAST_GAIN) * self.seconds[self.default] else self.default

    @property
    def gain(self) -> float:
        """The speed of the winner divided by the speed of the default."""
        return self.seconds[self.default] / self.seconds[self.winner]


@dataclass(frozen=True)
class Unmeasured:
    """A problem whose shipped configuration could not be measured, and the reason."""

    problem: Problem
    reason: str


def measure(
    problems: Iterable[Problem], device: torch.device, timer: Timer, most: int | None = None
) -> Iterator[Finding]:
    """Measure the problems one by one and yield a finding for each.

    Later problems use the winners of earlier ones. Configurations measured before this call are not used meanwhile.

    Args:
        problems: the calls to measure.
        device: the device to measure on.
        timer: returns the seconds of a call; on a GPU, of the work that it launches.
        most: the most configurations to measure in addition to the default; None for all.
    """
    found: dict[str, dict[str, int]] = {}
    for problem in problems:
        use_measured(architecture_of(torch.empty(0, device=device)).name, found)
        finding = finding_of(problem, device, timer, {}, most)
        found = {**found, **winners([finding])}
        yield finding


def winners(findings: Iterable[Finding | Unmeasured]) -> dict[str, dict[str, int]]:
    """The data to store: the fields of the fastest configuration by class of shapes."""
    return {finding.key: asdict(finding.winner) for finding in findings if isinstance(finding, Finding)}


def others(problem: Problem, default: Any, architecture: Architecture) -> list[Any]:
    """The configurations that are measured in addition to the default."""
    return candidates(problem.operation, default, architecture, problem.head_dim, problem.dtype.itemsize)


def class_and_default(problem: Problem, tensors: Tensors) -> tuple[str, Any]:
    """The key of the call's class of shapes, and its shipped configuration. Both are found by making the call."""
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
    """Measure one problem.

    Args:
        problem, device, timer, most: see `measure`.
        known: failures that are known beforehand.
        trying: called with each configuration before it is launched, and with None for the default.
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
            # After an illegal access nothing works on the GPU any more. Raise here, before the next configuration is
            # blamed for it.
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    return Finding(problem, key, default, seconds, failures)


def _seconds(problem: Problem, buffers: Sequence[Tensors], timer: Timer) -> float:
    return timer([partial(problem.call, *tensors) for tensors in buffers])


def widened(tensors: Tensors) -> Tensors:
    """The arguments in float32. Their results count as exact compared with those of 16-bit types."""
    return [tensor.float() if tensor.is_floating_point() else tensor for tensor in tensors]


def too_far(
    results: Sequence[Tensor], shipped: Sequence[Tensor], exact: Sequence[Tensor], roundings: int
) -> str | None:
    """The reason why results are wrong: the error is above twice the shipped configuration's plus some roundings."""
    for number, (result, default, reference) in enumerate(zip(results, shipped, exact, strict=True)):
        unit = torch.finfo(result.dtype).eps * reference.abs().max().item()
        allowed = 2 * (default.float() - reference).abs().max().item() + roundings * unit
        error = (result.float() - reference).abs().max().item()
        if not error <= allowed:
            return f"result {number} is off by {error:.3g}; at most {allowed:.3g} is allowed"
    return None


def results_of(problem: Problem, tensors: Tensors) -> list[Tensor]:
    """Make the call and return the results to compare: all floating-point tensors that are not empty."""
    results: Results = problem.call(*tensors)
    return [result for result in results if result is not None and result.is_floating_point() and result.numel()]


def _copies(tensors: Tensors) -> Tensors:
    """Copies of the tensors with the same strides."""
    return [tensor.clone() for tensor in tensors]


def event_timer(device: torch.device) -> Timer:
    """Return a timer that times runs on a GPU by its events, each for a short while."""
    return lambda runs: timed(runs, device, _SECONDS).median
