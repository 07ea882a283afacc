"""Runs of the command in separate processes. They start quickly: they are forked from one that has imported it."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Sequence
from multiprocessing.process import BaseProcess

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["fastformer.commands.pretrain", "fastformer.training.samples", "fastformer.commands.finetune"]
)


def start(arguments: Sequence[str], ranks: int = 1, group: bool = False) -> list[BaseProcess]:
    """Start the command line in `ranks` processes, which find each other as those of torchrun do.

    With `group`, each process is the leader of its own process group.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0}
    processes = []
    for rank in range(ranks):
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
        process = _CONTEXT.Process(target=_run, args=(list(arguments), environment, group))
        process.start()
        processes.append(process)
    return processes


def finish(processes: Sequence[BaseProcess], seconds: float = 120.0) -> None:
    """Wait for all processes, and check that they ended well."""
    for process in processes:
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def _run(arguments: list[str], environment: dict[str, object], group: bool) -> None:
    import torch
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from fastformer import cli

    if group:
        os.setpgid(0, 0)
    os.environ.update({name: str(value) for name, value in environment.items()})
    rank_zero_only.rank = int(os.environ.get("RANK", 0))  # it was set at import, before the fork
    torch.set_num_threads(1)
    raise SystemExit(cli.main(arguments))
