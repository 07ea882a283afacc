"""Files that are complete or absent: atomic writing of files and folders, checksums, and the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from fastformer.lines import json_object


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder for data that can be built again.

    Args:
        folder: used as given. None means ``$FASTFORMER_CACHE`` or, if that is not set, ``~/.cache/fastformer``.
    """
    return Path(folder or os.environ.get("FASTFORMER_CACHE") or "~/.cache/fastformer").expanduser()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file for writing that replaces `path` only when it is complete and on the disk.

    Raises:
        OSError: the file could not be written (a full disk, no permission). The message names `path`, and no part of
            the file remains.
    """
    temporary = _temporary_name(path)
    with _naming_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


OVERWRITE_HELP = "replace files that exist already; input files are never replaced"


def check_out(
    files: Iterable[Path],
    overwrite: bool,
    inputs: Mapping[str, Sequence[Path]] | None = None,
    option: str = "--out",
) -> None:
    """Refuse output files that exist already. With `overwrite`, refuse only folders and inputs of the command.

    Args:
        files: the files that the command is to write.
        overwrite: whether ``--overwrite`` is given.
        inputs: the files and folders that the command reads, by the option that names them.
        option: the option that names the output.

    Raises:
        ValueError: a file is refused. Links are followed.
    """
    for file in filter(os.path.lexists, files):
        for given, paths in (inputs or {}).items():
            if any(_is_or_holds(path, file) for path in paths):
                raise ValueError(f"{option} {file} is part of the input, {given}; give another {option}")
        if file.is_dir():
            raise ValueError(f"{option} {file} is a folder; give the name of a file")
        if not overwrite:
            raise ValueError(f"{option} {file} already exists: replace it with --overwrite, or give another {option}")


def _is_or_holds(path: Path, file: Path) -> bool:
    same = path.exists() and file.exists() and path.samefile(file)  # also if it has two names
    return same or file.resolve().is_relative_to(path.resolve())


def write_checked(path: Path, body: bytes) -> None:
    """Write a file atomically. Its first line is the SHA-256 of the rest."""
    with atomic_file(path) as file:
        file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def read_checked(path: Path) -> bytes:
    """Return the body that `write_checked` wrote. Raises ValueError if the file has changed."""
    checksum, _, body = path.read_bytes().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        raise ValueError("its checksum does not match")
    return body


_CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Write a file into `folder` that lists the SHA-256 of each file there."""
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    write_checked(folder / _CHECKSUMS, json.dumps(sums).encode())


def check_folder(folder: Path) -> None:
    """Raise ValueError if the folder's files have changed since `write_checksums`. Without checksums, accept it."""
    if not (folder / _CHECKSUMS).exists():
        return
    for name, expected in json_object(read_checked(folder / _CHECKSUMS).decode(), _CHECKSUMS).items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise ValueError(f"the checksum of {name} does not match")


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """Create an empty folder to fill, which is moved to `path` only when it is complete and on the disk.

    Args:
        path: the folder's final place.
        replace: replace what `path` is already; a link is itself replaced, not its target. Otherwise an existing folder
            stays, for example if another process completes the same folder first.

    Raises:
        OSError: the folder could not be written (a full disk, no permission). The message names `path`, and no part of
            the folder remains.
    """
    temporary = _temporary_name(path)
    with _naming_errors(path):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _synchronise(file)
            if replace:
                _rename_over(temporary, path)
            else:
                with contextlib.suppress(FileExistsError):
                    _rename_new(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _synchronise(file: Path) -> None:
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


def _rename_new(source: Path, target: Path) -> None:
    if target.exists():
        raise FileExistsError(target)
    source.rename(target)


def _rename_over(source: Path, target: Path) -> None:
    """Move `target` away, then rename `source` to it: a folder cannot be renamed to one that contains files."""
    old = _temporary_name(target)
    with contextlib.suppress(FileNotFoundError):
        target.rename(old)
    try:
        source.rename(target)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            old.rename(target)
        raise
    with contextlib.suppress(FileNotFoundError):
        remove(old)


@contextlib.contextmanager
def _naming_errors(path: Path) -> Iterator[None]:
    """Add the file's name to errors of writing that do not name it, such as "No space left on device"."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, f"{error.strerror} while writing", str(path)) from error
