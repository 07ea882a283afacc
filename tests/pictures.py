"""What a picture shows: matplotlib's figures as they were saved."""

from __future__ import annotations

import pytest


def saved_figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures saved from now on, each with all that was drawn in it."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    saved, save = [], figure.savefig

    def noting(self, *arguments, **options) -> None:
        saved.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(figure, "savefig", noting)
    return saved


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    """The points of each line with a name."""
    named = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): [(float(x), float(y)) for x, y in line.get_xydata()] for line in named}
