"""Choice of the next tokens from logits, for all rows of a batch at once, each with its own settings."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEGATIVE_INFINITY = float("-inf")
_BITS_OF_ONE = 0x3F800000
"""The bits of float32 1.0. Probabilities' bits, read as integers, keep their order and are at most this."""


class Settings(NamedTuple):
    """`SamplingParameters` of each row as tensors (rows,); None if no row uses one.

    Attributes:
        temperature: 0 in greedy rows; None if all rows are greedy.
        top_k: the number of classes in rows without top_k.
        largest_k: the largest `top_k` or more, on the host: rounded up to a power of two, if there are as many classes.
        top_p: 1 in rows without top_p.
        min_p: 0 in rows without min_p.
        repetition_penalty: 1 in rows without it.
    """

    temperature: Tensor | None = None
    top_k: Tensor | None = None
    largest_k: int = 0
    top_p: Tensor | None = None
    min_p: Tensor | None = None
    repetition_penalty: Tensor | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """A key that is equal for settings that need the same operations."""
        return tuple(value is None if name != "largest_k" else value for name, value in self._asdict().items())


def choose(logits: Tensor, settings: Settings, seen: Tensor | None, uniforms: Tensor) -> Tensor:
    """Choose a token for each row, (rows,) int64; see `distribution` and `draw`."""
    if settings.temperature is None:
        return penalise(logits, settings, seen).argmax(-1)
    return draw(distribution(logits, settings, seen), uniforms)


def distribution(logits: Tensor, settings: Settings, seen: Tensor | None = None) -> Tensor:
    """Return the distribution of each row's token, (rows, classes) float32; 1 for the likeliest in greedy rows.

    Args:
        logits: (rows, classes).
        settings: the settings of the rows.
        seen: (rows, classes) boolean, the classes that the repetition penalty applies to.
    """
    logits = penalise(logits.float(), settings, seen)
    greedy = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if settings.temperature is None:
        return greedy
    is_greedy = (settings.temperature == 0.0)[:, None]
    scores = logits / settings.temperature[:, None].masked_fill(is_greedy, 1.0)
    if settings.top_k is not None:
        scores = _keep_top_k(scores, settings.top_k, settings.largest_k)
    probabilities = scores.softmax(-1)
    if settings.top_p is not None:
        probabilities = _keep_top_p(probabilities, settings.top_p)
    if settings.min_p is not None:
        least = settings.min_p[:, None] * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    return torch.where(is_greedy, greedy, probabilities / probabilities.sum(-1, keepdim=True))


def penalise(logits: Tensor, settings: Settings, seen: Tensor | None) -> Tensor:
    """Apply the repetition penalty to the logits of the classes that each row has seen."""
    if settings.repetition_penalty is None or seen is None:
        return logits
    penalty = settings.repetition_penalty[:, None]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Return the class of each row in which its uniform number falls.

    Args:
        probabilities: (rows, classes) float32; they need not sum to one.
        uniforms: (rows,) float64 in [0, 1).

    Returns:
        (rows,) int64, never a class of probability zero.
    """
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    # Keep the number below one by more than rounding, so that the product stays below the sum.
    place = uniforms.clamp(max=1.0 - 2.0**-40)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, place, right=True).squeeze(-1)


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of `tokens` (rows,) under `logits` (rows, classes), (rows,) float32."""
    logits = logits.float()
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _keep_top_k(scores: Tensor, top_k: Tensor, largest_k: int) -> Tensor:
    largest = scores.topk(largest_k, dim=-1).values
    last = (top_k.clamp(max=largest_k) - 1)[:, None]
    # Rows without top_k keep all classes.
    least = largest.gather(-1, last).masked_fill((top_k >= scores.shape[-1])[:, None], NEGATIVE_INFINITY)
    return scores.masked_fill(scores < least, NEGATIVE_INFINITY)


def _keep_top_p(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """Keep the top_p classes by bisection on the smallest kept probability: cheaper than sorting a vocabulary."""
    as_integers = probabilities.view(torch.int32)
    low = torch.zeros(len(probabilities), 1, dtype=torch.int32, device=probabilities.device)
    high = torch.full_like(low, _BITS_OF_ONE + 1)
    # Invariant: keeping probabilities of at least `low` is enough, keeping those of at least `high` is not.
    for _ in range(_BITS_OF_ONE.bit_length()):
        middle = (low + high) // 2
        enough = probabilities.masked_fill(as_integers < middle, 0.0).sum(-1, keepdim=True) >= top_p[:, None]
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    # Rounding must not remove classes from a row without top_p.
    return probabilities.masked_fill((as_integers < low) & (top_p < 1.0)[:, None], 0.0)
