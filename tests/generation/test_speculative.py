"""The rule that accepts drafted tokens leaves the distribution exactly as it is."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastformer.generation.speculative import verify

CLASSES = 4


def middles(count: int) -> torch.Tensor:
    """Return `count` evenly spaced numbers in [0, 1): the middles of the intervals of length 1 / count."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


WEIGHTS = st.lists(st.integers(0, 6), min_size=CLASSES, max_size=CLASSES).filter(any)


@given(WEIGHTS, WEIGHTS)
@settings(max_examples=60)
def test_the_first_token_has_the_target_s_distribution(proposal: list[int], target: list[int]) -> None:
    """The first token has the target's distribution.

    The test sums over all drafts and, with evenly spaced numbers, over all ways to be accepted and drawn again.
    """
    p = [Fraction(weight, sum(target)) for weight in target]
    q = [Fraction(weight, sum(proposal)) for weight in proposal]
    above = [max(a - b, Fraction(0)) for a, b in zip(p, q, strict=True)]
    again = math.lcm(*(fraction.denominator for fraction in (x / (sum(above) or 1) for x in above)))
    got = [Fraction(0)] * CLASSES
    for drafted, probability in enumerate(q):
        if not probability:
            continue
        accepting = (p[drafted] / probability).denominator
        grid = torch.meshgrid(middles(accepting), middles(again), indexing="ij")
        acceptance, final = (each.flatten() for each in grid)
        rows = len(acceptance)
        tokens, counts = verify(
            torch.full((rows, 1), drafted),
            torch.tensor([list(map(float, q))]).expand(rows, 1, -1),
            torch.tensor([list(map(float, p)), [0.0, 0.0, 0.0, 1.0]]).expand(rows, 2, -1),
            torch.ones(rows, dtype=torch.int64),
            acceptance[:, None],
            torch.stack([final, final], dim=1),
        )
        assert torch.equal(tokens[counts == 2, 1], torch.full((int((counts == 2).sum()),), 3))
        for token, count in enumerate(tokens[:, 0].bincount(minlength=CLASSES).tolist()):
            got[token] += probability * Fraction(count, rows)
    assert got == p


def test_acceptance_stops_at_the_first_rejection_and_at_what_is_usable() -> None:
    sure = torch.eye(CLASSES)
    drafted = torch.tensor([[0, 1, 2]]).expand(4, -1)
    proposals = sure[drafted]
    targets = sure[torch.tensor([[0, 1, 2, 3], [0, 3, 2, 3], [3, 1, 2, 3], [0, 1, 2, 3]])]
    half = torch.full((4, 4), 0.5, dtype=torch.float64)
    tokens, counts = verify(drafted, proposals, targets, torch.tensor([3, 3, 3, 1]), half[:, :3], half)
    assert counts.tolist() == [4, 2, 1, 2]
    got = [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)]
    assert got == [[0, 1, 2, 3], [0, 3], [3], [0, 1]]


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_equal_distributions_accept_everything(uniform: float) -> None:
    same = torch.rand(5, 3, 11).softmax(-1)
    drafted = torch.randint(11, (5, 2))
    uniforms = torch.full((5, 3), uniform, dtype=torch.float64)
    _, counts = verify(drafted, same[:, :2], same, torch.full((5,), 2), uniforms[:, :2], uniforms)
    assert counts.tolist() == [3] * 5
