"""A progress bar for work that takes more than a moment."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


def track(items: Sequence[Item], description: str) -> Iterable[Item]:
    """The items, with progress shown on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track as rich_track

    return rich_track(items, description, console=Console(stderr=True))


class Ticker:
    """Counts work of unknown length, shown on standard error where that is a terminal."""

    def __init__(self, description: str, unit: str) -> None:
        self._progress: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}: {task.completed:,.0f} " + unit), TimeElapsedColumn())
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._task = self._progress.add_task(description, total=None)

    def __enter__(self) -> Ticker:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, amount: int) -> None:
        if self._progress is not None:
            self._progress.advance(self._task, amount)
