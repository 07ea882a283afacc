"""Time of work on a GPU, by events on its stream: what the host does meanwhile is not in it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Run = Callable[[], object]

# Half a millisecond at 2 GHz, more than the host takes to ask for a run.
_CYCLES_PER_RUN = 1_000_000


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
    for run in runs:
        run()
    estimate = max(_seconds_of([runs[0]] * 3, device)[1], 1e-6)
    repeats = min(most, max(3, round(seconds / estimate)))
    taken = sorted(_seconds_of([runs[number % len(runs)] for number in range(repeats)], device))
    return Timing(statistics.median(taken), taken[len(taken) // 5], taken[-1 - len(taken) // 5], repeats)


def _seconds_of(runs: Sequence[Run], device: torch.device) -> list[float]:
    if device.type != "cuda":
        return [_host_seconds_of(run) for run in runs]
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in runs]
    # The GPU waits until the host has asked for everything: else a short run's time would be the host's.
    torch.cuda._sleep(_CYCLES_PER_RUN * len(runs))
    for run, (begin, end) in zip(runs, events, strict=True):
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1000.0 for begin, end in events]


def _host_seconds_of(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
