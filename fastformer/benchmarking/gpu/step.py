"""What a step of the GPU benchmark is, and what it finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Launch = Callable[[], object]
"""A call of Fastformer on tensors of device ``meta``."""


@dataclass(frozen=True)
class Setting:
    """How a step is to be run.

    Attributes:
        device: where the work is done.
        dry: tiny sizes on a CPU, to see that every line runs; its figures mean nothing. Kernels run in Triton's
            interpreter, on CPU tensors; a step that takes too long so uses ``fastformer.backend("torch")``.
        out: folder for files beside the records: pictures, logs, tables.
        deadline: `time.monotonic()` at which the step's process is ended.
    """

    device: torch.device
    dry: bool
    out: Path
    deadline: float

    @property
    def left(self) -> float:
        """Seconds until the deadline. A step does its most valuable work first and stops in time by itself."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Record:
    """One finding, written to disk the moment a step yields it.

    Attributes:
        case: what was done, unique in its step together with `peer` and `metric`.
        peer: who did it: "fastformer", "SDPA cuDNN", ...
        metric: what was measured: "forward", "error", "tokens per second", ...
        value: the figure; None where there is none, and `missing` says why.
        unit: of the value: "TFLOP/s", "us", ... More is better of what is per second ("GB/s") or a share ("%"), less of
            all else. The table adds what share of the measured ceiling TFLOP/s and GB/s are.
        missing: why there is no value: not installed, refused, an error's first line.
        details: whatever else belongs to it and can be written as JSON: spread, repeats, launch configuration.
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
    """A part of the GPU benchmark, run in a process of its own.

    Attributes:
        name: for the command line.
        title: a line that says what it measures.
        seconds: how long it may take of nine minutes; scaled to the minutes that were given.
        run: does the work and yields what it finds, as it is found.
        launches: the same calls of Fastformer as `run` makes at full size, backwards included, on tensors of device
            ``meta``: same shapes, dtypes, strides and launch configurations, one callable for each call. They tell
            `fastformer kernels compile --bench-gpu STEP` what to compile beforehand. Peers are left out; None where the
            step calls no kernel.
    """

    name: str
    title: str
    seconds: float
    run: Callable[[Setting], Iterator[Record]]
    launches: Callable[[], Iterator[Launch]] | None = None
