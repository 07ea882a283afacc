"""Timing of several peers in turns, so that what else the machine does meanwhile falls on all of them."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_map_only

from fastformer.console import in_a_line

Run = Callable[[], object]
"""Does a case's work once; returns what the peers must agree on."""

SHORTEST_TURN = 0.05
"""A turn repeats a short run for so many seconds, far above the clock's grain and a thread's wake-up."""


@dataclass
class Timed:
    """Seconds of a run, one for each round, of every peer; and why a peer that failed did."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def interleaved(
    prepare: dict[str, Callable[[], Run]],
    rounds: int,
    device: torch.device,
    agree: Callable[[dict[str, object]], None] | None = None,
    may_fail: Callable[[str], bool] = lambda name: False,
    shortest_turn: float = SHORTEST_TURN,
) -> Timed:
    """Time each of the runs in each round, in an order that starts with another one every round.

    Args:
        prepare: makes each run, by the peers' names. Its first run, untimed, warms it up.
        rounds: turns of each.
        device: whose work is waited for.
        agree: given the results of the untimed runs.
        may_fail: whether a peer's exception is a finding; otherwise it is raised.
        shortest_turn: seconds for which a turn repeats a short run.

    Raises:
        AssertionError: the results do not agree.
    """
    timed = Timed()
    runs: dict[str, Run] = {}
    results: dict[str, object] = {}
    repeats: dict[str, int] = {}
    for name, make in prepare.items():
        try:
            runs[name] = run = make()
            # Kept, since a peer may write the next run's result to the same place.
            results[name] = tree_map_only(torch.Tensor, torch.clone, run()) if agree else run()
            warm = seconds_of(run, 1, device)
        except Exception as cause:
            if not may_fail(name):
                raise
            results.pop(name, None)
            runs.pop(name, None)
            timed.failures[name] = in_a_line(cause)
            continue
        timed.seconds[name] = []
        repeats[name] = max(1, math.ceil(shortest_turn / max(warm, 1e-9)))
    if agree is not None:
        agree(results)
    del results
    names = list(timed.seconds)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            timed.seconds[name].append(seconds_of(runs[name], repeats[name], device))
    return timed


def seconds_of(run: Run, repeats: int, device: torch.device) -> float:
    """Of one of `repeats` runs in a row."""
    gc.collect()
    wait(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    wait(device)
    return (time.perf_counter() - begin) / repeats


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Have PyTorch compute on so many threads within a ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wait(device: torch.device) -> None:
    """Until `device` has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
