"""The machine: device, clocks, versions, and the two ceilings that all other figures are compared with."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict

from fastformer.benchmarking.environment import environment
from fastformer.benchmarking.gpu.ceilings import Ceiling, copy_ceiling, matrix_ceiling
from fastformer.benchmarking.gpu.findings import CEILING
from fastformer.benchmarking.gpu.step import Record, Setting, Step

# The values that nvidia-smi reads, and their units. Nothing is set.
_STATE = {
    "clocks.sm": "MHz",
    "clocks.mem": "MHz",
    "clocks.max.sm": "MHz",
    "power.draw": "W",
    "power.limit": "W",
    "temperature.gpu": "C",
}


def _run(setting: Setting) -> Iterator[Record]:
    found = environment(setting.device)
    yield Record("device", found.device, "memory", found.memory_gib, "GiB", details=asdict(found))
    yield from _state("at rest")
    yield _ceiling("matrix product, bf16", "torch.mm", matrix_ceiling(setting.device, setting.dry))
    yield from _state("after products")
    yield _ceiling("copy", "torch.copy_", copy_ceiling(setting.device, setting.dry))


def _state(when: str) -> Iterator[Record]:
    if shutil.which("nvidia-smi") is None:
        yield Record(when, "nvidia-smi", "clocks", None, "MHz", "not on the PATH")
        return
    query = ["nvidia-smi", f"--query-gpu={','.join(_STATE)}", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=10)
    values = done.stdout.strip().split(", ")
    if done.returncode or len(values) != len(_STATE):
        yield Record(when, "nvidia-smi", "clocks", None, "MHz", (done.stdout + done.stderr).strip()[:200])
        return
    for (name, unit), value in zip(_STATE.items(), values, strict=True):
        known = value.replace(".", "").isdigit()
        yield Record(when, "nvidia-smi", name, float(value) if known else None, unit, None if known else value)


def _ceiling(case: str, peer: str, found: Ceiling) -> Record:
    return Record(case, peer, CEILING, found.value, found.unit, details=asdict(found.timing))


STEP = Step("environment", "device, clocks, versions; the fastest matrix product and copy", 15, _run)
