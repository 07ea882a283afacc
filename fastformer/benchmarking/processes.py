"""Run a function in several processes at once, which can communicate by `torch.distributed`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing


def most_processes(device: torch.device) -> int:
    """The number of processes that can each have their own GPU, or their own CPU core."""
    if device.type == "cuda":
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(work: Callable[..., Any], processes: int, device: torch.device, *arguments: Any) -> Any:
    """Call ``work(device, *arguments)`` in `processes` processes, and return the result of the first one.

    Each process has its own GPU or, on a CPU, one thread.

    Args:
        work: a function of a module. Its result is passed on as JSON.
        processes: the number of processes.
        device: a device of the type to use.
        arguments: further arguments of `work`.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _process, (work, processes, device.type, folder, arguments), nprocs=processes, start_method="spawn"
        )
        return json.loads((Path(folder) / "result.json").read_text())


def _process(
    rank: int, work: Callable[..., Any], processes: int, device_type: str, folder: str, arguments: tuple[Any, ...]
) -> None:
    gpu = device_type == "cuda"
    device = torch.device(device_type, rank) if gpu else torch.device(device_type)
    if gpu:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", processes)
    torch.distributed.init_process_group("nccl" if gpu else "gloo", store=store, rank=rank, world_size=processes)
    try:
        result = work(device, *arguments)
        if rank == 0:
            (Path(folder) / "result.json").write_text(json.dumps(result))
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
