from __future__ import annotations

import pytest
from random_text import random_documents


@pytest.fixture(scope="session")
def documents() -> list[list[str]]:
    return random_documents(seed=1, count=200, sentences=20, words=12)
