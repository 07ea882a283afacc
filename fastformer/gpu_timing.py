"""Time of work on a GPU, by events on its stream: what the host does meanwhile is not in it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Run = Callable[[], object]
Prepare = Callable[[], Run]
"""Does what is not timed, and returns what is: a forward, and its backward."""

_CYCLES_PER_SECOND = 2e9
# Of the time that the host took to ask for a run: the next time it may take longer.
_RESERVE = 1.5


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: the median of `repeats`, and the 20th and 80th percentile."""

    median: float
    low: float
    high: float
    repeats: int


def timed(runs: Sequence[Run], device: torch.device, seconds: float = 0.1, most: int = 200) -> Timing:
    """Time of the same work on several sets of buffers, taken in turns so that none is still in the cache.

    Args:
        runs: the work, once for each set of buffers.
        device: where it is done.
        seconds: how long to measure.
        most: repeats at the most; there are at least three.
    """
    return timed_parts([_ready(run) for run in runs], device, seconds, most)


def timed_parts(prepared: Sequence[Prepare], device: torch.device, seconds: float = 0.1, most: int = 200) -> Timing:
    """As `timed`, of runs that each need something done before them, which is not in their time.

    Args:
        prepared: for each set of buffers; all are called, and then their runs, which find the cache used by the others.
        device, seconds, most: as of `timed`; `seconds` leaves out what is done before the runs.
    """
    for prepare in prepared:
        prepare()()
    few, asking = _seconds_of(prepared[:1], device, 3, 1e-3)
    repeats = min(most, max(3, round(seconds / max(few[1], 1e-6))))
    taken, _ = _seconds_of(prepared, device, repeats, _RESERVE * asking)
    taken.sort()
    return Timing(statistics.median(taken), taken[len(taken) // 5], taken[-1 - len(taken) // 5], repeats)


def _ready(run: Run) -> Prepare:
    return lambda: run


def _seconds_of(
    prepared: Sequence[Prepare], device: torch.device, repeats: int, asking: float
) -> tuple[list[float], float]:
    """Seconds of each run, and of the host to ask for one with what is before it; `asking` says how long that takes."""
    if device.type != "cuda":
        return [_host_seconds_of(run) for run in _in_turns(prepared, repeats)], 0.0
    with torch.cuda.device(device):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        # The GPU waits until the host has asked for everything: else a short run's time would be the host's.
        torch.cuda._sleep(round(_CYCLES_PER_SECOND * asking * repeats))
        first = time.perf_counter()
        for run, (begin, end) in zip(_in_turns(prepared, repeats), events, strict=True):
            begin.record()
            run()
            end.record()
        asked = (time.perf_counter() - first) / repeats
        torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1000.0 for begin, end in events], asked


def _in_turns(prepared: Sequence[Prepare], repeats: int) -> Iterator[Run]:
    for begin in range(0, repeats, len(prepared)):
        runs = [prepare() for prepare in prepared[: repeats - begin]]
        while runs:  # what a run has kept for itself goes with it
            yield runs.pop(0)


def _host_seconds_of(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
