"""The output folder of a training command: which files belong to the run, who writes them, what may be removed."""

from __future__ import annotations

import json
import os
import socket
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from fastformer.console import json_text
from fastformer.files import atomic_file, remove

_LOGS = (
    *(f"logs/{logger}/version_[0-9]*/hparams.yaml" for logger in ("csv", "tensorboard")),
    "logs/csv/version_[0-9]*/metrics.csv",
    "logs/tensorboard/version_[0-9]*/events.out.tfevents.*",
)
_CHECKPOINTS = tuple(f"checkpoints/step-{'[0-9]' * digits}.ckpt" for digits in (7, 8, 9))


@dataclass(frozen=True)
class RunFolder:
    """The output folder of a training command.

    Its manifest lists the files a run writes, by names and patterns; only these files are ever removed. A run holds a
    lock while it writes.

    Attributes:
        path: the folder.
        kind: the kind of run, for error messages.
        others: names of files that this command writes in addition to those of every run.
    """

    path: Path
    kind: str
    others: tuple[str, ...] = ()
    _replaced: list[Path] = field(default_factory=list, init=False, repr=False)

    @property
    def config(self) -> Path:
        """The file with every option of the run."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The file with the metrics printed at the end."""
        return self.path / "metrics.json"

    @property
    def curve(self) -> Path:
        """The picture of the losses."""
        return self.path / "loss.png"

    @property
    def checkpoints(self) -> Path:
        """The folder of the newest checkpoints, to resume from."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """The folder of the CSV and TensorBoard logs."""
        return self.path / "logs"

    @property
    def report(self) -> Path:
        """The report for people."""
        return self.path / "report.md"

    @property
    def model(self) -> Path:
        """The folder of the model in Hugging Face format."""
        return self.path / "model"

    @property
    def manifest(self) -> Path:
        """The file with the names and patterns of what the run writes, and the process that writes it."""
        return self.path / "manifest.json"

    @property
    def lock(self) -> Path:
        """The lock file, held by the writing process."""
        return self.path / ".lock"

    @property
    def run(self) -> str | None:
        """The id of the run and its checkpoints; None for an old run without one, or before the run begins."""
        with suppress(ValueError):
            return self._read_manifest().get("run")
        return None

    @property
    def data(self) -> dict[str, str] | None:
        """The fingerprints of the run's data, by part; None for an old run without them."""
        with suppress(ValueError):
            return self._read_manifest().get("data")
        return None

    def check_data(self, data: Mapping[str, str]) -> None:
        """Raise ValueError if the run was trained on other data than this."""
        before = self.data
        if isinstance(before, dict) and before != data:
            other = ", ".join(name for name in data if before.get(name) != data[name])
            raise ValueError(
                f"the run in {self.path} cannot be continued with other data: {other} have changed; resume with the "
                "same data, or start a new run"
            )

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write the metrics as JSON; a number that is not finite becomes null. No partial file is left on an error."""
        with atomic_file(self.metrics) as file:
            file.write(json_text(metrics, indent=2).encode() + b"\n")

    # --- Ownership ----------------------------------------------------------------------------------------------------

    @contextmanager
    def opened(
        self, resume: bool, overwrite: bool, inputs: Mapping[str, Sequence[Path]] | None = None
    ) -> Iterator[None]:
        """Hold the folder for this run. The files of a run to be replaced are not removed before `begin`.

        A run that failed before its first step has left logs at most; such a folder is accepted.

        Args:
            resume: continue the run in the folder.
            overwrite: replace the run in the folder.
            inputs: the paths the new run reads, by option; a run that contains one of them is not replaced.

        Raises:
            ValueError: the folder holds something other than this run, or another process writes into it.
        """
        if getattr(rank_zero_only, "rank", 0) != 0:  # the first process holds the lock for all
            yield
            return
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--output {self.path} is not a folder")
        if not resume:
            self._check_before_locking()
        if overwrite:
            self._check_inputs(inputs or {})
        new = not self.path.exists()
        with self._locked():
            try:
                self._prepare(resume, overwrite)
                yield
            finally:
                if next(self._files(), None) is None:  # it failed before it wrote anything
                    self._forget(new)

    def begin(self, data: Mapping[str, str] | None = None) -> None:
        """Remove the files of the replaced run, and record the new run and the fingerprints of its `data`."""
        for path in self._replaced:
            remove(path)
            for parent in path.relative_to(self.path).parents[:-1]:
                with suppress(OSError):  # not empty
                    (self.path / parent).rmdir()
        files = self._patterns() if self._replaced else self._listed()
        self._replaced.clear()
        self._write_manifest(files, uuid.uuid4().hex, data)

    def claim_model(self, files: Iterable[str]) -> None:
        """Record that the files of these names in `model` belong to the run."""
        self._write_manifest([*self._listed(), *(f"{self.model.name}/{name}" for name in files)], self.run, self.data)

    # --- Existing content ---------------------------------------------------------------------------------------------

    def _check_before_locking(self) -> None:
        """Refuse a folder with other content before anything, even a lock, is written into it."""
        if not self.path.exists():
            return
        if self.manifest.is_file():
            self._check_kind()
            return
        names = sorted(path.name for path in self.path.iterdir() if path != self.lock and not _is_empty_folder(path))
        if self.config.name in names:
            raise ValueError(
                f"--output {self.path} holds {self._state()} run without a {self.manifest.name}, which would list the "
                "files to replace: continue it with --resume, remove it yourself, or give another folder"
            )
        if names:
            raise ValueError(
                f"--output {self.path} holds files that belong to no {self.kind} run: {_some(names)}; give another "
                "folder"
            )

    def _check_kind(self) -> None:
        """Refuse a folder with files, other than logs, of another kind of run."""
        kind = self._read_manifest().get("kind")
        if kind != self.kind and not all(self._in(self.logs, name) for name in self._files()):
            raise ValueError(
                f"--output {self.path} holds a run of another kind, {kind}: a {self.kind} run never replaces it, not "
                "even with --overwrite; remove it yourself, or give another folder"
            )

    def _check_inputs(self, inputs: Mapping[str, Sequence[Path]]) -> None:
        """Refuse to remove inputs of the run, which may be in the folder by name or through a link."""
        for option, paths in inputs.items():
            for path in paths:
                links = [each for each in path.rglob("*") if each.is_symlink()] if path.is_dir() else []
                if any(self._holds(each) for each in (path, *links)):
                    raise ValueError(
                        f"{option} {path} is in --output {self.path}, and --overwrite would remove the run there; give "
                        "another --output"
                    )

    def _holds(self, path: Path) -> bool:
        """Whether a path is in the folder, by its name or after following links."""
        named = Path(os.path.abspath(path))
        return any(
            each.is_relative_to(root)
            for each, root in ((named, Path(os.path.abspath(self.path))), (path.resolve(), self.path.resolve()))
        )

    def _prepare(self, resume: bool, overwrite: bool) -> None:
        patterns, found = self._patterns(), list(self._files())
        listed = self._listed(damaged=resume) or [*patterns, *(name for name in found if self._in(self.model, name))]
        foreign = [name for name in found if not _matches(name, listed)]
        if resume:  # other files may stay, but the run will replace `model`
            foreign = [name for name in foreign if self._in(self.model, name)]
        if foreign:
            raise ValueError(
                f"--output {self.path} holds files that belong to no {self.kind} run: {_some(foreign)}; move them, or "
                "give another folder"
            )
        if not (resume or overwrite or all(self._in(self.logs, name) for name in found)):
            raise ValueError(
                f"--output {self.path} holds {self._state()} run: continue it with --resume, replace it with "
                "--overwrite, or give another folder"
            )
        self._write_manifest([*patterns, *listed], self.run, self.data)
        if resume:
            self._remove_temporaries()
        else:
            self._replaced[:] = [self.path / name for name in found]

    def _state(self) -> str:
        return "a finished" if self.metrics.exists() else "an unfinished"

    def _in(self, folder: Path, name: str) -> bool:
        return name.startswith(f"{folder.name}/")

    def _patterns(self) -> list[str]:
        """Return the patterns of all files the run may write, except those of `model`, which `claim_model` adds."""
        files = [path.name for path in (self.config, self.metrics, self.curve, self.report)]
        files += [*self.others, *_CHECKPOINTS, *_LOGS]
        return [*files, *map(_temporary, files), *(f"{_temporary(self.model.name)}{inside}" for inside in ("", "/*"))]

    def _remove_temporaries(self) -> None:
        """Remove the partial files of killed processes."""
        for path in [*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")]:
            if _matches(path.relative_to(self.path).as_posix(), self._patterns()):
                remove(path)

    def _files(self) -> Iterator[str]:
        """Yield the names of all files and links, relative to the folder."""
        for path in _files_in(self.path):
            if path not in (self.manifest, self.lock):
                yield path.relative_to(self.path).as_posix()

    # --- Manifest and lock --------------------------------------------------------------------------------------------

    def _listed(self, damaged: bool = False) -> list[str]:
        """Return the names and patterns in the manifest; none if there is no manifest.

        Args:
            damaged: warn of a damaged manifest and return none, instead of raising ValueError.
        """
        try:
            found = self._read_manifest()
        except ValueError as error:
            if not damaged:
                raise
            warnings.warn(f"{error}; it is written again", stacklevel=2)
            return []
        return [str(name) for name in found.get("files", [])]

    def _read_manifest(self) -> dict[str, Any]:
        try:
            found = json.loads(self.manifest.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{self.manifest} cannot be read: {error}") from error
        if not (isinstance(found, dict) and isinstance(found.get("files"), list)):
            raise ValueError(f"{self.manifest} is not the manifest of a run: it must list the names of the run's files")
        return found

    def _write_manifest(self, files: Sequence[str], run: str | None, data: Mapping[str, str] | None) -> None:
        process = {"pid": os.getpid(), "host": socket.gethostname()}
        with atomic_file(self.manifest) as file:
            names = list(dict.fromkeys(files))
            content = {"kind": self.kind, "run": run, "data": data, "process": process, "files": names}
            file.write(json.dumps(content, indent=1).encode() + b"\n")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.lock)
        try:
            # The loader processes of a killed run hold the lock until they notice.
            lock.acquire(timeout=30 if self._writer_is_dead() else 0)
        except Timeout as error:
            raise ValueError(f"--output {self.path} is in use: {self._writer()} writes into it") from error
        try:
            yield
        finally:
            lock.release()

    def _writer_is_dead(self) -> bool:
        with suppress(ValueError, KeyError, TypeError):
            process = self._read_manifest()["process"]
            if process["host"] == socket.gethostname():
                try:
                    os.kill(int(process["pid"]), 0)
                except ProcessLookupError:
                    return True
                except OSError:  # the process belongs to another user
                    return False
        return False

    def _writer(self) -> str:
        with suppress(ValueError, KeyError, TypeError):
            process = self._read_manifest()["process"]
            return f"process {process['pid']} on {process['host']}"
        return "another process"

    def _forget(self, new: bool) -> None:
        self.manifest.unlink(missing_ok=True)
        self.lock.unlink(missing_ok=True)
        if new:
            for folder, _, _ in os.walk(self.path, topdown=False):
                with suppress(OSError):  # another process has put a file there
                    os.rmdir(folder)


def _files_in(path: Path) -> Iterator[Path]:
    """Yield all files and links, at any depth."""
    for folder, folders, files in os.walk(path):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        yield from (Path(folder, name) for name in [*links, *files])


def _is_empty_folder(path: Path) -> bool:
    """Whether the path is a folder without files or links at any depth, as a run that failed early may leave."""
    return path.is_dir() and not path.is_symlink() and next(_files_in(path), None) is None


def _temporary(name: str) -> str:
    """Return the pattern of the temporary file that `atomic_file` renames to `name`."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}.{last}.{'[0-9a-f]' * 16}.tmp"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
