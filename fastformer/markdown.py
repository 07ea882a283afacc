"""Reports in Markdown, and foreign text in them.

Foreign text is shown as it is written, and never acts as Markdown, HTML or a terminal's code.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastformer.console import printable
from fastformer.files import atomic_file

_SIGNS = re.compile(r"([\\`*_\[\]|#~$])")


def text(foreign: str) -> str:
    """Within a line or a cell of a table."""
    return _SIGNS.sub(r"\\\1", html.escape(" ".join(printable(foreign).split()), quote=False))


def code(foreign: str) -> str:
    """Within a line, as code."""
    shown = " ".join(printable(foreign).split())
    fence = _longer_than_any(shown, 1)
    edge = " " if "`" in shown else ""
    return f"{fence}{edge}{shown}{edge}{fence}"


def block(foreign: str) -> str:
    """A block of lines of its own."""
    shown = printable(foreign)
    fence = _longer_than_any(shown, 3)
    return f"{fence}text\n{shown}\n{fence}"


def table(headings: Sequence[str], align: str, rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already.

    Args:
        headings: of the columns.
        align: "l" or "r" for each column.
        rows: as many cells each.
    """
    rules = [{"l": "---", "r": "---:"}[side] for side in align]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rules, *rows))


def facts(values: Mapping[str, str]) -> str:
    """A list of names, each with its value, which is Markdown already."""
    return "\n".join(f"- {name}: {value}" for name, value in values.items())


def picture(description: str, file: Path) -> str:
    """A picture that is in the folder of the report."""
    return f"![{description}]({file.name})"


def write_report(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write a report, whole or not at all.

    Args:
        path: of the file.
        title: its heading.
        parts: tables, facts, pictures, headings, blocks and paragraphs, each with an empty line before it.
    """
    with atomic_file(path) as file:
        file.write(("\n\n".join([f"# {title}", *parts]) + "\n").encode())


def _longer_than_any(shown: str, least: int) -> str:
    """Backticks, more than there are in a row."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", shown)), default=0))
