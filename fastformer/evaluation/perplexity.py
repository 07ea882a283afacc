"""Perplexity of a language model on a text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastformer.evaluation.checks import check_as_many


def corpus_perplexity(log_likelihoods: Sequence[float], tokens: Sequence[int]) -> float:
    """The exponential of the mean negative log-likelihood of all tokens; infinity if it is too large for a float.

    Args:
        log_likelihoods: the sum over the predicted tokens of each text, in nats.
        tokens: the number of predicted tokens of each text; at least one in total.
    """
    check_as_many(log_likelihoods, tokens)
    total = sum(tokens)
    if total < 1 or min(tokens) < 0:
        raise ValueError(f"tokens must not be negative and must sum to at least one; got a sum of {total}")
    mean = -math.fsum(log_likelihoods) / total
    return math.exp(mean) if mean < 700 else math.inf
