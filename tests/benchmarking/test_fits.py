"""Fits find the coefficients that made the data, none of them below zero, and extrapolate with them."""

from __future__ import annotations

import numpy as np
import pytest

from fastformer.benchmarking.fits import fit

TRUE = {"constant": 0.01, "tokens": 3e-6, "pairs": 2e-9}


def terms(tokens: int, length: int) -> dict[str, float]:
    return {"constant": 1.0, "tokens": tokens, "pairs": tokens * length}


def cost(tokens: int, length: int) -> float:
    return sum(TRUE[name] * amount for name, amount in terms(tokens, length).items())


SIZES = [(512, 64), (512, 512), (2048, 64), (2048, 256), (4096, 1024)]


def test_known_coefficients_are_recovered_and_extrapolate() -> None:
    fitted = fit([terms(*size) for size in SIZES], [cost(*size) for size in SIZES])
    assert fitted.coefficients == pytest.approx(TRUE, rel=1e-6)
    assert fitted(terms(1 << 20, 8192)) == pytest.approx(cost(1 << 20, 8192), rel=1e-6)


def test_noise_of_some_per_cent_moves_a_prediction_by_as_much() -> None:
    noise = np.random.default_rng(0).uniform(0.97, 1.03, len(SIZES))
    fitted = fit([terms(*s) for s in SIZES], [cost(*s) * factor for s, factor in zip(SIZES, noise, strict=True)])
    assert fitted(terms(8192, 1024)) == pytest.approx(cost(8192, 1024), rel=0.06)


def test_what_falls_with_size_gets_no_negative_cost() -> None:
    fitted = fit([{"constant": 1.0, "size": size} for size in (1.0, 2.0, 3.0)], [3.0, 2.0, 1.0])
    assert fitted.coefficients["size"] == 0
    assert fitted.coefficients["constant"] > 0


def test_small_costs_count_as_much_as_large_ones() -> None:
    """Small costs count as much as large ones, because a fit minimises the squares of relative errors.

    For the costs 1 and 100, the best constant is sum 1/y over sum 1/y^2.
    """
    fitted = fit([{"constant": 1.0}] * 2, [1.0, 100.0])
    assert fitted.coefficients["constant"] == pytest.approx(1.01 / 1.0001)


@pytest.mark.parametrize(
    ("points", "costs", "message"),
    [
        ([], [], "1 or more; got 0"),
        ([{"a": 1.0}], [1.0, 2.0], "got 1 and 2"),
        ([{"a": 1.0}, {"b": 1.0}], [1.0, 2.0], "all have the terms a"),
        ([{"a": 1.0}], [0.0], "above 0; got 0"),
    ],
)
def test_errors(points: list[dict[str, float]], costs: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(points, costs)
