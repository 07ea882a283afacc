"""What is drawn: curves, ratios, both, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

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
def test_pictures(measurements: list[Measurement], names: list[str], tmp_path: Path) -> None:
    drawn = draw(measurements, [Goal("a", "peer", at_least=1.5)], "a study", tmp_path / "study.png")
    assert [path.name for path in drawn] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


@pytest.mark.parametrize(("ours", "theirs"), [(0.0, 0.0), (0.0, 46.0), (46.0, 0.0)])
def test_nothing_beside_something_can_be_drawn(ours: float, theirs: float, tmp_path: Path) -> None:
    measurements = [found("a", OURS, ours, SPILLS), found("a", "peer", theirs, SPILLS)]
    assert draw(measurements, [], "a study", tmp_path / "study.png")
