"""Linear cross-entropy beside PyTorch's `cross_entropy(linear(...))`, forward and backward: time, and peak memory.

    pytest benchmarks/test_linear_cross_entropy.py

Linux. Memory is the growth of the largest resident set of a process that does nothing else, over what its inputs take.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastformer.ops.linear_cross_entropy import linear_cross_entropy

TOKENS, CLASSES, FEATURES = 4096, 50257, 768
MEMORY_GOAL = 0.25


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


MEDIANS: dict[str, float] = {}


@pytest.mark.parametrize("name", ["pytorch", "fastformer"])
def test_time(benchmark, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.pedantic(step(name), rounds=3, warmup_rounds=1)
    MEDIANS[name] = benchmark.stats.stats.median
    if len(MEDIANS) == 2:
        with capsys.disabled():
            print(f"\ntime: fastformer / pytorch = {MEDIANS['fastformer'] / MEDIANS['pytorch']:.2f}")


def test_peak_memory(capsys: pytest.CaptureFixture[str]) -> None:
    peaks = {
        name: float(subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True).stdout)
        for name in ("pytorch", "fastformer")
    }
    ratio = peaks["fastformer"] / peaks["pytorch"]
    with capsys.disabled():
        print(f"\npeak memory: {peaks['fastformer']:.0f} / {peaks['pytorch']:.0f} MiB = {ratio:.2f}")
    assert ratio <= MEMORY_GOAL


if __name__ == "__main__":
    print(peak_mebibytes(sys.argv[1]))
