"""End a training run on a signal, with a checkpoint, so that it can be resumed."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from fastformer.stopping import STATUS, Stopped

_AGREE_EVERY = 10
"""Optimizer steps between two checks, by all processes together, for a stop request: a check takes time."""


class Saves(Protocol):
    """A callback that writes a run's checkpoints."""

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint now, after an optimizer step."""


class StopOnSignal(Checkpoint):
    """Ends a command on SIGINT, SIGTERM or SIGUSR1 by raising `Stopped`.

    During training, this happens with a checkpoint after the current optimizer step, or after the validation that is
    due or running. On a second signal, and outside training, it happens at once. Processes that train together stop
    together.

    It is a context manager that catches signals inside it. If the raised error is lost, as in a destructor, or replaced
    by another error, the run still ends: after the next optimizer step, or at the end of the context. (It derives from
    Lightning's Checkpoint because those callbacks run last.)

    Attributes:
        saves: the callback that saves checkpoints.
    """

    saves: Saves

    def __init__(self) -> None:
        self._requested: int | None = None
        self._raised = False
        self._training = False
        self._process = os.getpid()

    def __enter__(self) -> StopOnSignal:
        self._before = {name: signal.getsignal(getattr(signal, name)) for name in STATUS if hasattr(signal, name)}
        self._listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for name, handler in self._before.items():
                signal.signal(getattr(signal, name), handler)
        if self._requested is not None and (error is None or (self._raised and isinstance(error, Exception))):
            raise Stopped(self._requested) from error

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():  # other threads may not
            for name in self._before:
                signal.signal(getattr(signal, name), self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked loader process
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self._training and self._requested is None:
            self._requested = number
        else:
            self._requested, self._raised = number, True
            raise Stopped(number)

    # --- In training --------------------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()  # Lightning has installed its own handlers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()
        self._training, self._step, self._between_steps = True, trainer.global_step, False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._between_steps = trainer.global_step == self._step
        if self._between_steps:
            return
        self._step = trainer.global_step
        alone = trainer.world_size == 1
        if trainer.should_stop or _is_validated(trainer) or not (alone or self._step % _AGREE_EVERY == 0):
            return
        self._stop_if_requested(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training and trainer.state.fn == "fit" and not (trainer.should_stop or self._between_steps):
            self._stop_if_requested(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = False
        if self._requested is not None:  # everything is saved already
            raise Stopped(self._requested)

    def _stop_if_requested(self, trainer: Trainer) -> None:
        requested = self._requested is not None
        if trainer.world_size > 1:
            requested = trainer.strategy.reduce_boolean_decision(requested, all=False)
        if requested:
            self.saves.save(trainer)
            raise Stopped(self._requested or signal.SIGTERM)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._training = False
        if self._requested is not None and "DataLoader worker" in str(exception):
            raise Stopped(self._requested) from exception  # the loader processes got the signal too, and ended


def _is_validated(trainer: Trainer) -> bool:
    """Whether Lightning validates after this step."""
    return trainer.enable_validation and (trainer.fit_loop.total_batch_idx + 1) % int(trainer.val_check_batch or 1) == 0
