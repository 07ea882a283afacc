"""Rates and errors of Fastformer and its peers for the same work on a GPU, compared with ceilings and exact results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil, isnan
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastformer.benchmarking.calls import TOLERANCES, Call, compiler, distance
from fastformer.benchmarking.gpu.ceilings import COPY, MATRIX, copy_ceiling, matrix_ceiling
from fastformer.benchmarking.gpu.step import Record, Setting
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.memory import peak_of
from fastformer.benchmarking.operations import Work
from fastformer.benchmarking.study import Peer
from fastformer.benchmarking.timing import Run, wait
from fastformer.console import in_a_line
from fastformer.gpu_timing import Timing, timed, timed_parts

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward and backward"
"""The timed part of a training step: its forward, its backward, or both together."""

ERROR, PEAK_MEMORY = "error", "peak memory"
NO_TIME = "no time left"

_SECONDS, _MOST_REPEATS = 0.05, 20
# The most seconds that a peer needs, without and with compilation.
_SECONDS_OF_A_PEER, _SECONDS_TO_COMPILE = 3.0, 10.0
# The size of all sets of buffers together, as a multiple of the level-2 cache, and the largest number of sets.
_TIMES_THE_CACHE, _MOST_SETS = 3, 16

Returned = TypeVar("Returned")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Case:
    """A piece of work, and the peers that do it.

    Attributes:
        name: the name, unique in its step.
        peers: the peers by name, in order of importance. They prepare a `Call`.
        work: the least work that the case takes.
        exact: computes the exact outputs, followed by the exact gradients; None if results are random.
        select: selects the part of a peer's outputs and gradients to compare with the exact ones.
        phases: the phases to time. If a peer computes gradients in the forward, both are timed together.
        memory: whether peak memory, without the inputs, is measured too.
    """

    name: str
    peers: dict[str, Peer]
    work: Work
    exact: Callable[[], list[Tensor]] | None
    select: Callable[[list[Tensor]], list[Tensor]] = list
    phases: tuple[str, ...] = (FORWARD, BACKWARD)
    memory: bool = False

    def amount(self, phase: str) -> float:
        """The amount of work of a phase."""
        return {FORWARD: self.work.forward, BACKWARD: self.work.backward, BOTH: self.work.total}[phase]


@dataclass(frozen=True)
class _Failure:
    """The reason why something could not be done."""

    reason: str


@dataclass(frozen=True)
class _Measured:
    """The time of a phase on `sets` sets of buffers, and the largest distance of its results from the exact ones."""

    timing: Timing
    sets: int
    error: float | None
    wrong: bool


def rates(cases: Sequence[Case], setting: Setting) -> Iterator[Record]:
    """Yield rates, errors and peak memory of all peers in all cases, while there is time.

    Peers that must be compiled, which takes seconds each, come last.

    Raises:
        RuntimeError: in a dry run, at its end, if a figure of Fastformer is missing.
    """
    failures = []
    with compiler("aot_eager") if setting.dry else nullcontext():
        for compiled in (False, True):
            for case in cases:
                peers = {name: peer for name, peer in case.peers.items() if peer.compiled == compiled}
                for record in _of_case(case, peers, setting):
                    yield record
                    # Raises errors of the device, after which nothing in this process works any more.
                    wait(setting.device)
                    if record.peer == OURS and record.value is None:
                        failures.append(f"{record.case}, {record.metric}: {record.missing}")
    if setting.dry and failures:
        raise RuntimeError(f"{len(failures)} figures of Fastformer are missing, the first: {failures[0]}")


def launches(cases: Sequence[Case]) -> Iterator[Run]:
    """Yield Fastformer's calls in `cases` on the device meta, as `rates` makes them: a forward and its backward."""
    for case in cases:
        yield partial(_launch, case.peers[OURS])


def _launch(peer: Peer) -> None:
    peer.prepare()()


def _of_case(case: Case, peers: dict[str, Peer], setting: Setting) -> Iterator[Record]:
    exact: list[Tensor] | _Failure | None = None
    for name, peer in peers.items():
        missing = peer.missing(setting.device) or _no_time(peer, setting)
        if missing:
            yield from (_record(case, name, phase, _Failure(missing), setting) for phase in case.phases)
            continue
        if exact is None and case.exact is not None:
            exact = _attempt(case.exact, setting.device)
        yield from _of_peer(case, name, peer, exact, setting)


def _no_time(peer: Peer, setting: Setting) -> str | None:
    needed = 0.0 if setting.dry else _SECONDS_TO_COMPILE if peer.compiled else _SECONDS_OF_A_PEER
    return NO_TIME if setting.left < needed else None


