"""How well embeddings find the text that belongs to another."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def retrieval_metrics(anchors: ArrayLike, positives: ArrayLike) -> dict[str, float]:
    """Recall at 1 and 10 and the mean reciprocal rank when each anchor looks for its positive among all positives.

    Args:
        anchors, positives: (N, D) embeddings, row by row of one pair; compared by cosine. A tie counts against it.

    Returns:
        All from 0 to 1; chance at 1 is 1 / N.
    """
    a, p = (np.asarray(rows, dtype=np.float64) for rows in (anchors, positives))
    if a.ndim != 2 or a.shape != p.shape or not len(a):
        raise ValueError(f"anchors and positives must both be (N, D), got {a.shape} and {p.shape}")
    a, p = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (a, p))
    similarity = a @ p.T
    own = np.diagonal(similarity)[:, None]
    ranks = (similarity >= own).sum(axis=1)
    return {
        "recall_at_1": float((ranks <= 1).mean()),
        "recall_at_10": float((ranks <= 10).mean()),
        "mean_reciprocal_rank": float((1 / ranks).mean()),
    }
