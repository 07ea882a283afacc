"""Peak memory of a peer's run.

On a GPU it is the most that tensors held, as counted by PyTorch's allocator. On a CPU it is the growth of the resident
set (Linux) of a new process that does nothing else.
"""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from fastformer.benchmarking.timing import Run

MemoryOf = Literal["run", "everything"]
"""The memory to measure: what a run adds to the memory in use before it (weights, inputs), or everything."""


def peak_mebibytes(run: Callable[[], Run], memory: MemoryOf, device: torch.device) -> float:
    """Peak MiB of a run in this process. On a CPU the process must not have done similar work before.

    Args:
        run: prepares the run.
        memory: the memory that counts.
        device: the device that does the work.
    """
    at_start = _held(device)
    work = run()
    if device.type == "cuda":
        work()
    if memory == "run":
        return peak_of(work, device) / 2**20
    _forget_peak(device)
    work()
    return (_most_held(device) - at_start) / 2**20


def peak_of(run: Run, device: torch.device) -> int:
    """Bytes that a run adds at its peak to the memory in use before it: of tensors (GPU) or of the process (CPU)."""
    before = _held(device)
    _forget_peak(device)
    run()
    return _most_held(device) - before


def _held(device: torch.device) -> int:
    """Bytes in use now."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _of_process("VmRSS")


def _most_held(device: torch.device) -> int:
    """The most bytes in use since the last `_forget_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _of_process("VmHWM")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def _of_process(field: str) -> int:
    """Bytes in a field of this process's status in Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise RuntimeError(f"memory of a process can be measured only on Linux, not on {sys.platform}")
    return int(re.findall(rf"{field}:\s+(\d+) kB", status.read_text())[0]) * 1024
