"""Crossovers are found only where lines cross; tables and pictures show them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pictures import lines, saved_figures

from fastformer.benchmarking.crossovers import Comparison, comparisons
from fastformer.benchmarking.measurement import OURS, TIME, Measurement, Metric
from fastformer.benchmarking.pictures import draw
from fastformer.benchmarking.tables import crossover_rows, study_tables

PLACES = (10.0, 40.0, 200.0, 1000.0)
ACCURACY = Metric("accuracy", "", higher_is_better=True)


def line(peer: str, cost: Callable[[float], float], metric: Metric = TIME, modelled: bool = False) -> list[Measurement]:
    return [
        Measurement("a", f"at {at}", peer, metric, [cost(at)], {}, "a curve", "tokens", at, modelled=modelled)
        for at in PLACES
    ]


def compared(*lines: list[Measurement]) -> Comparison:
    (found,) = comparisons([each for points in lines for each in points])
    return found


def root(at: float) -> float:
    return 10 * at**0.5


def test_powers_cross_where_they_are_equal() -> None:
    found = compared(line(OURS, root), line("peer", lambda at: at))
    assert found.at == [pytest.approx(100)]
    assert (found.first_winner, found.last_winner) == ("peer", OURS)
    assert (found.low, found.high) == (10, 1000)
    assert crossover_rows([found]).rows == [
        ("a curve", "time", "peer up to 100, then fastformer", "10.0 to 1,000 tokens")
    ]


def test_more_is_better_where_the_metric_says_so() -> None:
    found = compared(line(OURS, root, ACCURACY), line("peer", lambda at: at, ACCURACY))
    assert (found.first_winner, found.last_winner) == (OURS, "peer")


def test_parallel_lines_do_not_cross() -> None:
    found = compared(line(OURS, lambda at: at), line("peer", lambda at: 2 * at))
    assert (found.at, found.first_winner, found.last_winner) == ([], OURS, OURS)
    assert crossover_rows([found]).rows[0][2] == "fastformer throughout, compared with peer"


def test_lines_that_lie_on_each_other_do_not_cross() -> None:
    wiggle = dict(zip(PLACES, (1.01, 0.99, 1.02, 0.98), strict=True))
    found = compared(line(OURS, lambda at: at), line("peer", lambda at: at * wiggle[at]))
    assert (found.at, found.first_winner) == ([], None)
    assert crossover_rows([found]).rows[0][2] == "fastformer and peer are equal"


def test_lines_that_meet_in_a_point_cross_there() -> None:
    factor = dict(zip(PLACES, (0.5, 0.8, 1.0, 3.0), strict=True))
    assert compared(line(OURS, lambda at: 1.0), line("peer", lambda at: factor[at])).at == [pytest.approx(200)]


def test_lines_may_cross_twice() -> None:
    factor = dict(zip(PLACES, (2.0, 0.5, 0.5, 2.0), strict=True))
    found = compared(line(OURS, lambda at: 1.0), line("peer", lambda at: factor[at]))
    assert found.at == [pytest.approx(20), pytest.approx((200 * 1000) ** 0.5)]
    assert crossover_rows([found]).rows[0][2] == "fastformer up to 20.0, peer up to 447, then fastformer"


def test_what_is_measured_is_not_compared_with_a_model() -> None:
    assert not comparisons(line(OURS, root) + line("model", lambda at: at, modelled=True))
    found = compared(line("one", root, modelled=True), line("other", lambda at: at, modelled=True))
    assert (found.modelled, found.first_winner) == (True, "other")
    assert crossover_rows([found]).rows[0][0] == "a curve (modelled)"


def test_zeros_are_left_out() -> None:
    found = compared(line(OURS, lambda at: max(0.0, at - 10)), line("peer", lambda at: at))
    assert (found.low, found.high, found.first_winner) == (40, 1000, OURS)


def test_one_place_is_no_line() -> None:
    assert not comparisons(line(OURS, root)[:1] + line("peer", root)[:1])


def test_picture_of_measured_and_modelled_lines(tmp_path, monkeypatch) -> None:
    saved = saved_figures(monkeypatch)
    beyond = [Measurement("a", "beyond", "model", TIME, [1e4], {}, "a curve", "tokens", 1e4, modelled=True)]
    points = line(OURS, root) + line("peer", lambda at: at) + line("model", root, modelled=True) + beyond
    (drawn,) = draw(points, (), "a title", tmp_path / "curves.png")
    assert drawn == tmp_path / "curves.png" and drawn.exists()
    shown = lines(saved[0].axes[0])
    assert shown[OURS] == [(at, root(at)) for at in PLACES]
    assert shown["peer"] == [(at, at) for at in PLACES]
    assert saved[0].get_suptitle() == "a title" and saved[0].axes[0].get_title() == "a curve"


def test_cases_that_were_measured_alike_share_a_table() -> None:
    timed, judged = line(OURS, root), Measurement("a", "judged", OURS, ACCURACY, [0.9], modelled=True)
    times, accuracies = study_tables([*timed, judged, *line("peer", root)], "a CPU")
    assert [row[:2] for row in times.rows] == [[f"at {at}", peer] for at in PLACES for peer in (OURS, "peer")]
    assert accuracies.rows == [["judged", OURS, "0.900 (modelled)"]]
