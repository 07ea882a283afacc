"""Perplexity of a language model on a text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastformer.evaluation.checks import check_as_many


def corpus_perplexity(log_likelihoods: Sequence[float], tokens: Sequence[int]) -> float:
    """exp of the mean negative log-likelihood over all tokens; infinity where it is too large for a number.

    Args:
        log_likelihoods: of each text, the sum over its predicted tokens, in nats.
        tokens: how many these are; in all at least one.
    """
    check_as_many(log_likelihoods, tokens)
    total = sum(tokens)
    if total < 1 or min(tokens) < 0:
        raise ValueError(f"tokens must not be negative and at least one in all, got {total} in all")
    mean = -math.fsum(log_likelihoods) / total
    return math.exp(mean) if mean < 700 else math.inf
