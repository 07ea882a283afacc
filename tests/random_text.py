"""Random text that a tokenizer can be trained on."""

from __future__ import annotations

import numpy as np

# fmt: off
WORDS = [
    "when", "the", "module", "reads", "a", "file", "it", "returns", "each", "line", "of", "text", "as", "bytes",
    "unless", "an", "encoding", "is", "given",
]
# fmt: on


def random_documents(seed: int, count: int, sentences: int, words: int) -> list[list[str]]:
    """Return `count` documents of 1 to `sentences` sentences of 1 to `words` words; no sentence occurs twice."""
    random = np.random.default_rng(seed)

    def sentence(number: int) -> str:
        return " ".join(random.choice(WORDS, random.integers(1, words + 1))).capitalize() + f" {number}."

    sizes = random.integers(1, sentences + 1, size=count).tolist()
    starts = np.cumsum([0, *sizes]).tolist()
    return [[sentence(start + n) for n in range(size)] for start, size in zip(starts, sizes, strict=False)]
