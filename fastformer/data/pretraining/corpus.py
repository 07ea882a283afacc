"""Corpora: documents of sentences, read from files or taken from Python's own documentation.

The order of the documents depends only on the input, so that an index always means the same document.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastformer.data.pretraining.python_documentation import python_documentation, python_fingerprint
from fastformer.files import cache_folder, read_checked, remove, write_checked

Document = list[str]
"""The sentences (or other segments) of one document, in order, none empty."""

_SENTENCE_END = re.compile(r"""(?<=[.!?])["')\]*]*\s+(?=["'(\[*]*[A-Z0-9])|(?<=[\u3002\uff01\uff1f])\s*""")
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|cf|vs|Mr|Mrs|Ms|Dr|Prof|St|No|Fig|Sec|approx|resp)|\b[A-Z])\.$")

_LONGEST_ABBREVIATION = len("approx.")


def split_sentences(text: str) -> list[str]:
    """Split running text into sentences.

    A sentence ends at ``.``, ``!`` or ``?`` before white space and a capital letter or digit, unless the mark belongs
    to an abbreviation or an initial. It also ends at the Chinese and Japanese marks. No character is lost except the
    white space between sentences.
    """
    sentences: list[str] = []
    begin = 0
    for match in _SENTENCE_END.finditer(text):
        end = match.end() - len(match[0]) + len(match[0].rstrip())
        if _ABBREVIATION.search(text, max(begin, end - _LONGEST_ABBREVIATION), end):
            continue
        if closed := text[begin:end].strip():
            sentences.append(closed)
            begin = match.end()
    if rest := text[begin:].strip():
        sentences.append(rest)
    return sentences


# --- The default corpus -----------------------------------------------------------------------------------------------

_DEFAULT_CORPUS_FORMAT = 1


def default_corpus(cache_dir: str | os.PathLike[str] | None = None) -> list[Document]:
    """Return the English prose of the documentation that comes with this Python.

    It has one document per module of the standard library (its docstrings) and per topic of ``help()``. Each sentence
    is there once in the whole corpus. The text depends on the version of Python. It is kept in the cache folder; a
    damaged copy is rebuilt.

    Args:
        cache_dir: see `fastformer.files.cache_folder`.
    """
    path = cache_folder(cache_dir) / f"python-documentation-{python_fingerprint()}-v{_DEFAULT_CORPUS_FORMAT}.txt"
    if path.exists():
        try:
            return _read_corpus(path)
        except (OSError, ValueError) as error:
            warnings.warn(f"{path} is damaged ({error}) and is rebuilt", stacklevel=2)
            remove(path)
    documents = _without_repeated_sentences(
        [split_sentences(text) for text in texts] for texts in python_documentation()
    )
    _write_corpus(path, documents)
    return documents


def _without_repeated_sentences(documents: Iterable[list[list[str]]]) -> list[Document]:
    """Keep only the first occurrence of each sentence, then drop documents with fewer than two sentences."""
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


def _write_corpus(path: Path, documents: Sequence[Document]) -> None:
    """Write one sentence per line, and a blank line after each document."""
    body = "".join("".join(f"{sentence}\n" for sentence in document) + "\n" for document in documents)
    write_checked(path, body.encode())


def _read_corpus(path: Path) -> list[Document]:
    return [document.split("\n") for document in read_checked(path).decode().split("\n\n") if document]


def document_of(text: str) -> Document:
    """Return the sentences of a text. A sentence never continues on the next line."""
    return [sentence for line in text.splitlines() for sentence in split_sentences(line)]
