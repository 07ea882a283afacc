"""Files that are whole or absent: atomic writing, and the folder for what can be made again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder for data that can be made again.

    Args:
        folder: used as given; None means ``$FASTFORMER_CACHE`` or, without it, ``~/.cache/fastformer``.
    """
    return Path(folder or os.environ.get("FASTFORMER_CACHE") or "~/.cache/fastformer").expanduser()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write into, which takes the place of `path` only once it is whole and on the disk.

    Raises:
        OSError: the file could not be written (a full disk, no permission), naming `path`; nothing of it remains.
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


def write_checked(path: Path, body: bytes) -> None:
    """An atomic file whose first line is the SHA-256 of the rest."""
    with atomic_file(path) as file:
        file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def read_checked(path: Path) -> bytes:
    """What `write_checked` wrote. Raises ValueError if it has changed."""
    checksum, _, body = path.read_bytes().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        raise ValueError("its checksum does not match")
    return body


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `path` only once it is whole and on the disk.

    If another process completes the same folder first, theirs stays.

    Raises:
        OSError: the folder could not be written (a full disk, no permission), naming `path`; nothing of it remains.
    """
    temporary = _temporary_name(path)
    with _naming_errors(path):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.iterdir():
                _synchronise(file)
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


@contextlib.contextmanager
def _naming_errors(path: Path) -> Iterator[None]:
    """Errors of writing ("No space left on device") do not say to which file; these do."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, f"{error.strerror} while writing", str(path)) from error
