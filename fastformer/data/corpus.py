"""Corpora: documents of sentences, read from files or taken from Python's own documentation.

The order of the documents is a function of the input alone, so that whatever is drawn from them by index repeats.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastformer.data.files import atomic_file, cache_folder
from fastformer.data.progress import track
from fastformer.data.python_documentation import python_documentation, python_fingerprint

Document = list[str]
"""The sentences (or other segments) of one document, in order, none empty."""

TEXT_COLUMN = "text"

_SENTENCE_END = re.compile(r"""(?<=[.!?])["')\]*]*\s+(?=["'(\[*]*[A-Z0-9])|(?<=[\u3002\uff01\uff1f])\s*""")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|cf|vs|Mr|Mrs|Ms|Dr|Prof|St|No|Fig|Sec|approx|resp)|\b[A-Z])\.$")


def split_sentences(text: str) -> list[str]:
    """Splits running text into sentences.

    A sentence ends at ``.``, ``!`` or ``?`` before white space and a capital letter or digit, unless the mark belongs
    to an abbreviation or an initial, and at the Chinese and Japanese marks. No character other than the white space
    between sentences is lost.
    """
    sentences: list[str] = []
    begin = 0
    for match in _SENTENCE_END.finditer(text):
        closed = text[begin : match.end()].strip()
        if closed and not _ABBREVIATION.search(closed):
            sentences.append(closed)
            begin = match.end()
    if rest := text[begin:].strip():
        sentences.append(rest)
    return sentences


# --- The default corpus -----------------------------------------------------------------------------------------------

_DEFAULT_CORPUS_FORMAT = 1


def default_corpus(cache_dir: str | os.PathLike[str] | None = None) -> list[Document]:
    """The English prose of the documentation that comes with this Python.

    One document per module of the standard library (its docstrings) and per topic of ``help()``, each sentence once in
    the whole corpus. The text depends on the version of Python. It is kept in the cache folder; a damaged copy is made
    anew.

    Args:
        cache_dir: see `fastformer.data.files.cache_folder`.
    """
    path = cache_folder(cache_dir) / f"python-documentation-{python_fingerprint()}-v{_DEFAULT_CORPUS_FORMAT}.txt"
    if path.exists():
        try:
            return _read_checked_corpus(path)
        except ValueError as error:
            warnings.warn(f"{path} is damaged ({error}) and is made anew", stacklevel=2)
    documents = _without_repeated_sentences(
        [split_sentences(text) for text in texts] for texts in python_documentation()
    )
    _write_checked_corpus(path, documents)
    return documents


def _without_repeated_sentences(documents: Iterable[list[list[str]]]) -> list[Document]:
    """Keeps each sentence only where it first occurs; drops documents that are left with a single one."""
    seen: set[str] = set()
    kept: list[Document] = []
    for paragraphs in documents:
        document: Document = []
        for sentence in (sentence for paragraph in paragraphs for sentence in paragraph):
            if sentence not in seen:
                seen.add(sentence)
                document.append(sentence)
        if len(document) > 1:
            kept.append(document)
    return kept


def _write_checked_corpus(path: Path, documents: Sequence[Document]) -> None:
    """First line: the SHA-256 of the rest. Then a sentence a line and a blank line after each document."""
    body = "".join("".join(f"{sentence}\n" for sentence in document) + "\n" for document in documents).encode()
    with atomic_file(path) as file:
        file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def _read_checked_corpus(path: Path) -> list[Document]:
    checksum, _, body = path.read_bytes().partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        raise ValueError("its checksum does not match")
    return [document.split("\n") for document in body.decode().split("\n\n") if document]


# --- Reading files ----------------------------------------------------------------------------------------------------


def load_corpus(paths: Sequence[str | os.PathLike[str]]) -> list[Document]:
    """Reads documents from files and folders, in the order given; a folder is walked in sorted order.

    Accepted are text files (``.txt``, ``.text``, ``.md``: a blank line separates documents, a line holds one or more
    sentences), JSON lines (``.jsonl``, ``.ndjson``) and parquet (``.parquet``), each record's ``text`` being a
    document, and folders written by `datasets.Dataset.save_to_disk`.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: no path, an unknown suffix, an undecodable or damaged file, no ``text``, or no text at all.
    """
    if isinstance(paths, (str, os.PathLike)):
        raise TypeError(f"paths must be a list of paths, got the single path {os.fspath(paths)!r}")
    if not paths:
        raise ValueError("paths is empty: name at least one file or folder")
    sources = [source for path in paths for source in _sources(Path(path))]
    documents = [
        document for source in track(sources, "reading the corpus") for document in _reader(source)(source) if document
    ]
    if not documents:
        raise ValueError(f"the corpus is empty: no text in {', '.join(str(path) for path in paths)}")
    return documents


def _sources(path: Path) -> Iterator[Path]:
    """The files, and folders written by `save_to_disk`, at or below a path."""
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if not path.is_dir() or _is_saved_dataset(path):
        yield path
        return
    below = [child for child in sorted(path.iterdir()) if not child.name.startswith(".")]
    if not below:
        raise ValueError(f"{path} is an empty folder")
    for child in below:
        yield from _sources(child)


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def _reader(source: Path) -> Callable[[Path], Iterator[Document]]:
    if source.is_dir():
        return _read_saved_dataset
    try:
        return _READERS[source.suffix.lower()]
    except KeyError:
        raise ValueError(f"{source}: unknown suffix {source.suffix!r}; accepted are {', '.join(_READERS)}") from None


def _read_text(path: Path) -> Iterator[Document]:
    document: Document = []
    for line in _decode(path).splitlines():
        if line.strip():
            document += split_sentences(line)
        else:
            yield document
            document = []
    yield document


def _read_json_lines(path: Path) -> Iterator[Document]:
    # Not splitlines: U+2028 and its like may stand unescaped inside a JSON string.
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(record, dict) or TEXT_COLUMN not in record:
            found = ", ".join(record) if isinstance(record, dict) else f"a {type(record).__name__}"
            raise ValueError(f"{path}, line {number}: no {TEXT_COLUMN!r} field; found {found}")
        yield _document(record[TEXT_COLUMN], f"{path}, line {number}")


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged or not parquet: {error}") from error
    with table:
        _check_text_column(table.schema_arrow.names, path)
        row = 0
        for batch in table.iter_batches(columns=[TEXT_COLUMN]):
            for text in batch.column(0).to_pylist():
                row += 1
                yield _document(text, f"{path}, row {row}")


def _read_saved_dataset(path: Path) -> Iterator[Document]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many kinds for a damaged folder
        raise ValueError(f"{path} is not a whole folder of datasets.save_to_disk: {error}") from error
    splits = loaded.values() if isinstance(loaded, datasets.DatasetDict) else [loaded]
    for split in splits:
        _check_text_column(split.column_names, path)
        for row, text in enumerate(split[TEXT_COLUMN], start=1):
            yield _document(text, f"{path}, row {row}")


def _check_text_column(columns: Sequence[str], path: Path) -> None:
    if TEXT_COLUMN not in columns:
        raise ValueError(f"{path}: no {TEXT_COLUMN!r} column; found {', '.join(columns)}")


def _document(text: Any, where: str) -> Document:
    if not isinstance(text, str):
        raise ValueError(f"{where}: {TEXT_COLUMN!r} must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not valid Unicode: {error}") from error
    return [sentence for line in text.splitlines() for sentence in split_sentences(line)]


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}: {error.reason}") from error


_READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".txt": _read_text,
    ".text": _read_text,
    ".md": _read_text,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".parquet": _read_parquet,
}


# --- Splitting --------------------------------------------------------------------------------------------------------


def split_documents(documents: Sequence[Document], heldout_fraction: float) -> tuple[list[Document], list[Document]]:
    """Splits documents into those to train on and those held out, both in their given order.

    The distinct documents with the lowest hashes are held out: ``max(1, round(heldout_fraction * distinct))`` of them,
    always the same ones, whatever their order. Copies of a document fall on the same side.

    Args:
        documents: at least two distinct ones, unless `heldout_fraction` is 0.
        heldout_fraction: share of the distinct documents, in [0, 1); 0 holds nothing out.
    """
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction must be in [0, 1), got {heldout_fraction}")
    if heldout_fraction == 0:
        return list(documents), []
    hashes = [hashlib.sha256("\n".join(document).encode()).digest() for document in documents]
    distinct = sorted(set(hashes))
    if len(distinct) < 2:
        raise ValueError(
            f"heldout_fraction={heldout_fraction} of {len(distinct)} distinct document(s) leaves nothing to train on; "
            "separate documents by blank lines, or set heldout_fraction=0"
        )
    count = min(max(1, math.floor(heldout_fraction * len(distinct) + 0.5)), len(distinct) - 1)
    heldout = set(distinct[:count])
    return (
        [document for document, key in zip(documents, hashes, strict=True) if key not in heldout],
        [document for document, key in zip(documents, hashes, strict=True) if key in heldout],
    )
