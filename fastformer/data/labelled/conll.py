"""Read CoNLL files: one word per line, the word in the first column, its tag in the last, blank lines between
sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from pathlib import Path
from typing import NamedTuple

from fastformer.data.labelled.examples import TaggedWords, check_is_told
from fastformer.lines import numbered_lines

_BLANKS = re.compile(r"[ \t]+")
_COUNT = re.compile(r"[0-9]+([-.][0-9]+)?")
"""The number of a word in its sentence; CoNLL-U also has 1-2 and 1.1."""


class _Line(NamedTuple):
    """A line that is not blank.

    Attributes:
        where: file and line number.
        fields: its columns.
        tabs: whether the columns are divided by tabs.
        hash: whether the line begins like a comment, with ``#`` and a space.
    """

    where: str
    fields: list[str]
    tabs: bool
    hash: bool

    @property
    def shape(self) -> tuple[int, bool]:
        return len(self.fields), self.tabs


def conll_sentences(path: Path) -> Iterator[tuple[str, TaggedWords]]:
    """Yield the place (file and line) of each sentence, and its words with their tags.

    A line that has a tab is divided into columns by tabs, any other line by spaces. Lines before a sentence's first
    word that begin with ``#`` and a space are comments, unless they have as many columns as other lines and end in the
    tag of another word.

    Raises:
        ValueError: a line has another number of columns than the first line, a tag is missing, the first column only
            numbers the words, or it is unclear whether a line is a comment or the word ``#``.
    """
    blocks = (
        [line for line in lines if line is not None] for _, lines in groupby(_lines(path), lambda line: line is None)
    )
    split = [_split_head(block) for block in blocks]
    words = [line for _, rest in split for line in rest]
    shapes, tags = {line.shape for line in words}, {line.fields[-1] for line in words}
    sentences = [[*_not_comments(head, shapes, tags), *rest] for head, rest in split]
    sentences = [sentence for sentence in sentences if sentence]
    _check_columns(sentences)
    for sentence in sentences:
        tagged = [(line.fields[0], check_is_told(line.fields[-1], line.where, "tag")) for line in sentence]
        yield sentence[0].where, TaggedWords(*zip(*tagged, strict=True))


def _lines(path: Path) -> Iterator[_Line | None]:
    """Yield the lines of a file, and None for each line between sentences."""
    for number, text in numbered_lines(path):
        where, text = f"{path}, line {number}", text.strip(" \t")  # a line may end in a tab
        tabs = "\t" in text
        fields = [field.strip(" ") for field in text.split("\t")] if tabs else _BLANKS.split(text)
        if text.startswith('{"'):
            raise ValueError(f"{where}: found JSON, expected CoNLL's columns; a file of JSON lines must end in .jsonl")
        yield _Line(where, fields, tabs, text.startswith("# ")) if text and fields[0] != "-DOCSTART-" else None


def _split_head(block: Sequence[_Line]) -> tuple[Sequence[_Line], Sequence[_Line]]:
    """Split a block into the leading lines that may be comments and the rest, which begins with a certain word."""
    head = len([*takewhile(lambda line: line.hash, block)])
    return block[:head], block[head:]


def _not_comments(head: Sequence[_Line], shapes: set[tuple[int, bool]], tags: set[str]) -> Sequence[_Line]:
    """Return the lines from the first one that is not a comment."""
    return head[len([*takewhile(lambda line: _is_comment(line, shapes, tags), head)]) :]


def _is_comment(line: _Line, shapes: set[tuple[int, bool]], tags: set[str]) -> bool:
    """Return whether the line is a comment; raise ValueError if that is unclear."""
    if shapes and line.shape not in shapes:
        return True
    if line.fields[2:3] == ["="]:  # a comment of CoNLL-U: "# key = value"
        return True
    if line.fields[-1] in tags:
        return False
    if "=" in line.fields[-1]:
        return True
    raise ValueError(
        f"{line.where}: unclear whether this is a comment or the word '#': no other word has the tag "
        f"{line.fields[-1]!r}; put a tab after the word, or remove the comment"
    )


def _check_columns(sentences: Sequence[Sequence[_Line]]) -> None:
    for line in (line for sentence in sentences for line in sentence):
        columns, expected = len(line.fields), len(sentences[0][0].fields)
        if columns != expected or columns < 2:
            wanted = expected if expected > 1 else "two or more"
            raise ValueError(f"{line.where}: found {columns} columns, expected {wanted}: word ... tag")
    counted = all(len(sentence[0].fields) > 2 and _counts(sentence) for sentence in sentences)
    if counted and any(len(sentence) > 1 for sentence in sentences):
        raise ValueError(
            f"{sentences[0][0].where}: the first column numbers the words; expected word ... tag, without a number"
        )


def _counts(sentence: Sequence[_Line]) -> bool:
    """Whether the first column of a sentence numbers its words, beginning with 0 or 1."""
    firsts = [line.fields[0] for line in sentence]
    if not all(_COUNT.fullmatch(first) for first in firsts):
        return False
    numbers = [int(first) for first in firsts if first.isdigit()]
    return bool(numbers) and numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
