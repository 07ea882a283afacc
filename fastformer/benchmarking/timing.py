"""Time several peers in turns, so that other work on the machine slows all of them down equally."""

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
"""Does a case's work once. Returns the result that all peers must agree on."""

SHORTEST_TURN = 0.05
"""Seconds for which a turn repeats a short run: far more than the clock's resolution and a thread's wake-up time."""


@dataclass
class Timed:
    """The seconds of each peer's run, one value for each round, and the reasons of peers that failed."""

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
    """Time each of the runs in each round. Each round starts with another peer.

    Args:
        prepare: makes each peer's run, by the peers' names. The first execution, untimed, warms up.
        rounds: the number of turns of each peer.
        device: the device whose work is waited for.
        agree: checks the results of the untimed executions.
        may_fail: whether a peer's exception is recorded as its failure; otherwise it is raised.
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
            # Copied, since a peer may write the next result to the same memory.
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
    """The mean seconds of `repeats` runs in a row."""
    gc.collect()
    wait(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    wait(device)
    return (time.perf_counter() - begin) / repeats


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let PyTorch compute with `number` threads within a ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def wait(device: torch.device) -> None:
    """Wait until `device` has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
