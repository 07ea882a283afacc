"""Differential privacy: DP-SGD with Opacus's mechanism and accountant, and the batches that its theory is about."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from opacus.optimizers import DPOptimizer


@dataclass(frozen=True)
class Privacy:
    """(epsilon, delta)-differential privacy of the training examples.

    Abadi et al., "Deep Learning with Differential Privacy" (2016): each example's gradient is clipped to norm
    `max_grad_norm`, the clipped ones are added, Gaussian noise of standard deviation noise_multiplier · max_grad_norm
    is added, and the sum divided by the expected batch size. Each example is in a batch with the same probability,
    independently of all others.

    Gradients per example come from one backward pass for each: this holds for any model, fused operators and packed
    batches too, and takes memory for one. Whoever knows the seed knows the noise: keep it to yourself.

    Args:
        epsilon: the budget of the whole run.
        delta: None for one tenth of one over the number of examples.
        max_grad_norm: of one example.
        batch_size: examples in a batch on average.

    Raises:
        ValueError: an argument is out of range.
    """

    epsilon: float
    delta: float | None = None
    max_grad_norm: float = 1.0
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("epsilon", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0; got {getattr(self, name)}")
        if self.delta is not None and not 0 < self.delta < 1:
            raise ValueError(f"delta must be in (0, 1); got {self.delta}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more; got {self.batch_size}")

    def mechanism(self, optimizer: torch.optim.Optimizer, examples: int, steps: int) -> DPOptimizer:
        """Clips, adds up and noises the gradients of `optimizer`'s parameters so that the run keeps to the budget.

        Args:
            optimizer: whose step is taken afterwards.
            examples: to train on.
            steps: of the whole run.
        """
        from opacus.optimizers import DPOptimizer

        return DPOptimizer(
            optimizer,
            noise_multiplier=self.noise_multiplier(examples, steps),
            max_grad_norm=self.max_grad_norm,
            expected_batch_size=min(self.batch_size, examples),
        )

    def noise_multiplier(self, examples: int, steps: int) -> float:
        """The least that reaches the budget after so many steps, to 0.01 of epsilon."""
        from opacus.accountants.utils import get_noise_multiplier

        with _quiet_about_orders():
            return get_noise_multiplier(
                target_epsilon=self.epsilon,
                target_delta=self.delta_for(examples),
                sample_rate=self.sample_rate(examples),
                steps=steps,
                accountant="rdp",
            )

    def spent(self, noise_multiplier: float, examples: int, steps: int) -> float:
        """The epsilon of a run of so many steps."""
        from opacus.accountants import RDPAccountant

        accountant = RDPAccountant()
        accountant.history = [(noise_multiplier, self.sample_rate(examples), steps)]
        with _quiet_about_orders():
            return accountant.get_epsilon(delta=self.delta_for(examples))

    def delta_for(self, examples: int) -> float:
        """`delta`, or its default."""
        return 0.1 / examples if self.delta is None else self.delta

    def sample_rate(self, examples: int) -> float:
        """The probability with which each example is in a batch."""
        return min(1.0, self.batch_size / examples)


def accumulate_example(mechanism: DPOptimizer) -> None:
    """Clip the gradient of one example, which a backward pass has left, and add it to the batch's."""
    for parameter in mechanism.params:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad_sample = gradient.unsqueeze(0)
        parameter.grad = None
    mechanism.clip_and_accumulate()


def noised_gradients(mechanism: DPOptimizer) -> None:
    """Make the noised mean of the batch's clipped gradients the gradients; of an empty batch, noise alone."""
    for parameter in mechanism.params:
        if parameter.summed_grad is None:
            parameter.summed_grad = torch.zeros_like(parameter)
            parameter.grad_sample = torch.zeros_like(parameter).unsqueeze(0)
    mechanism.add_noise()
    mechanism.scale_grad()
    for parameter in mechanism.params:
        parameter.grad_sample = parameter.summed_grad = None


class PoissonBatches:
    """Batches for `Privacy`, each a list of batches of one example, a function of the seed and the step alone.

    Args:
        examples: to train on.
        collate: makes a batch of some.
        sample_rate: the probability of each to be in a batch.
        seed: of the draws.
        steps_done: the steps trained on so far, in all and in this epoch, asked for when an epoch begins.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        collate: Callable[[list[Any]], Any],
        sample_rate: float,
        seed: int,
        steps_done: Callable[[], tuple[int, int]],
    ) -> None:
        self.examples = examples
        self.collate = collate
        self.sample_rate = sample_rate
        self.seed = seed
        self.steps_done = steps_done

    def __len__(self) -> int:
        return math.ceil(1 / self.sample_rate)

    def __iter__(self) -> Iterator[list[Any]]:
        step, of_this_epoch = self.steps_done()
        for number in range(step, step + len(self) - of_this_epoch):
            draws = np.random.default_rng([self.seed, number]).random(len(self.examples))
            yield [self.collate([self.examples[index]]) for index in np.flatnonzero(draws < self.sample_rate).tolist()]

    def state_dict(self) -> dict[str, Any]:
        """Empty: tells Lightning that an epoch goes on where it was left."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        return None


class _quiet_about_orders(warnings.catch_warnings):  # noqa: N801
    """Without the accountant's hint that other orders might give a slightly tighter bound."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", message="Optimal order is the .* alpha")
        return entered
