"""Tokens are drawn from the distribution that plain Python computes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastformer.generation import SamplingParameters
from fastformer.generation.sampling import Settings, distribution, draw, log_probabilities
from fastformer.generation.slots import Slots

pytestmark = pytest.mark.quick

CLASSES = 7


def reference(logits: list[float], parameters: SamplingParameters, seen: set[int]) -> list[float]:
    """Return the distribution, computed one class after the other in float64."""
    penalty = parameters.repetition_penalty
    logits = [(x * penalty if x < 0 else x / penalty) if each in seen else x for each, x in enumerate(logits)]
    if parameters.temperature == 0.0:
        return [float(each == logits.index(max(logits))) for each in range(len(logits))]
    weights = [math.exp((x - max(logits)) / parameters.temperature) for x in logits]

    def kept(least: float) -> list[float]:
        left = [weight if weight >= least else 0.0 for weight in weights]
        return [weight / sum(left) for weight in left]

    if parameters.top_k is not None:
        weights = kept(sorted(weights, reverse=True)[min(parameters.top_k, len(weights)) - 1])
    if parameters.top_p is not None:
        weights = kept(0.0)
        for least in sorted(set(weights), reverse=True):
            if sum(weight for weight in weights if weight >= least) >= parameters.top_p:
                break
        weights = kept(least)
    if parameters.min_p is not None:
        weights = kept(parameters.min_p * max(weights))
    return kept(0.0)


def rows_of(parameters: list[SamplingParameters]) -> Settings:
    """Return the settings in the form that a batch has."""
    slots = Slots(len(parameters), 4, 2, CLASSES, True, torch.get_default_device())
    for slot, each in enumerate(parameters):
        slots.admit(slot, [0], each, seed=0)
    return slots.settings(slice(0, len(parameters)), parameters)


# Multiples of a quarter are exact in every step that decides what is kept, and equal logits are common.
LOGITS = st.lists(st.integers(-12, 12).map(lambda quarters: quarters / 4), min_size=CLASSES, max_size=CLASSES)
FILTERS = st.builds(
    SamplingParameters,
    max_new_tokens=st.just(2),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.none() | st.integers(1, CLASSES + 2),
    # No sum of a few of these probabilities comes near such a top_p.
    top_p=st.none() | st.floats(0.05, 0.95).map(lambda p: p + math.pi * 1e-4),
    min_p=st.none() | st.sampled_from([0.0, 0.0313, 0.223, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 2.0, 0.5]),
)
GREEDY = st.builds(SamplingParameters, max_new_tokens=st.just(2), repetition_penalty=st.sampled_from([1.0, 2.0]))
ROWS = st.lists(st.tuples(LOGITS, FILTERS | GREEDY, st.sets(st.integers(0, CLASSES - 1))), min_size=1, max_size=5)


@given(ROWS)
@settings(max_examples=200)
def test_distribution_of_every_row_is_its_own(rows: list[tuple[list[float], SamplingParameters, set[int]]]) -> None:
    logits = torch.tensor([each for each, _, _ in rows])
    seen = torch.tensor([[token in each for token in range(CLASSES)] for _, _, each in rows])
    got = distribution(logits, rows_of([each for _, each, _ in rows]), seen)
    expected = torch.tensor([reference(*row) for row in rows])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(got > 0, expected > 0)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=6).filter(any))
@settings(max_examples=50)
def test_draws_have_the_distribution(weights: list[int]) -> None:
    """Evenly spaced uniform numbers hit each class exactly as often as its probability says."""
    total = sum(weights)
    uniforms = (torch.arange(total, dtype=torch.float64) + 0.5) / total
    drawn = draw(torch.tensor([weights], dtype=torch.float32).expand(total, -1), uniforms)
    assert drawn.bincount(minlength=len(weights)).tolist() == weights


def test_the_largest_uniform_number_draws_no_impossible_token() -> None:
    probabilities = torch.zeros(1, 50_000)
    probabilities[0, 3:40_000] = 1 / 39_997
    for uniform, token in ((0.0, 3), (math.nextafter(1.0, 0.0), 39_999)):
        assert draw(probabilities, torch.tensor([uniform], dtype=torch.float64)).item() == token


def test_a_large_vocabulary() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 50_257) * 4
    top_p = torch.tensor([0.3, 0.9, 1.0])
    got = distribution(logits, Settings(torch.ones(3), top_p=top_p))
    ordered = logits.double().softmax(-1).sort(descending=True).values
    for row, p in enumerate([0.3, 0.9]):
        assert int((got[row] > 0).sum()) == int((ordered[row].cumsum(-1) < p).sum()) + 1
    torch.testing.assert_close(got[2], logits[2].softmax(-1))


def test_log_probabilities() -> None:
    logits, tokens = torch.randn(4, 9), torch.tensor([0, 8, 3, 3])
    torch.testing.assert_close(log_probabilities(logits, tokens), logits.log_softmax(-1)[range(4), tokens])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more; got 0"),
        ({"temperature": -1.0}, "temperature must be 0, or 1e-6 or more"),
        ({"temperature": 1e-40}, "temperature must be 0, or 1e-6 or more; got 1e-40"),
        ({"temperature": float("nan")}, "temperature must be 0, or 1e-6 or more"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be 1 or more, or None"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"temperature": 1.0, "min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be positive"),
        ({"temperature": 1.0, "seed": -1}, "seed must be in"),
        ({"stop": "end"}, "stop must be a sequence of strings"),
        ({"stop": [""]}, "none of them empty"),
        ({"top_k": 5}, "top_k has no effect at temperature 0; got 5"),
        ({"seed": 5}, "seed has no effect at temperature 0; got 5"),
    ],
)
def test_parameters_out_of_range_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParameters(**given)
