"""Write reports in Markdown, also with foreign text.

Foreign text is shown literally, and never acts as Markdown, HTML or a terminal's control code.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastformer.console import printable
from fastformer.files import atomic_file

_BAR = re.compile(r"(?<!\\)((?:\\\\)*)\|")  # an even number of backslashes leaves it unescaped
_SIGNS = re.compile(r"([\\`*_\[\]|#~$])")


def text(foreign: str) -> str:
    """Escape text for a line or a cell of a table."""
    return _SIGNS.sub(r"\\\1", html.escape(" ".join(printable(foreign).split()), quote=False))


def code(foreign: str) -> str:
    """Show text as code inside a line."""
    shown = " ".join(printable(foreign).split())
    fence = _longer_than_any(shown, 1)
    edge = " " if "`" in shown else ""
    return f"{fence}{edge}{shown}{edge}{fence}"


def block(foreign: str) -> str:
    """Show text as a separate block of lines."""
    shown = printable(foreign)
    fence = _longer_than_any(shown, 3)
    return f"{fence}text\n{shown}\n{fence}"


def table(headings: Sequence[str], align: str, rows: Sequence[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already. A "|" in a cell is escaped unless it is already.

    Args:
        headings: headings of the columns.
        align: "l" or "r" for each column.
        rows: rows with one cell for each column.
    """
    rules = [{"l": "---", "r": "---:"}[side] for side in align]
    lines = ([_BAR.sub(r"\1\|", cell) for cell in line] for line in (headings, rules, *rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def facts(values: Mapping[str, str]) -> str:
    """Return a list of names, each with its value, which is Markdown already."""
    return "\n".join(f"- {name}: {value}" for name, value in values.items())


def picture(description: str, file: Path) -> str:
    """Return a picture, whose file is in the folder of the report."""
    return f"![{description}]({file.name})"


def write_report(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write a report; no partial file is left on an error.

    Args:
        path: the file.
        title: its heading.
        parts: tables, facts, pictures, headings, blocks and paragraphs, each with an empty line before it.
    """
    with atomic_file(path) as file:
        file.write(("\n\n".join([f"# {title}", *parts]) + "\n").encode())


def _longer_than_any(shown: str, least: int) -> str:
    """Return a fence: more backticks than the text has in a row, and at least `least`."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", shown)), default=0))
