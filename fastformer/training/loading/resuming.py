"""Where a run is in its batches, on whatever numbers of ranks it has trained so far."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, Dataset


class ResumableDataModule(LightningDataModule):
    """A data module whose training batches go on where the trainer stands, also in the middle of an epoch.

    The batches of all ranks together are one sequence, the same for any number of ranks, of which rank r of n takes
    every n-th from the r-th on; ranks are those of `data_rank`. How many batches a rank has been trained on is in
    Lightning's progress; from which of them on there were how many ranks is in the data module's own state.
    """

    num_workers: int
    """Processes that prepare batches; 0 prepares them in the training process."""

    def __init__(self) -> None:
        super().__init__()
        self._ranks: list[tuple[int, int]] = []  # from how many batches of each rank on there were how many ranks

    def rank(self) -> tuple[int, int]:
        """That of `data_rank`."""
        return (0, 1) if self.trainer is None else data_rank(self.trainer)

    def batches_done(self) -> tuple[int, int]:
        """The number of batches this rank has been trained on, in all and in this epoch.

        Lightning's count of epochs is of no use here: resumed from a checkpoint written at the end of one, with
        `max_steps` set, it counts that one twice.
        """
        if self.trainer is None:
            return 0, 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return progress.total.completed, progress.current.completed

    def batches_of_all_ranks(self) -> int:
        """The number of batches that all ranks together have been trained on.

        Notes from where on there are as many ranks as now.
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
        """How many batches of this rank an epoch has, that is to have so many: its optimizer steps are whole ones.

        Where the last one would not be, the epoch runs on into the batches of the next, so that steps and epochs are
        the same for any number of ranks, and whatever counts batches never stops in the middle of a step.
        """
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        return -(-batches // accumulate) * accumulate

    def step_sizes(self, epoch: int) -> Iterator[int]:
        """Of how many batches each optimizer step from here on takes its gradients.

        Args:
            epoch: this rank's batches in an epoch; where the trainer limits them, the last step has the rest.
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
        """PyTorch's loader: of each of `batches` what `dataset` has of it, put together by `collate`.

        In pinned memory where it goes to a GPU, which is then not waited for.
        """
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=self.num_workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            worker_init_fn=_leave_signals if self.num_workers else None,
            generator=torch.Generator(),  # leaves the global one alone, on which a resumed run's dropout depends
        )

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": [list(entry) for entry in self._ranks]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ranks = [(start, size) for start, size in state_dict["ranks"]]


def data_rank(trainer: Trainer) -> tuple[int, int]:
    """Which share of the batches this process trains on, and how many shares there are.

    Processes that compute the same batches together, by tensor parallelism, have the same rank here.
    """
    share = trainer.distributed_sampler_kwargs
    return (0, 1) if share is None else (share["rank"], share["num_replicas"])


def check_workers(num_workers: int) -> None:
    """Raises ValueError for more processes to prepare batches than this machine starts in reasonable time."""
    processors = os.cpu_count() or 1
    most = max(8, 4 * processors)
    if not 0 <= num_workers <= most:
        raise ValueError(
            f"num_workers must be from 0 to {most} on this machine, of {processors} processors; got {num_workers}"
        )


def _leave_signals(worker: int) -> None:
    """A signal to all processes is for the one that trains: it still needs the batches of its step."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
