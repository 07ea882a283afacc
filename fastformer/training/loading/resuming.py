"""The position of a run in its batches, also after changes of the number of ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset


class ResumableDataModule(LightningDataModule):
    """A data module whose training batches continue at the trainer's position, also in the middle of an epoch.

    The batches of all ranks together form one sequence, which does not depend on the number of ranks. Rank r of n takes
    every n-th batch from number r on; `data_rank` defines the ranks. Lightning's progress counts the batches a rank has
    been trained on. The history of (first batch, number of ranks) is kept in this module's state.
    """

    num_workers: int
    """Processes that prepare batches; 0 prepares them in the training process."""

    def __init__(self) -> None:
        super().__init__()
        self._ranks: list[tuple[int, int]] = []  # (first batch of a rank, number of ranks from there on)

    def rank(self) -> tuple[int, int]:
        """Return this process's `data_rank`, or (0, 1) without a trainer."""
        return (0, 1) if self.trainer is None else data_rank(self.trainer)

    def batches_done(self) -> tuple[int, int]:
        """Return the number of batches this rank has been trained on, in all and in this epoch.

        Lightning's count of epochs cannot be used: with `max_steps`, a run resumed from a checkpoint at the end of an
        epoch counts that epoch twice.
        """
        if self.trainer is None:
            return 0, 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return progress.total.completed, progress.current.completed

    def batches_of_all_ranks(self) -> int:
        """Return the number of batches that all ranks together have been trained on.

        If the number of ranks has changed, this is added to the history.
        """
        of_this_rank, world_size = self.batches_done()[0], self.rank()[1]
        if not self._ranks:
            self._ranks = [(0, world_size)]
        if self._ranks[-1][1] != world_size:
            self._ranks = [*(entry for entry in self._ranks if entry[0] < of_this_rank), (of_this_rank, world_size)]
        starts, sizes = zip(*self._ranks, strict=True)
        return sum(
            size * (end - start) for start, end, size in zip(starts, [*starts[1:], of_this_rank], sizes, strict=True)
        )

    def epoch(self, batches: int) -> int:
        """Return `batches`, the batches of this rank in an epoch, rounded up to whole optimizer steps.

        The last step takes its missing batches from the next epoch. Steps and epochs are then the same for any number
        of ranks, and nothing that counts batches stops in the middle of a step.
        """
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return -(-batches // accumulate) * accumulate

    def step_sizes(self, epoch: int) -> Iterator[int]:
        """Yield the number of batches in each remaining optimizer step of the epoch.

        Args:
            epoch: this rank's batches in an epoch; if the trainer limits them, the last step may be smaller.
        """
        size, end = 1, epoch
        if self.trainer is not None:
            size, end = self.trainer.accumulate_grad_batches, int(min(end, self.trainer.num_training_batches))
        begin = self.batches_done()[1]
        while begin < end:
            step = min(size - begin % size, end - begin)
            yield step
            begin += step

    def load(self, dataset: Dataset[Any], batches: Iterable[Any], collate: Callable[[Any], Any]) -> DataLoader[Any]:
        """Return PyTorch's loader, which reads each of `batches` from `dataset` and applies `collate`.

        Batches for a GPU are in pinned memory, so that copying them does not block.
        """
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            worker_init_fn=_leave_signals if self.num_workers else None,
            generator=torch.Generator(),  # keeps the global generator unchanged: a resumed run's dropout depends on it
        )

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": [list(entry) for entry in self._ranks]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ranks = [(start, size) for start, size in state_dict["ranks"]]


def data_rank(trainer: Trainer) -> tuple[int, int]:
    """Return the rank of this process among those that share the batches, and their number.

    Processes that compute the same batches together, by tensor parallelism, have the same rank here.
    """
    share = trainer.distributed_sampler_kwargs
    return (0, 1) if share is None else (share["rank"], share["num_replicas"])


def check_workers(num_workers: int) -> None:
    """Raise ValueError if this machine could not start so many loader processes in reasonable time."""
    processors = os.cpu_count() or 1
    most = max(8, 4 * processors)
    if not 0 <= num_workers <= most:
        raise ValueError(
            f"num_workers must be from 0 to {most} on this machine with {processors} processors; got {num_workers}"
        )


def _leave_signals(worker: int) -> None:
    """Ignore signals in a loader process: the training process handles them, and still needs its step's batches."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
