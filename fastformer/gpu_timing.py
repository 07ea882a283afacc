"""Time of work on a GPU, measured by events on its stream: the host's time is not included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Run = Callable[[], object]
Prepare = Callable[[], Run]
"""Does the part that is not timed, and returns the part that is timed: for example a forward, and its backward."""

_CYCLES_PER_SECOND = 2e9
# A factor on the time that the host needed to launch a run: it may take longer the next time.
_RESERVE = 1.5


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: the median, the 20th and the 80th percentile of `repeats` runs."""

    median: float
    low: float
    high: float
    repeats: int


def timed(runs: Sequence[Run], device: torch.device, seconds: float = 0.1, most: int = 200) -> Timing:
    """Time the same work on several sets of buffers, in turns, so that none is still in the cache.

    Args:
        runs: the work, once for each set of buffers.
        device: the device that does the work.
        seconds: the duration of the measurement.
        most: the most repeats; there are at least three.
    """
    return timed_parts([_ready(run) for run in runs], device, seconds, most)


def timed_parts(prepared: Sequence[Prepare], device: torch.device, seconds: float = 0.1, most: int = 200) -> Timing:
    """Time runs as `timed` does, if each run needs a preparation that is not timed.

    Args:
        prepared: the preparations, one for each set of buffers. All of them are done before their runs, so that each
            run finds a cache that the others have used.
        device, most: see `timed`.
        seconds: the duration of the measurement without the preparations.
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
    """The seconds of each run, and the host's seconds to launch one with its preparation; `asking` estimates these."""
    if device.type != "cuda":
        return [_host_seconds_of(run) for run in _in_turns(prepared, repeats)], 0.0
    with torch.cuda.device(device):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        # The GPU waits until the host has launched everything. Otherwise a short run's time would be the host's.
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
        while runs:  # memory that a run holds is freed after it
            yield runs.pop(0)


def _host_seconds_of(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
