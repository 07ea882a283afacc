"""Times of a training step divided among processes by DDP, and of its parts: a share alone, the gradient exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.distributed
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from fastformer.benchmarking.processes import in_processes
from fastformer.benchmarking.timing import Run, seconds_of, threads
from fastformer.benchmarking.training_steps import Shape, counted, training_step


@dataclass(frozen=True)
class DataParallelSteps:
    """Seconds of a step or of a part of it, one value for each round, by the number n of processes.

    Attributes:
        share: one process alone, with 1/n of the tokens.
        processes: n processes, 2 or more, together.
        threads: one process with n threads, on a CPU.
        exchange: the sum of all gradients over n processes.
    """

    share: dict[int, list[float]]
    processes: dict[int, list[float]]
    threads: dict[int, list[float]]
    exchange: dict[int, list[float]]


def data_parallel_steps(shape: Shape, most: int, device: torch.device, rounds: int) -> DataParallelSteps:
    """Measure a step of `shape` by 1, 2, 4, ... processes up to `most`, in turns."""
    found = in_processes(_measure, 1 << (most.bit_length() - 1), device, shape, rounds)
    return DataParallelSteps(
        **{part: {int(count): seconds for count, seconds in counts.items()} for part, counts in found.items()}
    )


@dataclass(frozen=True)
class _Turn:
    """A part of a step that `count` processes do together. `run` is None if this process does not take part."""

    part: str
    count: int
    run: Run | None
    group: ProcessGroup | None = None


def _measure(device: torch.device, shape: Shape, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Measure all turns in this process. A process that takes no part in a turn waits for the others."""
    turns = _turns(device, shape)
    found = DataParallelSteps({}, {}, {}, {})
    for number in range(rounds + 1):
        for turn in turns:
            torch.distributed.barrier()
            seconds = seconds_of(partial(_take, turn), 1, device)
            values = getattr(found, turn.part).setdefault(turn.count, [])
            if number:  # the first round warms up
                values.append(seconds)
    return asdict(found)


def _take(turn: _Turn) -> None:
    if turn.run is not None:
        turn.run()
        if turn.group is not None:
            torch.distributed.barrier(turn.group)


def _turns(device: torch.device, shape: Shape) -> list[_Turn]:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    turns = []
    for count in (1 << exponent for exponent in range(size.bit_length())):
        share = replace(shape, tokens=shape.tokens // count)
        turns.append(_Turn("share", count, _if(rank == 0, partial(training_step, share, device))))
        if count == 1:
            continue
        if device.type == "cpu":
            turns.append(_Turn("threads", count, _if(rank == 0, partial(_threaded, count, shape, device))))
        group = torch.distributed.new_group(list(range(count)))
        parallel = partial(DistributedDataParallel, process_group=group)
        step = _if(rank < count, partial(training_step, share, device, parallel))
        exchange = _if(rank < count, partial(_exchange, shape, device, group))
        turns += [_Turn("processes", count, step, group), _Turn("exchange", count, exchange, group)]
    return turns


def _if(takes_part: bool, prepare: Callable[[], Run]) -> Run | None:
    return prepare() if takes_part else None


def _exchange(shape: Shape, device: torch.device, group: ProcessGroup) -> Run:
    gradients = torch.zeros(counted(shape).parameters, device=device)
    return partial(torch.distributed.all_reduce, gradients, group=group)


def _threaded(number: int, shape: Shape, device: torch.device) -> Run:
    step = training_step(shape, device)

    def run() -> object:
        with threads(number):
            return step()

    return run
