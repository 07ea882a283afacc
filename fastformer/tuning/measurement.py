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

from fastformer.tuning.candidates import candidates
from fastformer.tuning.problem import Problem, Results, Tensors

Timer = Callable[[Sequence[Callable[[], object]]], float]
"""Seconds of a call, which is given for several sets of buffers."""
Failures = Mapping[Any, str]
"""Why configurations cannot be launched."""
Prepare = Callable[[Problem], Failures]
"""Compiles a problem's kernels; returns which configurations cannot be."""

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


def measure(
    problems: Iterable[Problem],
    device: torch.device,
    timer: Timer,
    prepare: Prepare = lambda problem: {},
    most: int | None = None,
) -> Iterator[Finding]:
    """The findings of each problem, one by one.

    What was found earlier is launched by the problems that follow. While this goes on nothing else that was measured
    is used.

    Args:
        problems: what to measure.
        device: where.
        timer: seconds of a call; on a GPU of the work it launches.
        prepare: is called before each problem.
        most: configurations beside the default, at most; None for all.
    """
    found: dict[str, dict[str, int]] = {}
    architecture = architecture_of(torch.empty(0, device=device))
    for problem in problems:
        use_measured(architecture.name, found)
        finding = _finding(problem, architecture, device, timer, prepare(problem), most)
        found = {**found, finding.key: asdict(finding.winner)}
        yield finding


def others(problem: Problem, default: Any, architecture: Architecture) -> list[Any]:
    """The configurations that are measured beside the default."""
    return candidates(problem.operation, default, architecture, problem.head_dim, problem.dtype.itemsize)


def class_and_default(problem: Problem, tensors: Tensors) -> tuple[str, Any]:
    """The key of the class that the call belongs to, and its shipped configuration, found by making the call."""
    with shipped_defaults() as asked:
        problem.call(*tensors)
    return next((key, default) for key, default in asked.items() if key.split()[0] == problem.operation)


def _finding(
    problem: Problem, architecture: Architecture, device: torch.device, timer: Timer, known: Failures, most: int | None
) -> Finding:
    failures = dict(known)
    torch.manual_seed(0)
    given = problem.tensors(device)
    key, default = class_and_default(problem, _copies(given))
    size = sum(tensor.nbytes for tensor in given)
    buffers = [_copies(given) for _ in range(min(_MOST_BUFFERS, math.ceil(_BUFFER_BYTES / max(size, 1))))]
    exact = _results(problem, [tensor.float() if tensor.is_floating_point() else tensor for tensor in _copies(given)])
    seconds: dict[Any, float] = {}
    shipped: list[Tensor] = []
    for configuration in (default, *others(problem, default, architecture)[:most]):
        if configuration in failures:
            continue
        try:
            with forced({problem.operation: configuration}):
                results = _results(problem, _copies(given))
                if configuration == default:
                    shipped = results
                elif far := too_far(results, shipped, exact, _ROUNDINGS[problem.dtype.itemsize]):
                    failures[configuration] = far
                    continue
                seconds[configuration] = timer([partial(problem.call, *tensors) for tensors in buffers])
        except Exception as error:
            if configuration == default:
                raise
            failures[configuration] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return Finding(problem, key, default, seconds, failures)


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


def _results(problem: Problem, tensors: Tensors) -> list[Tensor]:
    results: Results = problem.call(*tensors)
    return [result for result in results if result is not None and result.is_floating_point() and result.numel()]


def _copies(tensors: Tensors) -> Tensors:
    """Copies with the same strides."""
    return [tensor.clone() for tensor in tensors]
