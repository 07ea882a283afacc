"""Callbacks that kill their own process, as a power cut would, or send it a signal."""

import os
import signal
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Kill(Callback):
    """A callback that sends SIGKILL after optimizer step `step`, or in the middle of writing its checkpoint."""

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


class Send(Callback):
    """A callback that sends this process a signal in the hook of the given name, after `step` optimizer steps."""

    def __init__(self, number: int, hook: str, step: int = 0) -> None:
        self.number = number
        self.step = step
        setattr(self, hook, self._send)
        self._sent = 0

    def _send(self, trainer: Trainer, *arguments: Any, **options: Any) -> None:
        if trainer.global_step >= self.step and not self._sent:
            self._sent = 1
            os.kill(os.getpid(), self.number)


def _half_of_it_then_die(checkpoint: dict[str, Any], file: Any) -> None:
    file.write(b"PK" + bytes(1000))
    file.flush()
    _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
