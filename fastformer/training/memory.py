"""How much memory a run has taken."""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class PeakMemory(Callback):
    """Logs ``train/peak_memory``, the most bytes that the first rank has held so far, with each optimizer step."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        peak = peak_memory(pl_module.device)
        if peak is not None:
            # A tensor: of a number Lightning would make one on the GPU, and wait for it.
            pl_module.log("train/peak_memory", torch.tensor(float(peak)), on_step=True, batch_size=1)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes of a GPU's memory that tensors have held, or of the process on a CPU; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
