"""A function run by several processes at once, that can talk to each other by `torch.distributed`."""

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
    """How many can have a GPU, or a core, of their own."""
    if device.type == "cuda":
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(work: Callable[..., Any], processes: int, device: torch.device, *arguments: Any) -> Any:
    """What ``work(device, *arguments)`` returns in the first of `processes`, each with a GPU or one thread of its own.

    Args:
        work: a function of a module, that every process calls; what it returns goes through JSON.
        processes: how many.
        device: of which type their devices are.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them failed.
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
