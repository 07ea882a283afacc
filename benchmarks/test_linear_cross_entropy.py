"""Linear cross-entropy beside PyTorch's `cross_entropy(linear(...))`, forward and backward: time, and peak memory.

    pytest benchmarks/test_linear_cross_entropy.py

Linux. Memory is the growth of the largest resident set of a process that does nothing else, over what its inputs take.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastformer.ops.linear_cross_entropy import linear_cross_entropy

TOKENS, CLASSES, FEATURES = 4096, 50257, 768
MEMORY_GOAL, TIME_GOAL = 0.25, 1.0
NAMES = ("pytorch", "fastformer")
ROUNDS = 3


def step(name: str) -> Callable[[], None]:
    """One forward and backward of the implementation called `name` on inputs that are the same for each."""
    torch.manual_seed(0)
    input = torch.randn(TOKENS, FEATURES, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(CLASSES, FEATURES) * 0.02)
    target = torch.randint(CLASSES, (TOKENS,))

    def run() -> None:
        input.grad = weight.grad = None
        if name == "pytorch":
            loss = F.cross_entropy(F.linear(input, weight), target)
        else:
            loss = linear_cross_entropy(input, weight, target)
        loss.backward()

    return run


def peak_mebibytes(name: str) -> float:
    run = step(name)
    before = high_water_mark()
    run()
    return high_water_mark() - before


def high_water_mark() -> float:
    """MiB. Not getrusage's ru_maxrss, which a process inherits from the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def test_time_and_peak_memory(benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    """The rounds of the two take turns and each one's fastest counts: what else the machine does only ever slows."""
    steps = {name: step(name) for name in NAMES}
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(1 + ROUNDS):
        for name, run in steps.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    fastest = {name: min(taken[1:]) for name, taken in seconds.items()}
    peaks = {
        name: float(subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True).stdout)
        for name in NAMES
    }
    time_ratio, memory_ratio = (values["fastformer"] / values["pytorch"] for values in (fastest, peaks))
    benchmark.extra_info.update(time_ratio=time_ratio, memory_ratio=memory_ratio)
    benchmark.pedantic(steps["fastformer"], rounds=1)
    with capsys.disabled():
        print(f"\n{TOKENS} tokens, {CLASSES} classes, {FEATURES} features, {torch.get_num_threads()} threads")
        for label, values, ratio, unit in (
            ("time", fastest, time_ratio, "s"),
            ("peak memory", peaks, memory_ratio, "MiB"),
        ):
            print(f"{label}: {values['fastformer']:.1f} / {values['pytorch']:.1f} {unit} = {ratio:.2f}")
    assert memory_ratio <= MEMORY_GOAL
    assert time_ratio <= TIME_GOAL


if __name__ == "__main__":
    print(peak_mebibytes(sys.argv[1]))
