"""Tests of what pictures show: curves, ratios, both, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import lines, saved_figures

from fastformer.benchmarking.measurement import OURS, PEAK_MEMORY, TIME, Goal, Measurement, Metric
from fastformer.benchmarking.pictures import draw

SPILLS = Metric("spills", "bytes")


def found(case: str, peer: str, value: float, metric: Metric = TIME, at: float | None = None) -> Measurement:
    curve = None if at is None else "a curve"
    return Measurement("a-study", case, peer, metric, [value], curve=curve, axis="length", at=at)


BARS = [found("a", OURS, 1.0), found("a", "peer", 2.0), found("a", "another", 0.001)]
CURVES = [
    found(f"{at}", peer, at, metric, at)
    for at in (1.0, 2.0)
    for peer in (OURS, "peer")
    for metric in (TIME, PEAK_MEMORY)
]


@pytest.mark.parametrize(
    ("measurements", "names"),
    [
        (BARS, ["study.png"]),
        (CURVES, ["study.png"]),
        (BARS + CURVES, ["study.png", "study-ratios.png"]),
        ([found("a", OURS, 1.0)], []),
    ],
)
def test_pictures(
    measurements: list[Measurement], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = saved_figures(monkeypatch)
    drawn = draw(measurements, [Goal("a", "peer", at_least=1.5)], "a study", tmp_path / "study.png")
    assert [path.name for path in drawn] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert [figure.get_suptitle() for figure in saved] == ["a study"] * len(names)
    for figure in saved[: measurements[-1:] == CURVES[-1:]]:
        peers = [lines(axes) for axes in figure.axes if axes.get_lines()]
        assert peers == [{OURS: [(1, 1), (2, 2)], "peer": [(1, 1), (2, 2)]}] * 2
    for figure in saved if measurements == BARS else []:
        # Ours takes half of the peer's time, and 1,000 times that of another peer, whose bar ends at the edge.
        ends = [bar.get_x() + bar.get_width() for bar in figure.axes[0].patches]
        assert ends == pytest.approx([2, 1 / 32])


@pytest.mark.parametrize(("ours", "theirs"), [(0.0, 0.0), (0.0, 46.0), (46.0, 0.0)])
def test_nothing_beside_something_can_be_drawn(ours: float, theirs: float, tmp_path: Path) -> None:
    measurements = [found("a", OURS, ours, SPILLS), found("a", "peer", theirs, SPILLS)]
    assert draw(measurements, [], "a study", tmp_path / "study.png")
