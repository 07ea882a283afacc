"""Checkpoints that are whole or absent, and are found and checked before a run resumes from them."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from fastformer.data.files import atomic_file

_NAME = re.compile(r"step-(\d+)\.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written to a temporary name, forced to the disk and then renamed.

    Reading checks the whole file first and unpickles tensors and plain values alone: a checkpoint runs no code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises OSError, naming the file, where it cannot be written; then nothing of it remains."""
        if storage_options is not None:
            raise TypeError(f"storage_options is not supported; got {storage_options!r}")
        with atomic_file(Path(path)) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # a full disk, under an error of torch.save's own
                    raise error.__context__ from error
                raise

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Raises FileNotFoundError, or ValueError where the file is cut short or damaged."""
        check_checkpoint(Path(path))
        return super().load_checkpoint(path, map_location, True if weights_only is None else weights_only)


def check_checkpoint(path: Path) -> None:
    """Read a checkpoint's checksums.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut short or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"the checkpoint {path} is cut short or damaged: {error}") from error
    if damaged is not None:
        raise ValueError(f"the checkpoint {path} is damaged: the checksum of its part {damaged} does not match")


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, None where none was written yet; warns of each damaged one passed over.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    checkpoints = _newest_first(folder)
    for path in checkpoints:
        try:
            check_checkpoint(path)
            return path
        except ValueError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    if checkpoints:
        raise ValueError(f"no checkpoint in {folder} is whole: {', '.join(path.name for path in checkpoints)}")
    return None


class StepCheckpoint(Checkpoint):
    """Saves ``step-N.ckpt`` after every `every` optimizer steps and after the last one; the newest `keep` stay.

    Never between the optimizer steps: the gradients accumulated so far are in no checkpoint.
    """

    def __init__(self, folder: Path, every: int, keep: int = 2) -> None:
        self.folder = folder
        self.every = every
        self.keep = keep

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._step % self.every == 0 or trainer.should_stop:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:07d}.ckpt")
        if trainer.is_global_zero:
            for path in _newest_first(self.folder)[self.keep :]:
                path.unlink()


class ValidationCheckpoint(StepCheckpoint):
    """Saves after every validation, so that what was decided by it (to stop early) is in the checkpoint.

    After one between optimizer steps, as there is where a run was resumed with another ``accumulate``, it saves after
    the next step.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        super().__init__(folder, every=1, keep=keep)
        self._between_steps = self._due = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._between_steps = trainer.global_step == self._step
        self._step = trainer.global_step
        if self._due and not self._between_steps:
            self._due = False
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self._between_steps:
            self._due = True
        else:
            self._save(trainer)


def _newest_first(folder: Path) -> list[Path]:
    steps = {path: match for path in folder.glob("*.ckpt") if (match := _NAME.fullmatch(path.name))}
    return sorted(steps, key=lambda path: int(steps[path][1]), reverse=True)
