from __future__ import annotations

import random

import pytest

WORDS = ("cat", "dog", "bird", "fish", "eats", "sees", "likes", "rice", "bread", "water", "milk")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command line that pretrains for seconds, with some twenty batches in an epoch."""
    folder, chosen = tmp_path_factory.mktemp("corpus"), random.Random(0)
    sentences = [" ".join(chosen.choices(WORDS, k=chosen.randint(3, 12))).capitalize() + "." for _ in range(800)]
    documents = ["\n".join(sentences[begin : begin + 8]) for begin in range(0, len(sentences), 8)]
    (folder / "text.txt").write_text("\n\n".join(documents))
    return [
        *("pretrain", "--data", str(folder / "text.txt"), "--accelerator", "cpu", "--devices", "1"),
        *("--evaluate_every", "2", "--model.learning_rate", "0.01", "--trainer.log_every_n_steps", "1"),
        *("--model.overrides.hidden_size", "16", "--model.overrides.intermediate_size", "32"),
        *("--corpus.vocab_size", "400", "--corpus.max_length", "64", "--corpus.tokens_per_batch", "256"),
        *("--corpus.cache_dir", str(folder / "cache")),
    ]
