"""What a call costs before any work is done: the host's time of each operator on so few tokens that they do not count,
beside PyTorch's own functions, and of its way to the launch of its kernels, beside Triton's bare launches.

On a GPU it is what small models and single tokens wait for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from fastformer.benchmarking.host_time import HostCall, best_microseconds
from fastformer.benchmarking.launch_cases import cases
from fastformer.benchmarking.measurement import OURS, Measurement, Metric
from fastformer.benchmarking.operations import PYTORCH, Sizes
from fastformer.benchmarking.stand_in_host import ARCHITECTURE, BARE, STEP
from fastformer.benchmarking.study import MeasuredStudy, Setting

HOST_TIME = Metric("host time", "µs")
TO_THE_LAUNCH = Metric("host time up to the launches", "µs")
ABOVE = Metric("above Triton's bare launches", "µs")
LAUNCHES = Metric("launches", "")
STEP_TIME = Metric("host time of a step", "ms")


def measurements(setting: Setting) -> Iterator[Measurement]:
    rounds = setting.rounds or (2 if setting.quick else 15)
    yield from beside_pytorch(setting.device, rounds)
    yield from to_the_launches(rounds, quick=setting.quick)


def beside_pytorch(device: torch.device, rounds: int, only: str = "") -> Iterator[Measurement]:
    """Calls of 16 tokens, by us and by PyTorch.

    Args:
        only: those alone that have this in their names.
    """
    gpu = device.type == "cuda"
    sizes = Sizes(1, 16, 64, 2, 128, 64, 32, torch.bfloat16 if gpu else torch.float32)
    for name, operation, backward in cases(sizes, only):
        functions = {OURS: operation.ours, PYTORCH: operation.eager}
        calls = {peer: HostCall.of(operation.run(each, sizes, device, backward)) for peer, each in functions.items()}
        for peer, microseconds in best_microseconds(calls, rounds, device).items():
            yield Measurement("launch", name, peer, HOST_TIME, [microseconds])


def to_the_launches(rounds: int, quick: bool = False, only: str = "") -> Iterator[Measurement]:
    """Calls and a training step for a GPU that is not there, in a process of its own; arguments as above."""
    for case, peers in _on_a_stand_in(rounds, quick, only).items():
        name = f"{case}, {ARCHITECTURE}"
        for peer, (microseconds, _) in peers.items():
            if case == STEP:
                yield Measurement("launch", name, peer, STEP_TIME, [microseconds / 1e3])
            else:
                yield Measurement("launch", name, peer, TO_THE_LAUNCH, [microseconds])
        ours, launches = peers[OURS]
        if case != STEP:
            yield Measurement("launch", name, OURS, ABOVE, [ours - peers[BARE][0]])
        yield Measurement("launch", name, OURS, LAUNCHES, [launches])


def _on_a_stand_in(rounds: int, quick: bool, only: str) -> dict[str, dict[str, tuple[float, int]]]:
    """Microseconds and launches of each case's peers."""
    command = [sys.executable, "-m", "fastformer.benchmarking.stand_in_host", f"--rounds={rounds}", f"--only={only}"]
    # The kernels are compiled, which Triton's interpreter does not do.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([*command, *["--quick"] * quick], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no host time on a stand-in for {ARCHITECTURE}: {done.stderr.strip()[-2000:]}")
    found: dict[str, dict[str, Any]] = {}
    for line in done.stdout.splitlines():
        case, peer, microseconds, launches = json.loads(line)
        found.setdefault(case, {})[peer] = microseconds, launches
    return found


STUDY = MeasuredStudy(
    name="launch",
    title="what a call costs before any work is done",
    measurements=measurements,
    note="A token or a few of them, on which every operator's work takes no time.",
)
