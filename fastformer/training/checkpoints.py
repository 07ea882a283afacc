"""Checkpoints: written completely or not at all, found and checked before a run resumes from them."""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from fastformer.files import atomic_file

_NAME = re.compile(r"step-(\d+)\.ckpt")


WeightsFor = Callable[[dict[str, Any]], Mapping[str, torch.Tensor]]
_PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "global_step", "epoch")

_CHECKSUM = b"sha256:"
_COMMENT = len(_CHECKSUM) + 64
# The end record of a zip archive; its last two bytes are the length of the comment that follows.
_END = struct.Struct("<4s4H2LH")
_END_SIGNATURE = b"PK\5\6"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Reads and writes Lightning's checkpoint files: written under a temporary name, synced to disk, then renamed.

    Reading first checks the whole file, and unpickles only tensors and plain values, so a checkpoint cannot run code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; raise OSError with the file's name if that fails, leaving no partial file."""
        if storage_options is not None:
            raise TypeError(f"storage_options is not supported; got {storage_options!r}")
        save_checked(checkpoint, Path(path))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint; raise FileNotFoundError, or ValueError if the file is truncated or damaged."""
        check_checkpoint(Path(path))
        try:
            return super().load_checkpoint(path, map_location, True if weights_only is None else weights_only)
        except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"the checkpoint {path} cannot be read: {error}") from error


def save_checked(content: Any, path: Path) -> None:
    """Write what `torch.save` writes, with its SHA-256 as the comment of the zip archive; never a partial file.

    (The archive's own checksums cover only its parts, not their names and places.)

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    _set_folder_aside(path)
    with atomic_file(path) as file:
        summing = _Summing(file)
        try:
            torch.save(content, summing)  # type: ignore[arg-type]  # torch.save only calls write
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, under an error of torch.save's own
                raise error.__context__ from error
            raise
        file.seek(-2, 2)
        file.write(struct.pack("<H", _COMMENT) + _CHECKSUM + summing.digest.hexdigest().encode())


class _Summing:
    """A file to write into that also computes the SHA-256 of what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def check_checkpoint(path: Path) -> None:
    """Read all of a checkpoint and compare its checksum; for an older one without it, the checksums of its parts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or damaged.
    """
    if path.is_dir():
        raise ValueError(f"the checkpoint {path} is damaged: it is a folder")
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _END.size - _COMMENT))
        end = file.read()
        signed = len(end) == _END.size + _COMMENT and end.startswith(_END_SIGNATURE)
        if signed and end[_END.size :].startswith(_CHECKSUM):
            if end[_END.size + len(_CHECKSUM) :].decode(errors="replace") != _sum_of(file, size - _COMMENT - 2):
                _check_parts(path)  # its error says more, if it finds the damaged part
                raise ValueError(f"the checkpoint {path} is damaged: its checksum does not match")
        elif end[-_END.size :].startswith(_END_SIGNATURE) and end.endswith(b"\0\0"):
            _check_parts(path)
        else:
            raise ValueError(f"the checkpoint {path} is truncated or damaged: its end is missing")


def _sum_of(file: IO[bytes], size: int) -> str:
    """Return the SHA-256 of the first `size` bytes of a file, followed by the length of an empty comment."""
    digest = hashlib.sha256()
    file.seek(0)
    while size and (block := file.read(min(size, 1 << 20))):
        digest.update(block)
        size -= len(block)
    digest.update(b"\0\0")
    return digest.hexdigest()


def _check_parts(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    # A damaged directory raises many kinds of errors: a part may seem to be compressed, encrypted, or elsewhere.
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"the checkpoint {path} is truncated or damaged: {error}") from error
    if damaged is not None:
        raise ValueError(f"the checkpoint {path} is damaged: the checksum of its part {damaged} does not match")


def _set_folder_aside(path: Path) -> None:
    """Rename a folder that is in the place of the file."""
    if path.is_dir():
        free = next(name for number in count(1) if not (name := path.with_name(f"{path.name}.{number}")).exists())
        path.rename(free)
        warnings.warn(f"{path} was a folder, which is now named {free.name}", stacklevel=2)


def latest_checkpoint(folder: Path, weights_for: WeightsFor | None = None, run: str | None = None) -> Path | None:
    """Return the newest good checkpoint in `folder`, None if none was written yet; warn of each one that is skipped.

    Args:
        folder: the folder of the checkpoints.
        weights_for: returns the names and shapes of the weights that a checkpoint must have, given its content; it may
            raise ValueError. None leaves the content unchecked.
        run: id of the run that the checkpoint must belong to; None if unknown.

    Raises:
        ValueError: there are checkpoints, but all are damaged or belong to other runs.
    """
    checkpoints = _newest_first(folder)
    for path in checkpoints:
        try:
            check_checkpoint(path)
            if weights_for is not None:
                _check_content(path, weights_for, run)
            return path
        except (ValueError, OSError) as error:
            warnings.warn(f"{error}; the one before it is tried", stacklevel=2)
    if checkpoints:
        names = ", ".join(path.name for path in checkpoints)
        raise ValueError(f"no checkpoint in {folder} is undamaged and from this run: {names}")
    return None


def _check_content(path: Path, weights_for: WeightsFor, run: str | None) -> None:
    """Raise ValueError if an undamaged checkpoint is not from this run, by its run id, its step or its weights."""
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"the checkpoint {path} cannot be read: {error}") from error
    missing = [part for part in _PARTS if not isinstance(content, dict) or part not in content]
    if missing:
        raise ValueError(f"the checkpoint {path} is not from a training run: it has no {', '.join(missing)}")
    if run is not None and content.get("run") != run:
        raise ValueError(f"the checkpoint {path} is not this run's: it belongs to another run")
    if content["global_step"] != _step(path):
        raise ValueError(f"the checkpoint {path} is not this run's: its content is from step {content['global_step']}")
    try:
        expected = {name: weight.shape for name, weight in weights_for(content).items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint {path} is not this run's: {error}") from error
    try:
        found = {name: weight.shape for name, weight in content["state_dict"].items()}
    except AttributeError as error:
        raise ValueError(f"the checkpoint {path} is not this run's: its weights are not tensors") from error
    other = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if other:
        more = f" and {len(other) - 1:,} more" if other[1:] else ""
        raise ValueError(f"the checkpoint {path} is not this run's: its weights differ in {other[0]}{more}")


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint file in `folder`, damaged or not; None if there is none."""
    return next((path for path in _newest_first(folder) if path.is_file()), None)


class StepCheckpoint(Checkpoint):
    """Save ``step-N.ckpt`` after every `every` optimizer steps and after the last one, and keep the newest `keep`.

    It never saves inside an optimizer step, because a checkpoint does not hold accumulated gradients.
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
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save a checkpoint of the current step, and remove the oldest ones."""
        step = trainer.global_step
        trainer.save_checkpoint(checkpoint_of(self.folder, step))
        if trainer.is_global_zero:
            # Checkpoints of later steps are damaged: the resumed run has skipped them.
            past = [path for path in _newest_first(self.folder) if path.is_file() and _step(path) <= step]
            for path in past[self.keep :]:
                path.unlink()


class ValidationCheckpoint(StepCheckpoint):
    """Save after every validation, so that decisions made by it (early stopping) are in the checkpoint.

    A validation may fall inside an optimizer step if a run was resumed with another ``accumulate``: then it saves after
    that step.
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
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self._between_steps:
            self._due = True
        else:
            self.save(trainer)


def checkpoint_of(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of this optimizer step."""
    return folder / f"step-{step:07d}.ckpt"


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("*.ckpt") if _NAME.fullmatch(path.name)), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
