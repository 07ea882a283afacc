"""Results of NVIDIA's tools for the main kernels: memory errors, races, and the profiler's figures."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

import torch

from fastformer.benchmarking.gpu.main_kernels import SIZES, calls
from fastformer.benchmarking.gpu.step import Launch, Record, Setting, Step
from fastformer.benchmarking.measurement import OURS

_CHECKS = ("memcheck", "racecheck")
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
# The figures of the profiler that are recorded.
_FIGURES = (
    "Duration",
    "Compute (SM) Throughput",
    "Memory Throughput",
    "DRAM Throughput",
    "Registers Per Thread",
    "Achieved Occupancy",
)
_PROFILE = [
    "ncu",
    "--clock-control=none",
    "--csv",
    "--page=details",
    "--kernel-name=regex:^_",  # only Triton's kernels: kernels of libraries have other names
    *(f"--section={name}" for name in ("SpeedOfLight", "LaunchStats", "Occupancy")),
]


def _run(setting: Setting) -> Iterator[Record]:
    if setting.dry:
        done = _watched([], setting, "small")
        yield Record("main kernels", OURS, "exit status", done.returncode, "")
    for check in _CHECKS:
        yield _checked(check, setting)
    yield from _profiled(setting)


def _checked(check: str, setting: Setting) -> Record:
    """The number of errors that the checker finds. PyTorch's cache is off, so that it sees each allocation."""
    if shutil.which("compute-sanitizer") is None:
        return Record(check, OURS, "errors", None, "errors", "compute-sanitizer is not on the PATH")
    done = _watched(["compute-sanitizer", f"--tool={check}"], setting, "small", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    found = _SUMMARY.search(done.stdout)
    if found is None:
        return Record(check, OURS, "errors", None, "errors", _last_line(done.stdout))
    return Record(check, OURS, "errors", float(found[1]), "errors", details={"exit status": done.returncode})


def _profiled(setting: Setting) -> Iterator[Record]:
    if shutil.which("ncu") is None:
        yield Record("profile", OURS, "Duration", None, "us", "ncu is not on the PATH")
        return
    done = _watched(_PROFILE, setting, "large")
    found = list(profile_records(done.stdout.splitlines()))
    yield from found
    if not found:
        yield Record("profile", OURS, "Duration", None, "us", _last_line(done.stdout))


def profile_records(lines: Sequence[str]) -> Iterator[Record]:
    """Yield the figures of each kernel's last launch from the profiler's output, whose table begins with headings."""
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    table = csv.DictReader(line for line in lines[start:] if line.startswith('"'))
    latest = {(row["Kernel Name"], row["Metric Name"]): row for row in table if row["Metric Name"] in _FIGURES}
    for (kernel, metric), row in latest.items():
        text, unit = row["Metric Value"], row["Metric Unit"]
        try:
            yield Record(kernel, OURS, metric, float(text.replace(",", "")), unit)
        except ValueError:  # the profiler could not count it
            yield Record(kernel, OURS, metric, None, unit, text)


def _watched(tool: list[str], setting: Setting, size: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the main kernels under `tool`. The output is also printed by this process."""
    command = [sys.executable, "-m", "fastformer.benchmarking.gpu.main_kernels", setting.device.type, size]
    try:
        done = subprocess.run(
            [*tool, *command],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(setting.left, 0.0),
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -1, "no time left")
    print(done.stdout, flush=True)
    return done


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:200] if lines else "it printed nothing"


def _launches() -> Iterator[Launch]:
    return (call for size in SIZES for call in calls(torch.device("meta"), size))


STEP = Step("sanitizer", "compute-sanitizer's errors and races, ncu's figures", 25, _run, _launches)
