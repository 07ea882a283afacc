"""Random generators for examples: each number depends only on seed, purpose, epoch and example."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """The purposes of random numbers; the streams of two purposes are independent."""

    PAIRS = 0
    TRUNCATION = 1
    MASKS = 2
    ORDER = 3
    BLOCKS = 4


def generator(seed: int, stream: Stream, epoch: int, index: int) -> np.random.Generator:
    """Return a counter-based generator (Philox; Salmon et al., 2011) for one purpose, epoch and index."""
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([0, 0, index, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
