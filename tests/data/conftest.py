from __future__ import annotations

import pytest
from random_text import random_documents

from fastformer.data.pretraining.tokenized import TokenizedCorpus, tokenize
from fastformer.data.pretraining.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def documents() -> list[list[str]]:
    return random_documents(seed=1, count=200, sentences=20, words=12)


@pytest.fixture(scope="session")
def tokenizer(documents):
    return train_tokenizer([sentence for document in documents for sentence in document], 400)


@pytest.fixture(scope="session")
def corpus(documents, tokenizer) -> TokenizedCorpus:
    return tokenize(documents, tokenizer)
