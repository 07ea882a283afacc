"""The peak memory of a run."""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class PeakMemory(Callback):
    """Log ``train/peak_memory``, the most bytes the first rank has used so far, with each optimizer step."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        peak = peak_memory(pl_module.device)
        if peak is not None:
            # A tensor, because Lightning would copy a Python number to the GPU and wait for it.
            pl_module.log("train/peak_memory", torch.tensor(float(peak)), on_step=True, batch_size=1)


def peak_memory(device: torch.device) -> int | None:
    """Return the peak memory in bytes: of tensors on a GPU, or of the process on a CPU; None if it is not measured."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
