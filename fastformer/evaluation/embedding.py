"""Retrieval metrics of embeddings: whether a text's embedding finds the text that belongs to it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def retrieval_metrics(anchors: ArrayLike, positives: ArrayLike) -> dict[str, float]:
    """Recall at 1 and 10 and the mean reciprocal rank when each anchor looks for its positive among all positives.

    Args:
        anchors, positives: (N, D) embeddings, compared by cosine; row i of both is one pair. If another positive is
            equally near, the pair's own one is ranked behind it.

    Returns:
        Metrics from 0 to 1. Recall at 1 is 1 / N by chance.
    """
    a, p = (np.asarray(rows, dtype=np.float64) for rows in (anchors, positives))
    if a.ndim != 2 or a.shape != p.shape or not len(a):
        raise ValueError(f"anchors and positives must both be (N, D); got {a.shape} and {p.shape}")
    a, p = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (a, p))
    similarity = a @ p.T
    own = np.diagonal(similarity)[:, None]
    ranks = (similarity >= own).sum(axis=1)
    return {
        "recall_at_1": float((ranks <= 1).mean()),
        "recall_at_10": float((ranks <= 10).mean()),
        "mean_reciprocal_rank": float((1 / ranks).mean()),
    }
