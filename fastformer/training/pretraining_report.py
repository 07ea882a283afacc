"""The report of a pretraining run: Markdown beside its metrics, with the picture of the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fastformer.console import Table
from fastformer.files import atomic_file
from fastformer.training import markdown

Rows = Sequence[tuple[str, str, str]]
"""What was measured, its value before the first step and its value after the last."""


def console_table(title: str, rows: Rows) -> Table:
    """The rows for a terminal."""
    return Table(("on held-out text", "before", "after"), rows, "lrr", title)


def write_report(
    path: Path, title: str, caption: str, rows: Rows, facts: Mapping[str, str], sections: Mapping[str, str], curve: Path
) -> None:
    """Write the Markdown file, whole or not at all.

    Args:
        path: of the file.
        title: its heading.
        caption: what the rows were measured on.
        rows: before and after; may be empty.
        facts: the name and the value of each.
        sections: heading and Markdown of what follows them.
        curve: the picture, in the folder of `path`.
    """
    parts = [f"# {title}"]
    if rows:
        parts += [f"{caption}:", markdown.table(("on held-out text", "before", "after"), "lrr", rows)]
        parts.append(f"![loss in training and on held-out text]({curve.name})")
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    for heading, text in sections.items():
        parts += [f"## {heading}", text]
    with atomic_file(path) as file:
        file.write(("\n\n".join(parts) + "\n").encode())
