"""The overhead of a call: the host's time of each operator, with so few tokens that the work itself does not matter.

The time of whole calls is compared with PyTorch's own functions, and the time up to the launch of the kernels with
Triton's bare launches. On a GPU this overhead decides the time of small models and of single tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastformer.benchmarking.host_time import HostCall, best_microseconds
from fastformer.benchmarking.launch_cases import BOTH, FORWARD, cases
from fastformer.benchmarking.measurement import OURS, Goal, Measurement, Metric
from fastformer.benchmarking.operations import PYTORCH, Sizes
from fastformer.benchmarking.stand_in_host import ARCHITECTURE, STEP, HostTime
from fastformer.benchmarking.study import MeasuredStudy, Setting

HOST_TIME = Metric("host time", "µs")
LAUNCHES = Metric("launches", "")
TO_THE_LAUNCHES = Metric("host time up to the launches", "µs")
BARE = Metric("of Triton's bare launches", "µs")
ABOVE = Metric("above the bare launches", "µs")
OPERATORS = Metric("host time of our operators", "ms")
BARE_OF_STEP = Metric("of the bare launches", "ms")
WHOLE_STEP = Metric("of the whole step", "ms")


def measurements(setting: Setting) -> Iterator[Measurement]:
    rounds = setting.rounds or (2 if setting.quick else 15)
    yield from beside_pytorch(setting.device, rounds)
    yield from to_the_launches(rounds, quick=setting.quick)


def beside_pytorch(device: torch.device, rounds: int, only: str = "") -> Iterator[Measurement]:
    """Measure calls with 16 tokens, ours and PyTorch's.

    Args:
        device: the device of the tensors.
        rounds: turns of each call.
        only: text that the name of a call must contain.
    """
    gpu = device.type == "cuda"
    sizes = Sizes(1, 16, 64, 2, 128, 64, 32, torch.bfloat16 if gpu else torch.float32)
    for name, operation, backward in cases(sizes, only):
        functions = {OURS: operation.ours, PYTORCH: operation.eager}
        calls = {peer: HostCall.of(operation.run(each, sizes, device, backward)) for peer, each in functions.items()}
        for peer, microseconds in best_microseconds(calls, rounds, device).items():
            yield Measurement("launch", name, peer, HOST_TIME, [microseconds])


def to_the_launches(rounds: int, quick: bool = False, only: str = "") -> Iterator[Measurement]:
    """Measure calls and a training step up to the launches, without a GPU, in a new process.

    Args:
        rounds: turns of each call.
        quick: whether sizes are small.
        only: text that the name of a call must contain.
    """
    for found in _on_a_stand_in(rounds, quick, only):
        for metric, value in _metrics(found).items():
            yield Measurement("launch", f"{found.case}, {ARCHITECTURE}", OURS, metric, [value])


def _metrics(found: HostTime) -> dict[Metric, float]:
    if found.whole is None:
        times = {TO_THE_LAUNCHES: found.ours, BARE: found.bare, ABOVE: found.ours - found.bare}
    else:
        times = {OPERATORS: found.ours / 1e3, BARE_OF_STEP: found.bare / 1e3, WHOLE_STEP: found.whole / 1e3}
    return {LAUNCHES: found.launches, **times}


def _on_a_stand_in(rounds: int, quick: bool, only: str) -> list[HostTime]:
    command = [sys.executable, "-m", "fastformer.benchmarking.stand_in_host", f"--rounds={rounds}", f"--only={only}"]
    # Triton's interpreter would not compile the kernels.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([*command, *["--quick"] * quick], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no host time on a stand-in for {ARCHITECTURE}: {done.stderr.strip()[-2000:]}")
    return [HostTime(*json.loads(line)) for line in done.stdout.splitlines()]


class _Most(NamedTuple):
    """Upper bounds, forward and with the backward: ratios to PyTorch's host time, and µs above the bare launches."""

    forms: tuple[str, ...]
    ratios: tuple[float, ...]
    above: tuple[float, ...]


_MOST = (
    _Most(("attention",), (4, 3), (20, 40)),
    _Most(("softmax", "layer_norm", "rms_norm", "rotary, query and key"), (7, 2.5), (10, 25)),
    _Most(("feed_forward, gelu", "feed_forward, gated silu", "transformer_embedding"), (2, 2), (15, 30)),
    _Most(("cross_entropy", "linear_cross_entropy"), (6, 4), (15, 30)),
    _Most(("decode_attention", "append_to_cache, with rotary", "attention_weights"), (3,), (15,)),
)


def _goals() -> Iterator[Goal]:
    for most in _MOST:
        # Operators without a backward have only a bound for the forward.
        for suffix, ratio, above in zip((FORWARD, BOTH), most.ratios, most.above, strict=False):
            forms = tuple(f"{form}: {suffix}" for form in most.forms)
            yield Goal(forms, PYTORCH, HOST_TIME, at_most=ratio)
            yield Goal(forms, None, ABOVE, at_most=above)
    yield Goal(STEP, None, OPERATORS, at_most=4.0)


STUDY = MeasuredStudy(
    name="launch",
    title="the overhead of a call, before any work is done",
    measurements=measurements,
    goals=tuple(_goals()),
    note="The shortest time of many turns on one thread. Host time: compared with PyTorch's own function, called "
    "directly, or else with the formula, on 16 tokens of 64 features. Up to the launches: calls for a GPU of sm_90, "
    "without the GPU, on 8 x 128 tokens of 768 features in bfloat16, until Triton's launcher has the kernels' "
    "arguments. They are compared with the same number of launches of a kernel without arguments. The CUDA driver and "
    "its allocator are not included. Training step: the time of all calls of our operators and their part of the "
    "backward, compared with the bare launches and with the whole step without the optimizer.",
)
