"""A callback that kills its own process, as a power cut would: for runs in a process of their own."""

import os
import signal
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Kill(Callback):
    """SIGKILL after optimizer step `step`, or half-way through writing the checkpoint of that step."""

    def __init__(self, step: int, while_writing: bool = False) -> None:
        self.step = step
        self.while_writing = while_writing

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step < self.step:
            return
        if self.while_writing:
            torch.save = _half_of_it_then_die
        else:
            _die()


def _half_of_it_then_die(checkpoint: dict[str, Any], file: Any) -> None:
    file.write(b"PK" + bytes(1000))
    file.flush()
    _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
