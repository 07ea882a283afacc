"""A step of the GPU benchmark, its settings, and its records."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Launch = Callable[[], object]
"""A call of Fastformer with tensors on the device ``meta``."""


@dataclass(frozen=True)
class Setting:
    """The settings of a run of a step.

    Attributes:
        device: the device that does the work.
        dry: whether to use tiny sizes on a CPU, which only check that every line runs. Kernels run in Triton's
            interpreter, on CPU tensors. If that takes too long, a step uses ``fastformer.backend("torch")``.
        out: the folder for files other than the records: pictures, logs, tables.
        deadline: the `time.monotonic()` at which the step's process is ended.
    """

    device: torch.device
    dry: bool
    out: Path
    deadline: float

    @property
    def left(self) -> float:
        """Seconds until the deadline. A step does its most valuable work first, and stops by itself in time."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Record:
    """A finding, written to disk as soon as a step yields it.

    Attributes:
        case: the work. Together with `peer` and `metric` it is unique in its step.
        peer: the peer that did it: "fastformer", "SDPA cuDNN", ...
        metric: the metric: "forward", "error", "tokens per second", ...
        value: the figure; None if there is none, for the reason in `missing`.
        unit: the unit of the value: "TFLOP/s", "us", ... A higher value is better for units per second ("GB/s") and for
            shares ("%"); a lower value is better for all others. The table shows TFLOP/s and GB/s also as shares of the
            measured ceiling.
        missing: the reason why there is no value: not installed, refused, an error's first line.
        details: more data that can be written as JSON: spread, repeats, launch configuration.
    """

    case: str
    peer: str
    metric: str
    value: float | None
    unit: str
    missing: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A part of the GPU benchmark that runs in a separate process.

    Attributes:
        name: the name on the command line.
        title: a line that says what the step measures.
        seconds: the most seconds that it may take in a run of nine minutes. Other runs scale them to their minutes.
        run: does the work, and yields each record as soon as it is measured.
        launches: yields one function for each call of Fastformer that `run` makes at full size, backward included, with
            tensors on the device ``meta`` of the same shapes, dtypes and strides, and with the same launch
            configurations. They tell `fastformer kernels compile --bench-gpu STEP` which kernels to compile. Peers are
            left out. None if the step calls no kernel.
    """

    name: str
    title: str
    seconds: float
    run: Callable[[Setting], Iterator[Record]]
    launches: Callable[[], Iterator[Launch]] | None = None
