"""The contents of pictures: matplotlib's figures as they were saved."""

from __future__ import annotations

import pytest


def saved_figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """Return the list of figures saved from now on, each with everything drawn in it."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    saved, save = [], figure.savefig

    def noting(self, *arguments, **options) -> None:
        saved.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(figure, "savefig", noting)
    return saved


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each named line."""
    named = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    return {line.get_label(): [(float(x), float(y)) for x, y in line.get_xydata()] for line in named}
