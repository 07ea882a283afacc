"""Peak memory of a peer's run.

On a GPU the most that tensors held, by PyTorch's allocator. On a CPU the growth of the resident set (Linux) of a fresh
process that does nothing else.
"""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import torch

from fastformer.benchmarking.timing import Run

MemoryOf = Literal["run", "everything"]
"""What a run takes beyond what is there before it (weights, inputs); or that too."""


def peak_mebibytes(
    study: str, case: str, peer: str, memory: MemoryOf, device: torch.device, quick: bool = False
) -> float:
    """MiB that a case takes in the hands of a peer; on a CPU measured in a process of its own.

    Raises:
        RuntimeError: the process failed; the message has its error.
    """
    if device.type == "cuda":  # its allocator counts exactly, whatever was there before
        return measure_here(study, case, peer, memory, device, quick)
    command = [
        sys.executable,
        "-m",
        "fastformer.benchmarking.memory",
        study,
        case,
        peer,
        memory,
        str(device),
        "quick" if quick else "full",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{peer} failed in {study}, {case}: {done.stderr.strip()[-2000:]}")
    return float(done.stdout.split()[-1])


def measure_here(study: str, case: str, peer: str, memory: MemoryOf, device: torch.device, quick: bool) -> float:
    """The same in this process, which on a CPU must not have done anything of the kind before."""
    from fastformer.benchmarking.studies import load
    from fastformer.benchmarking.study import Setting, TimedStudy

    loaded = load(study)
    if not isinstance(loaded, TimedStudy):
        raise ValueError(f"study must have timed cases, got {study!r}")
    # What is imported and compiled late is no memory of the work: on a CPU something small is done before.
    if device.type != "cuda":
        small = next(each for each in loaded.cases(Setting(device, quick=True)) if peer in each.peers)
        small.peers[peer].prepare()()
    found = next(each for each in loaded.cases(Setting(device, quick)) if each.name == case)
    at_start = _held(device)
    run = found.peers[peer].prepare()
    if device.type == "cuda":
        run()
    if memory == "run":
        return peak_of(run, device) / 2**20
    _forget_peak(device)
    run()
    return (_most_held(device) - at_start) / 2**20


def peak_of(run: Run, device: torch.device) -> int:
    """Bytes that a run takes beyond what is there before it; on a CPU what the process does."""
    before = _held(device)
    _forget_peak(device)
    run()
    return _most_held(device) - before


def _held(device: torch.device) -> int:
    """Bytes at present."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _of_process("VmRSS")


def _most_held(device: torch.device) -> int:
    """Bytes since the last `_forget_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _of_process("VmHWM")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def _of_process(field: str) -> int:
    """Bytes that Linux counts for this process."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise RuntimeError(f"memory of a process is measured on Linux, not on {sys.platform}")
    return int(re.findall(rf"{field}:\s+(\d+) kB", status.read_text())[0]) * 1024


def _main(study: str, case: str, peer: str, memory: MemoryOf, device: str, size: str) -> None:
    print(measure_here(study, case, peer, memory, torch.device(device), size == "quick"))


if __name__ == "__main__":
    _main(*sys.argv[1:])  # type: ignore[arg-type]
