"""Sources of text: files, folders and datasets, read as streams of documents; reading can resume at any document.

Memory use does not depend on the size of a source: no source is ever read whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastformer.data.parquet import parquet_records
from fastformer.lines import check_is_file, decoded_lines, json_object, lines_before

TEXT_COLUMN = "text"


@dataclass(frozen=True)
class Source:
    """A stream of documents.

    Attributes:
        name: the name in error messages.
        signature: a string that changes when the text does: for a file, its path, size and modification time.
        read: `read(start)` yields each document from position `start` on, with the position after it. The first
            position is 0; any other position is only meaningful to the source that yielded it.
    """

    name: str
    signature: str
    read: Callable[[int], Iterator[tuple[str, int]]]


def open_sources(data: Sequence[Any]) -> list[Source]:
    """Open paths and datasets as sources, in the given order; a folder is walked in sorted order.

    Accepted are:

    - text files (``.txt``, ``.text``, ``.md``); a blank line separates documents;
    - JSON lines (``.jsonl``, ``.ndjson``) and parquet (``.parquet``); the ``text`` of each record is a document;
    - folders of these;
    - folders written by `datasets.Dataset.save_to_disk`;
    - `datasets.Dataset` or `DatasetDict` objects.

    Raises:
        FileNotFoundError: a path does not exist.
        TypeError: `data` is a single path instead of a list.
        ValueError: the list is empty, a suffix is unknown, or a dataset has no column ``text``.
    """
    if isinstance(data, (str, os.PathLike)):
        raise TypeError(f"paths must be a list of paths, got the single path {os.fspath(data)!r}")
    if not len(data):
        raise ValueError("paths is empty: name at least one file or folder")
    return [source for item in data for source in _sources(item)]


def texts_source(texts: Sequence[str], name: str) -> Source:
    """Return a source of documents that are in memory."""

    def read(start: int) -> Iterator[tuple[str, int]]:
        for position in range(start, len(texts)):
            yield texts[position], position + 1

    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode())
    return Source(name, digest.hexdigest(), read)


def stream(sources: Iterable[Source]) -> Iterator[str]:
    """Yield the documents of all sources; empty documents are left out."""
    for source in sources:
        for text, _ in source.read(0):
            if text.strip():
                yield text


def _sources(item: Any) -> Iterator[Source]:
    if isinstance(item, (str, os.PathLike)):
        for path in _files(Path(item)):
            yield _saved_dataset(path) if path.is_dir() else _file(path)
    elif isinstance(item, dict):  # a DatasetDict
        for split in item.values():
            yield from _sources(split)
    elif hasattr(item, "column_names") and hasattr(item, "select"):
        yield _dataset(item, "a dataset", str(getattr(item, "_fingerprint", id(item))))
    else:
        raise TypeError(f"data must be paths, datasets.Dataset or DatasetDict; got {type(item).__name__}")


def _files(path: Path) -> Iterator[Path]:
    """Yield the files, and the folders written by `save_to_disk`, at or below a path."""
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if not path.is_dir() or (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        yield path
        return
    if path.is_symlink() and path.resolve() in path.parent.resolve().joinpath("x").parents:
        raise ValueError(f"{path} is a link to a folder that contains it: its files would be read again and again")
    below = [child for child in sorted(path.iterdir()) if not child.name.startswith(".")]
    if not below:
        raise ValueError(f"{path} is an empty folder")
    for child in below:
        yield from _files(child)


def _file(path: Path) -> Source:
    try:
        reader = _READERS[path.suffix.lower()]
    except KeyError:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; accepted are {', '.join(_READERS)}") from None
    check_is_file(path)
    return Source(str(path), _signature(path), lambda start: reader(path, start))


def _signature(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


# --- Lines ------------------------------------------------------------------------------------------------------------


def _read_text(path: Path, start: int) -> Iterator[tuple[str, int]]:
    lines: list[str] = []
    end = start
    for line, end in decoded_lines(path, start):
        if line.strip():
            lines.append(line)
        elif lines:
            yield "\n".join(lines), end
            lines = []
    if lines:
        yield "\n".join(lines), end


def _read_json_lines(path: Path, start: int) -> Iterator[tuple[str, int]]:
    number = lines_before(path, start)
    for line, end in decoded_lines(path, start):
        number += 1
        if not line.strip():
            continue
        record = json_object(line, f"{path}, line {number}")
        if TEXT_COLUMN not in record:
            raise ValueError(f"{path}, line {number}: no {TEXT_COLUMN!r} field; found {', '.join(record) or 'none'}")
        yield _checked(record[TEXT_COLUMN], f"{path}, line {number}"), end


# --- Tables -----------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, start: int) -> Iterator[tuple[str, int]]:
    for row, text in parquet_records(path, start, TEXT_COLUMN):
        yield _checked(text, f"{path}, row {row}"), row


def _saved_dataset(path: Path) -> Source:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many kinds for a damaged folder
        raise ValueError(f"{path} is not a complete folder of datasets.save_to_disk: {error}") from error
    splits = list(loaded.values()) if isinstance(loaded, datasets.DatasetDict) else [loaded]
    joined = datasets.concatenate_datasets([_text_alone(split, str(path)) for split in splits])
    signatures = [_signature(file) for file in sorted(path.rglob("*")) if file.is_file()]
    return _dataset(joined, str(path), "\n".join(signatures))


def _text_alone(split: Any, name: str) -> Any:
    _check_text_column(split.column_names, name)
    return split.select_columns([TEXT_COLUMN])


def _dataset(dataset: Any, name: str, signature: str) -> Source:
    _check_text_column(dataset.column_names, name)

    def read(start: int) -> Iterator[tuple[str, int]]:
        for begin in range(start, len(dataset), 1024):
            for row, text in enumerate(dataset[begin : begin + 1024][TEXT_COLUMN], start=begin + 1):
                yield _checked(text, f"{name}, row {row}"), row

    return Source(name, signature, read)


def _check_text_column(columns: Sequence[str], name: str) -> None:
    if TEXT_COLUMN not in columns:
        raise ValueError(f"{name}: no {TEXT_COLUMN!r} column; found {', '.join(columns)}")


def _checked(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where}: {TEXT_COLUMN!r} must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not valid Unicode: {error}") from error
    return text


_READERS: dict[str, Callable[[Path, int], Iterator[tuple[str, int]]]] = {
    ".txt": _read_text,
    ".text": _read_text,
    ".md": _read_text,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}
