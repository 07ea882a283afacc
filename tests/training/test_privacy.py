"""Tests of differential privacy: the mechanism is DP-SGD's, the noise reaches the budget, the batches are Poisson's."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from fastformer.training.privacy import PoissonBatches, Privacy, accumulate_example, noised_gradients


@pytest.mark.parametrize(("epsilon", "examples", "steps"), [(1.0, 1000, 100), (8.0, 5000, 300)])
def test_noise_reaches_the_budget_and_no_more(epsilon: float, examples: int, steps: int) -> None:
    privacy = Privacy(epsilon, batch_size=50)
    noise = privacy.noise_multiplier(examples, steps)
    assert epsilon - 0.02 < privacy.spent(noise, examples, steps) <= epsilon
    assert privacy.spent(0.9 * noise, examples, steps) > epsilon


def gradients(model: nn.Module, rows: torch.Tensor, privacy: Privacy, noise: float) -> list[torch.Tensor]:
    mechanism = privacy.mechanism(torch.optim.SGD(model.parameters(), lr=1.0), examples=1000, steps=10)
    mechanism.noise_multiplier = noise
    for row in rows:
        model(row).sum().backward()
        accumulate_example(mechanism)
    noised_gradients(mechanism)
    return [parameter.grad for parameter in model.parameters()]


def test_each_gradient_is_clipped_and_the_sum_divided() -> None:
    model = nn.Linear(3, 1)
    rows = torch.tensor([[0.1, 0.2, 0.2], [30.0, 40.0, 0.0]])
    weight, bias = gradients(model, rows, Privacy(1.0, max_grad_norm=1.2, batch_size=4), noise=0.0)
    # The gradient of a row is (row, 1). The norms are 1.044 and 50.01, so only the second is clipped, to 1.2.
    factors = (1.0, 1.2 / (30**2 + 40**2 + 1) ** 0.5)
    expected = sum(factor * row for factor, row in zip(factors, rows, strict=True)) / 4
    torch.testing.assert_close(weight, expected.unsqueeze(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(bias, torch.tensor([sum(factors) / 4]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rows", [0, 3])
def test_noise_has_the_standard_deviation_of_the_theory(rows: int) -> None:
    """With zero gradients, and with an empty batch, only noise is left.

    Its deviation is noise_multiplier · max_grad_norm / batch_size.
    """
    torch.manual_seed(0)
    model = nn.Linear(20_000, 1, bias=False)
    (noise,) = gradients(model, torch.zeros(rows, 20_000), Privacy(1.0, max_grad_norm=0.5, batch_size=8), noise=3.0)
    assert noise.std().item() == pytest.approx(3.0 * 0.5 / 8, rel=0.03)
    assert abs(noise.mean().item()) < 4 * 3.0 * 0.5 / 8 / 20_000**0.5


def test_a_parameter_without_gradient_gets_noise_alone() -> None:
    model = nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)])
    mechanism = Privacy(1.0).mechanism(torch.optim.SGD(model.parameters(), lr=1.0), examples=100, steps=10)
    model[0](torch.ones(2)).backward()
    accumulate_example(mechanism)
    noised_gradients(mechanism)
    assert model[1].weight.grad.abs().min() > 0


def batches(seed: int, done: int = 0, of_this_epoch: int = 0) -> PoissonBatches:
    return PoissonBatches(range(1000), lambda examples: examples[0], 0.05, seed, lambda: (done, of_this_epoch))


def test_examples_are_drawn_independently_with_the_same_probability() -> None:
    drawn = [list(batch) for start in range(0, 400, 20) for batch in batches(3, done=start)]
    assert len(drawn) == 400
    sizes = [len(batch) for batch in drawn]
    counts = np.bincount(list(itertools.chain.from_iterable(drawn)), minlength=1000)
    variance = 0.05 * 0.95
    assert np.mean(sizes) == pytest.approx(50, abs=4 * (1000 * variance / 400) ** 0.5)
    assert np.var(sizes) == pytest.approx(1000 * variance, rel=0.3)
    assert np.var(counts) == pytest.approx(400 * variance, rel=0.2)


def test_batches_are_a_function_of_seed_and_step() -> None:
    whole = list(batches(1))
    assert len(whole) == len(batches(1)) == 20
    assert list(batches(1, done=7, of_this_epoch=7)) == whole[7:]
    assert list(batches(2)) != whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epsilon": 0.0}, "epsilon must be above 0; got 0.0"),
        ({"epsilon": 1.0, "delta": 1.0}, r"delta must be in \(0, 1\); got 1.0"),
        ({"epsilon": 1.0, "batch_size": 0}, "batch_size must be 1 or more; got 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Privacy(**arguments)
