"""Times work on a GPU for the measurement of launch configurations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastformer.tuning.measurement import Timer


# Of measuring a configuration.
_SECONDS = 0.03


def event_timer(device: torch.device) -> Timer:
    """Times the GPU's work by events."""
    from fastformer.benchmarking.gpu.timing import timed

    return lambda runs: timed(runs, device, _SECONDS).median
