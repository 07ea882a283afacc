"""Cases of the operators that all benchmarks share."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from fastformer.benchmarking.gpu.rates import BACKWARD, FORWARD, Case
from fastformer.benchmarking.operations import Operation, Sizes, operations


def operator_cases(
    names: tuple[str, ...],
    sizes: Sizes,
    device: torch.device,
    compiled: bool,
    phases: tuple[str, ...] = (FORWARD, BACKWARD),
    memory: bool = False,
) -> Iterator[Case]:
    """Yield the cases of the operators whose names begin with one of `names`.

    Args:
        names: beginnings of operators' names.
        sizes: the sizes of the operators.
        device: the device that does the work.
        compiled: whether the eager function with torch.compile is a peer.
        phases, memory: see `Case`.
    """
    for operation in operations(sizes):
        if operation.name.startswith(names):
            yield _case(operation, sizes, device, compiled, phases, memory)


def _case(
    operation: Operation, sizes: Sizes, device: torch.device, compiled: bool, phases: tuple[str, ...], memory: bool
) -> Case:
    return Case(
        operation.name,
        operation.peers(sizes, device, compiled),
        operation.least(sizes),
        None if operation.random else partial(operation.exactly, sizes, device),
        phases=phases,
        memory=memory,
    )