def _of_peer(
    case: Case, name: str, peer: Peer, exact: list[Tensor] | _Failure | None, setting: Setting
) -> Iterator[Record]:
    call = _attempt(partial(_prepared, peer), setting.device)
    errors = []
    for phase in case.phases:
        found = _after(call, partial(_measured, case, exact, phase, setting), setting.device)
        yield _record(case, name, phase, found, setting)
        if isinstance(found, _Measured) and found.error is not None:
            errors.append(found.error)
    yield from _error_records(case, name, errors, exact)
    if case.memory:
        yield _memory_record(case, name, _after(call, partial(peak_of, device=setting.device), setting.device))


def _prepared(peer: Peer) -> Call:
    call = peer.prepare()
    assert isinstance(call, Call)
    return call


def _measured(case: Case, exact: list[Tensor] | _Failure | None, phase: str, setting: Setting, call: Call) -> _Measured:
    error = None
    if isinstance(exact, list):
        found = case.select(call.forward() if phase == FORWARD else call())
        error = _largest([distance(one, right) for one, right in zip(found, exact, strict=phase != FORWARD)])
        del found
    wrong = error is not None and not error <= TOLERANCES[_dtype(call)]
    calls = [call, *(call.elsewhere() for _ in range(_sets(call, setting.device) - 1))]
    return _Measured(_time(calls, phase, setting), len(calls), error, wrong)


def _largest(errors: Sequence[float]) -> float:
    """The largest error. NaN counts as larger than every number."""
    return max(errors, key=lambda error: (isnan(error), error))


def _time(calls: Sequence[Call], phase: str, setting: Setting) -> Timing:
    seconds = 0.0 if setting.dry else _SECONDS
    if phase == BACKWARD:
        return timed_parts([each.backward for each in calls], setting.device, seconds, _MOST_REPEATS)
    runs: list[Run] = [each.forward if phase == FORWARD else each for each in calls]
    return timed(runs, setting.device, seconds, _MOST_REPEATS)


def _sets(call: Call, device: torch.device) -> int:
    """The number of sets of buffers. With enough sets, a set is no longer in the cache when it is used again."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(_MOST_SETS, ceil(_TIMES_THE_CACHE * cache / call.nbytes))


def _dtype(call: Call) -> torch.dtype:
    leaves = tree_leaves(list(call.inputs))
    return next(each.dtype for each in leaves if isinstance(each, Tensor) and each.is_floating_point())


def _attempt(do: Callable[[], Returned], device: torch.device) -> Returned | _Failure:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _caught(do, device)
    if isinstance(found, _Failure):
        if device.type == "cuda":
            with suppress(Exception):
                torch.cuda.empty_cache()
        return _Failure(" ".join([found.reason, *_refusals(found, [str(each.message) for each in caught])]))
    for each in caught:
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    return found


def _caught(do: Callable[[], Returned], device: torch.device) -> Returned | _Failure:
    try:
        found = do()
        wait(device)
    except Exception as cause:
        return _Failure(in_a_line(cause))
    return found


def _refusals(failure: _Failure, warned: Sequence[str]) -> list[str]:
    """The reasons that PyTorch's attention gave in warnings if the only allowed backend could not compute the call."""
    if "No available kernel" not in failure.reason:
        return []
    first_lines = [each.split("(Triggered")[0].strip() for each in warned]
    return [each for each in first_lines if not each.endswith("because:") and "runtime disabled" not in each]


def _after(ready: Returned | _Failure, do: Callable[[Returned], Result], device: torch.device) -> Result | _Failure:
    return ready if isinstance(ready, _Failure) else _attempt(partial(do, ready), device)


def _record(case: Case, name: str, phase: str, found: _Measured | _Failure, setting: Setting) -> Record:
    unit = MATRIX if case.work.unit == "FLOP" else COPY
    if isinstance(found, _Failure):
        return Record(case.name, name, phase, None, unit, found.reason)
    per_second = case.amount(phase) / found.timing.median
    value = per_second / (1e12 if unit == MATRIX else 1e9)
    ceiling = (matrix_ceiling if unit == MATRIX else copy_ceiling)(setting.device, setting.dry).value
    details = {"seconds": asdict(found.timing), "sets of buffers": found.sets}
    if found.wrong:
        return Record(case.name, name, phase, None, unit, f"wrong, {found.error:.2g} from exact", details)
    details |= {"error": found.error, "share of the ceiling": value / ceiling}
    return Record(case.name, name, phase, value, unit, details=details)


def _error_records(
    case: Case, name: str, errors: Sequence[float], exact: list[Tensor] | _Failure | None
) -> Iterator[Record]:
    """Yield a record of the largest of `errors`, or of the missing exact result, if there is something to compare."""
    if errors:
        yield Record(case.name, name, ERROR, _largest(errors), "of the norm")
    elif isinstance(exact, _Failure):
        yield Record(case.name, name, ERROR, None, "of the norm", f"no exact result: {exact.reason}")


def _memory_record(case: Case, name: str, found: int | _Failure) -> Record:
    if isinstance(found, _Failure):
        return Record(case.name, name, PEAK_MEMORY, None, "MiB", found.reason)
    return Record(case.name, name, PEAK_MEMORY, found / 2**20, "MiB")
