"""CoNLL's columns: a word a line, first the word and last its tag, a blank line between sentences."""

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
"""Of a word; CoNLL-U has 1-2 and 1.1 too."""


class _Line(NamedTuple):
    """A line that is not blank.

    Attributes:
        where: it is.
        fields: its columns.
        tabs: whether a tab is between them.
        hash: whether it begins as a comment does, with ``#`` and a space.
    """

    where: str
    fields: list[str]
    tabs: bool
    hash: bool

    @property
    def shape(self) -> tuple[int, bool]:
        return len(self.fields), self.tabs


def conll_sentences(path: Path) -> Iterator[tuple[str, TaggedWords]]:
    """Of each sentence where it is, and its words and their tags.

    Columns are divided by a tab, in a line that has one, or by spaces. Lines before a sentence's first word that begin
    with ``#`` and a space are comments, unless they have the columns of other lines and the tag of another word.

    Raises:
        ValueError: a line has other columns than the first, a tag is missing, the first column only counts the words,
            or a line may as well be a comment as the word ``#``.
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
    """The lines of a file; None for those between sentences."""
    for number, text in numbered_lines(path):
        where, text = f"{path}, line {number}", text.strip(" \t")  # a line may end in a tab
        tabs = "\t" in text
        fields = [field.strip(" ") for field in text.split("\t")] if tabs else _BLANKS.split(text)
        if text.startswith('{"'):
            raise ValueError(f"{where}: JSON, where CoNLL's columns are expected; name the file .jsonl")
        yield _Line(where, fields, tabs, text.startswith("# ")) if text and fields[0] != "-DOCSTART-" else None


def _split_head(block: Sequence[_Line]) -> tuple[Sequence[_Line], Sequence[_Line]]:
    """Lines that may be comments before a sentence, and those from its first word on that is certainly one."""
    head = len([*takewhile(lambda line: line.hash, block)])
    return block[:head], block[head:]


def _not_comments(head: Sequence[_Line], shapes: set[tuple[int, bool]], tags: set[str]) -> Sequence[_Line]:
    """From the first of them on that is a word."""
    return head[len([*takewhile(lambda line: _is_comment(line, shapes, tags), head)]) :]


def _is_comment(line: _Line, shapes: set[tuple[int, bool]], tags: set[str]) -> bool:
    """Raises ValueError where it cannot be told."""
    if shapes and line.shape not in shapes:
        return True
    if line.fields[2:3] == ["="]:  # as CoNLL-U's
        return True
    if line.fields[-1] in tags:
        return False
    if "=" in line.fields[-1]:
        return True
    raise ValueError(
        f"{line.where}: a comment or the word '#'? No other word has the tag {line.fields[-1]!r}; put a tab behind the "
        "word, or leave the comment out"
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
            f"{sentences[0][0].where}: the first column counts the words; expected is word ... tag, without a number"
        )


def _counts(sentence: Sequence[_Line]) -> bool:
    """Whether the first column of a sentence counts its words, from 0 or 1 on."""
    firsts = [line.fields[0] for line in sentence]
    if not all(_COUNT.fullmatch(first) for first in firsts):
        return False
    numbers = [int(first) for first in firsts if first.isdigit()]
    return bool(numbers) and numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
