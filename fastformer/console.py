"""The output of commands: tables as plain text, a progress line on standard error, and escaping of untrusted text."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import math
import os
import shutil
import sys
import textwrap
import time
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")
Line = TypeVar("Line", bound="StatusLine")

_ASCII = {"±": "+/-", "…": "...", "·": "*", "≤": "<=", "≥": ">=", "→": "->"}
"""Replacements for the non-ASCII characters in our own output, for terminals that show ASCII only."""

_GAP = "  "
_NARROWEST = 8
# The longest line of a title or a note, in characters.
_LONGEST = 100


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings. `print(table)` wraps long cells if the terminal is too narrow.

    Args:
        headings: one for each column. If all are empty, the heading line is left out.
        rows: lists of cells, one cell for each heading.
        align: one letter for each column: "l" aligns its cells left, "r" right.
        title: the text above the table.
        note: the text below the table.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    align: str
    title: str = ""
    note: str = ""

    def __str__(self) -> str:
        return self.text(shutil.get_terminal_size().columns if sys.stdout.isatty() else None)

    def text(self, limit: int | None = None) -> str:
        """The table as text, with control characters escaped.

        Lines have at most `limit` characters, unless there are too many columns to fit. None: any length.
        """
        return self._escaped()._text(limit)

    def _escaped(self) -> Table:
        rows = [[printable(cell) for cell in row] for row in self.rows]
        return Table([*map(printable, self.headings)], rows, self.align, printable(self.title), printable(self.note))

    def _text(self, limit: int | None) -> str:
        widths, longest = self._widths(limit), min(limit or _LONGEST, _LONGEST)
        lines = textwrap.wrap(self.title, longest)
        if any(self.headings):
            lines += [*self._lines(self.headings, widths), _GAP.join("-" * width for width in widths)]
        for row in self.rows:
            lines += self._lines(row, widths)
        return "\n".join([*lines, *textwrap.wrap(self.note, longest)])

    def _widths(self, limit: int | None) -> list[int]:
        """The width of each column: that of its longest cell. If the sum is over `limit`, the widest columns shrink."""
        widths = [max(map(len, column)) for column in zip(self.headings, *self.rows, strict=True)]
        room = sum(widths) if limit is None else limit - len(_GAP) * (len(widths) - 1)
        while sum(widths) > room and max(widths) > _NARROWEST:
            widths[widths.index(max(widths))] -= 1
        return widths

    def _lines(self, row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
        cells = [_broken(cell, width) for cell, width in zip(row, widths, strict=True)]
        for number in range(max(map(len, cells))):
            parts = (cell[number] if number < len(cell) else "" for cell in cells)
            yield _GAP.join(map(_set, parts, widths, self.align)).rstrip()


def _broken(cell: str, width: int) -> list[str]:
    return [cell] if len(cell) <= width else textwrap.wrap(cell, width)


def _set(text: str, width: int, side: str) -> str:
    return text.rjust(width) if side == "r" else text.ljust(width)


class StatusLine:
    """A line on standard error that is rewritten in place until it is cleared. Nothing is shown outside a terminal."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self._written = 0.0

    def __enter__(self: Line) -> Line:
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()

    def show(self, text: str) -> None:
        """Show `text`, at most once every 0.1 seconds."""
        if self.live and time.monotonic() - self._written >= 0.1:
            self._written = time.monotonic()
            self._write(printable(text)[: shutil.get_terminal_size().columns - 1])

    def clear(self) -> None:
        """Erase the line. Call this before anything else is printed, and at the end."""
        if self.live and self._written:
            self._written = 0.0
            self._write("")

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r{text}\x1b[K")
        sys.stderr.flush()


class Progress(StatusLine):
    """A status line that shows the progress of some work.

    Args:
        description: what is being done.
        total: the amount of work, if it is known.
        unit: the unit of `total`, such as "tokens".
    """

    def __init__(self, description: str, total: int | None = None, unit: str = "") -> None:
        super().__init__()
        self._description, self._total, self._unit = description, total, unit and f" {unit}"
        self._done, self._begin = 0, time.monotonic()
        self.advance(0)

    def advance(self, amount: int = 1) -> None:
        """Add `amount` to the work that is done, and show it."""
        self._done += amount
        passed = time.monotonic() - self._begin
        of = "" if self._total is None else f"/{self._total:,}"
        left = f", {clock(passed * (self._total / self._done - 1))} left" if self._total and self._done else ""
        self.show(f"{self._description} {self._done:,}{of}{self._unit}  {clock(passed)}{left}")


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items and show the progress.

    Args:
        total: the number of items, for an iterable without a length.
    """
    count = len(items) if total is None and isinstance(items, Sequence) else total
    with Progress(description, count) as progress:
        for item in items:
            yield item
            progress.advance()


def clock(seconds: float) -> str:
    """A duration as minutes and seconds, or hours, minutes and seconds."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def printable(text: str) -> str:
    """`text` with every character that a terminal would obey, or cannot show, replaced by an escape such as ``\\x1b``.

    Escaped are control characters (except line ends and tabs), marks that change the direction of writing, and lone
    surrogates.
    """
    return "".join(_escape(sign) if unicodedata.category(sign) in ("Cc", "Cf", "Cs") else sign for sign in text)


def printable_line(text: str) -> str:
    """`printable` with line ends escaped too: the result is one line, even for a path that contains line ends."""
    return printable(text).replace("\n", "\\n")


def _escape(sign: str) -> str:
    # Zero-width joiners (U+200C, U+200D) are needed in many scripts and in emoji, and are harmless.
    return sign if sign in "\n\t\u200c\u200d" else sign.encode("unicode_escape").decode()


def say(text: str) -> None:
    """Print an escaped line at once. If nobody reads the output any more (`| head`), the work still goes on."""
    try:
        print(printable(text), flush=True)
    except BrokenPipeError:  # buffered and later output goes to the null device
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def show_any_character() -> None:
    """Let standard output and standard error accept any text: characters outside their encoding are spelled out."""
    codecs.register_error("fastformer", _spelled)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fastformer")


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    spelled = "".join(_ASCII.get(sign, sign.encode("ascii", "backslashreplace").decode()) for sign in signs)
    return spelled, error.end


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Show each warning on one line, without the file and line of the code that raised it, within the block."""
    before = warnings.formatwarning
    warnings.formatwarning = _one_line
    try:
        yield
    finally:
        warnings.formatwarning = before


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    kind = "" if category is UserWarning else f" ({category.__name__})"
    return f"warning{kind}: {printable(' '.join(str(message).split()))}\n"


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as JSON text. Numbers that are not finite become null, and lone surrogates become escapes."""
    content = _with_finite_numbers(value)
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    whole = text.encode(errors="replace").decode() == text
    return text if whole else json.dumps(content, indent=indent)


def _with_finite_numbers(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _with_finite_numbers(each) for name, each in value.items()}
    return [_with_finite_numbers(each) for each in value] if isinstance(value, (list, tuple)) else value


def in_a_line(cause: BaseException) -> str:
    """The class of an exception and the beginning of its message."""
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
