"""What a call costs before any work is done: the CPU time of each operator on so few elements that they do not count.

On a GPU it is the time to launch, and what small models and single tokens wait for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch

from fastformer.benchmarking.attention_peers import Attention
from fastformer.benchmarking.attention_peers import peers as attention_peers
from fastformer.benchmarking.measurement import OURS, Measurement, Metric
from fastformer.benchmarking.operations import PYTORCH, Operation, Sizes, operations
from fastformer.benchmarking.study import MeasuredStudy, Peer, Setting
from fastformer.benchmarking.timing import Run, in_a_line, threads, wait

CPU_TIME = Metric("CPU time of a call", "µs")
# A GPU's queue holds about a thousand launches; a call of ours has a few.
_MOST_CALLS, _SECONDS_OF_A_TURN, _TO_WARM_UP = 100, 0.01, 10


def measurements(setting: Setting) -> Iterator[Measurement]:
    gpu = setting.device.type == "cuda"
    size = Sizes(1, 16, 64, 2, 128, 64, 32, torch.bfloat16 if gpu else torch.float32)
    rounds = setting.rounds or (2 if setting.quick else 7)
    for backward in (False, True):
        suffix = "forward and backward" if backward else "forward"
        attention = Attention(1, size.heads, size.sequence, size.head_dim, size.dtype, setting.device, backward)
        yield from _case(f"attention, {suffix}", attention_peers(attention, flex=False), setting, rounds)
        for operation in operations(size):
            if operation.backward or not backward:
                peers = _peers(operation, size, setting, backward)
                # Sizes are not what this is about.
                form = ", ".join(part for part in operation.name.split(", ") if not part[0].isdigit())
                yield from _case(f"{form}, {suffix}", peers, setting, rounds)


def _peers(operation: Operation, size: Sizes, setting: Setting, backward: bool) -> dict[str, Peer]:
    def peer(function: object) -> Peer:
        return Peer(lambda: operation.run(function, size, setting.device, backward))  # type: ignore[arg-type]

    return {OURS: peer(operation.ours), PYTORCH: peer(operation.eager)}


def _case(case: str, peers: dict[str, Peer], setting: Setting, rounds: int) -> Iterator[Measurement]:
    runs: dict[str, Run] = {}
    calls: dict[str, int] = {}
    missing: dict[str, str | None] = {}
    for name, peer in peers.items():
        missing[name] = peer.missing(setting.device)
        if missing[name] is None:
            try:
                runs[name] = peer.prepare()
                calls[name] = _calls(runs[name], setting.device)
            except Exception as cause:
                if name == OURS:
                    raise
                runs.pop(name, None)
                missing[name] = in_a_line(cause)
    found: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(_microseconds(run, calls[name], setting.device))
    for name, values in found.items():
        yield Measurement("launch", case, name, CPU_TIME, values, missing=missing[name])


def _calls(run: Run, device: torch.device) -> int:
    """As many as a turn takes, after some to warm up."""
    _microseconds(run, _TO_WARM_UP, device)
    return min(_MOST_CALLS, math.ceil(_SECONDS_OF_A_TURN * 1e6 / max(_microseconds(run, _TO_WARM_UP, device), 1.0)))


def _microseconds(run: Run, calls: int, device: torch.device) -> float:
    """Of all threads of the process: on a GPU the backward has one of its own, on a CPU others would wait busily."""
    wait(device)
    with threads(1):
        begin = time.process_time()
        for _ in range(calls):
            run()
        taken = time.process_time() - begin
    wait(device)
    return taken / calls * 1e6


STUDY = MeasuredStudy(
    name="launch",
    title="what a call costs before any work is done",
    measurements=measurements,
    note="A token or a few of them, on which every operator's work takes no time.",
)
