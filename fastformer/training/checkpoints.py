"""Checkpoints that are whole or absent, and are found and checked before a run resumes from them."""

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
# The end of a zip archive, of which the last two bytes are the length of the comment that follows.
_END = struct.Struct("<4s4H2LH")
_END_SIGNATURE = b"PK\5\6"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written to a temporary name, forced to the disk and then renamed.

    Reading checks the whole file first and unpickles tensors and plain values alone: a checkpoint runs no code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises OSError, naming the file, where it cannot be written; then nothing of it remains."""
        if storage_options is not None:
            raise TypeError(f"storage_options is not supported; got {storage_options!r}")
        save_checked(checkpoint, Path(path))

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Raises FileNotFoundError, or ValueError where the file is cut short or damaged."""
        check_checkpoint(Path(path))
        try:
            return super().load_checkpoint(path, map_location, True if weights_only is None else weights_only)
        except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"the checkpoint {path} cannot be read: {error}") from error


def save_checked(content: Any, path: Path) -> None:
    """What `torch.save` writes, with its SHA-256 as the comment of the zip archive; whole or not at all.

    (The archive's own checksums are of its parts alone: not of their names, and places.)

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    _set_folder_aside(path)
    with atomic_file(path) as file:
        summing = _Summing(file)
        try:
            torch.save(content, summing)  # type: ignore[arg-type]  # it writes, and does nothing else
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, under an error of torch.save's own
                raise error.__context__ from error
            raise
        file.seek(-2, 2)
        file.write(struct.pack("<H", _COMMENT) + _CHECKSUM + summing.digest.hexdigest().encode())


class _Summing:
    """Writes into a file, and sums up what."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def check_checkpoint(path: Path) -> None:
    """Read all of a checkpoint, and compare its checksum; of one from before there was any, those of its parts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut short or damaged.
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
                _check_parts(path)  # which says more, if it can
                raise ValueError(f"the checkpoint {path} is damaged: its checksum does not match")
        elif end[-_END.size :].startswith(_END_SIGNATURE) and end.endswith(b"\0\0"):
            _check_parts(path)
        else:
            raise ValueError(f"the checkpoint {path} is cut short or damaged: it has no end")


def _sum_of(file: IO[bytes], size: int) -> str:
    """The SHA-256 of so much of a file, and of an empty comment's length."""
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
    # What a damaged directory raises is of many kinds: a part may seem to be compressed, encrypted, or elsewhere.
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"the checkpoint {path} is cut short or damaged: {error}") from error
    if damaged is not None:
        raise ValueError(f"the checkpoint {path} is damaged: the checksum of its part {damaged} does not match")


def _set_folder_aside(path: Path) -> None:
    """A folder where a file belongs gets another name."""
    if path.is_dir():
        free = next(name for number in count(1) if not (name := path.with_name(f"{path.name}.{number}")).exists())
        path.rename(free)
        warnings.warn(f"{path} was a folder: it is {free.name} now", stacklevel=2)


def latest_checkpoint(folder: Path, weights_for: WeightsFor | None = None, run: str | None = None) -> Path | None:
    """The newest whole checkpoint in `folder`, None where none was written yet; warns of each one passed over.

    Args:
        folder: of the checkpoints.
        weights_for: names and shapes of the weights that one must have, from its content; it may raise ValueError. None
            leaves the content unchecked.
        run: that it must be of, where that is known.

    Raises:
        ValueError: there are checkpoints, and all are damaged, or not this run's.
    """
    checkpoints = _newest_first(folder)
    for path in checkpoints:
        try:
            check_checkpoint(path)
            if weights_for is not None:
                _check_content(path, weights_for, run)
            return path
        except (ValueError, OSError) as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    if checkpoints:
        names = ", ".join(path.name for path in checkpoints)
        raise ValueError(f"no checkpoint in {folder} is whole and this run's: {names}")
    return None


def _check_content(path: Path, weights_for: WeightsFor, run: str | None) -> None:
    """Raises ValueError for one that is whole, but not this run's, by what it says, by its step or its weights."""
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"the checkpoint {path} cannot be read: {error}") from error
    missing = [part for part in _PARTS if not isinstance(content, dict) or part not in content]
    if missing:
        raise ValueError(f"the checkpoint {path} is not one of a run: it has no {', '.join(missing)}")
    if run is not None and content.get("run") != run:
        raise ValueError(f"the checkpoint {path} is not this run's: it is another run's")
    if content["global_step"] != _step(path):
        raise ValueError(f"the checkpoint {path} is not this run's: it is of step {content['global_step']}")
    try:
        expected = {name: weight.shape for name, weight in weights_for(content).items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint {path} is not this run's: {error}") from error
    try:
        found = {name: weight.shape for name, weight in content["state_dict"].items()}
    except AttributeError as error:
        raise ValueError(f"the checkpoint {path} is not this run's: its weights are no tensors") from error
    other = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if other:
        more = f" and {len(other) - 1:,} more" if other[1:] else ""
        raise ValueError(f"the checkpoint {path} is not this run's: its weights differ in {other[0]}{more}")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest file in `folder`, whole or not; None where there is none."""
    return next((path for path in _newest_first(folder) if path.is_file()), None)


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
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save one of the step at hand."""
        step = trainer.global_step
        trainer.save_checkpoint(checkpoint_of(self.folder, step))
        if trainer.is_global_zero:
            # Those of later steps are damaged ones, which a resumed run has passed over.
            past = [path for path in _newest_first(self.folder) if path.is_file() and _step(path) <= step]
            for path in past[self.keep :]:
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
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self._between_steps:
            self._due = True
        else:
            self.save(trainer)


def checkpoint_of(folder: Path, step: int) -> Path:
    """The file of the checkpoint that is made after this optimizer step."""
    return folder / f"step-{step:07d}.ckpt"


def _newest_first(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("*.ckpt") if _NAME.fullmatch(path.name)), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
