from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from fastformer.data import TokenizedCorpus, tokenize, train_tokenizer

# fmt: off
WORDS = [
    "when", "the", "module", "reads", "a", "file", "it", "returns", "each", "line", "of", "text", "as", "bytes",
    "unless", "an", "encoding", "is", "given",
]
# fmt: on


def random_documents(seed: int, count: int, sentences: int, words: int) -> list[list[str]]:
    """`count` documents of 1 to `sentences` sentences of 1 to `words` words, no two sentences alike."""
    random = np.random.default_rng(seed)

    def sentence(number: int) -> str:
        return " ".join(random.choice(WORDS, random.integers(1, words + 1))).capitalize() + f" {number}."

    sizes = random.integers(1, sentences + 1, size=count).tolist()
    starts = np.cumsum([0, *sizes]).tolist()
    return [[sentence(start + n) for n in range(size)] for start, size in zip(starts, sizes, strict=False)]


@pytest.fixture(scope="session")
def documents() -> list[list[str]]:
    return random_documents(seed=1, count=200, sentences=20, words=12)


@pytest.fixture(scope="session")
def tokenizer(documents):
    return train_tokenizer([sentence for document in documents for sentence in document], 400)


@pytest.fixture(scope="session")
def corpus(documents, tokenizer) -> TokenizedCorpus:
    return tokenize(documents, tokenizer)


@pytest.fixture
def full_disk() -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """While it is entered, the kernel refuses to let any file grow beyond so many bytes."""

    @contextlib.contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit
