"""Peak memory of a peer's run.

On a GPU the most that tensors held, by PyTorch's allocator. On a CPU the growth of the resident set (Linux) of a fresh
process that does nothing else.
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
"""What a run takes beyond what is there before it (weights, inputs); or that too."""


def peak_mebibytes(run: Callable[[], Run], memory: MemoryOf, device: torch.device) -> float:
    """MiB that a run takes, here; on a CPU nothing of the kind may have been done in this process before.

    Args:
        run: makes the run.
        memory: what counts.
        device: where the run works.
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
