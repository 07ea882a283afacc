"""Differential privacy: DP-SGD with Opacus's mechanism and accountant, and the batches that its theory requires."""

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
    `max_grad_norm`, and the clipped gradients are added up. Gaussian noise of standard deviation noise_multiplier ·
    max_grad_norm is added, and the sum is divided by the expected batch size. Each example is in a batch with the same
    probability, independently of all others.

    Each example has its own backward pass. This works for any model, with fused operators and packed batches too, and
    needs memory for one example's gradient. Anyone who knows the seed knows the noise, so keep the seed secret.

    Args:
        epsilon: the budget of the whole run.
        delta: None for 0.1 / number of examples.
        max_grad_norm: largest norm of one example's gradient.
        batch_size: mean number of examples in a batch.

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
        """Return the mechanism that clips, sums and adds noise to gradients, so that the run keeps its budget.

        Args:
            optimizer: the optimizer of the parameters; its step follows the mechanism.
            examples: number of training examples.
            steps: number of steps of the whole run.
        """
        from opacus.optimizers import DPOptimizer

        return DPOptimizer(
            optimizer,
            noise_multiplier=self.noise_multiplier(examples, steps),
            max_grad_norm=self.max_grad_norm,
            expected_batch_size=min(self.batch_size, examples),
        )

    def noise_multiplier(self, examples: int, steps: int) -> float:
        """Return the smallest noise multiplier that keeps the budget for `steps` steps, to 0.01 of epsilon."""
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
        """Return the epsilon spent after `steps` steps."""
        from opacus.accountants import RDPAccountant

        accountant = RDPAccountant()
        accountant.history = [(noise_multiplier, self.sample_rate(examples), steps)]
        with _quiet_about_orders():
            return accountant.get_epsilon(delta=self.delta_for(examples))

    def delta_for(self, examples: int) -> float:
        """Return `delta`, or its default."""
        return 0.1 / examples if self.delta is None else self.delta

    def sample_rate(self, examples: int) -> float:
        """Return the probability of each example to be in a batch."""
        return min(1.0, self.batch_size / examples)


def accumulate_example(mechanism: DPOptimizer) -> None:
    """Clip the gradient of one example, from the last backward pass, and add it to the batch's sum."""
    for parameter in mechanism.params:
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad_sample = gradient.unsqueeze(0)
        parameter.grad = None
    mechanism.clip_and_accumulate()


def noised_gradients(mechanism: DPOptimizer) -> None:
    """Set the gradients to the mean of the batch's clipped gradients plus noise; for an empty batch, to noise alone."""
    for parameter in mechanism.params:
        if parameter.summed_grad is None:
            parameter.summed_grad = torch.zeros_like(parameter)
            parameter.grad_sample = torch.zeros_like(parameter).unsqueeze(0)
    mechanism.add_noise()
    mechanism.scale_grad()
    for parameter in mechanism.params:
        parameter.grad_sample = parameter.summed_grad = None


class PoissonBatches:
    """Batches for `Privacy`, each a list of batches of one example; they depend only on the seed and the step.

    Args:
        examples: the training examples.
        collate: makes a batch of examples.
        sample_rate: the probability of each example to be in a batch.
        seed: determines the draws.
        steps_done: returns the number of finished steps, in all and in this epoch; called when an epoch begins.
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
        """Return an empty state, which tells Lightning that an epoch can resume in the middle."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        return None


class _quiet_about_orders(warnings.catch_warnings):  # noqa: N801
    """A context without the accountant's hint that other orders might give a slightly tighter bound."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", message="Optimal order is the .* alpha")
        return entered
