"""Encoding by pieces and words gives the tokenizer's tokens, whatever the cache holds or has dropped."""

import numpy as np
import pytest

from fastformer.data.pretraining import encoding
from fastformer.data.pretraining.encoding import TextEncoder
from fastformer.data.pretraining.tokenizer import train_tokenizer

TEXTS = ["the cat sat on the mat, and the dog's bone lay there", "they'll see 42 dogs  in 1999.\n\tThe end"]
ALPHABETS = {
    "odd": [*" \n\t\x1c\x85\xa0\u2003\u180e\u200bab'sé1二,.[]<", "[MASK]", "</s>", " the"],
    "ascii": [*map(chr, range(128)), *" '   ", "'ll", "'ve", "the"],
    "white space": [*" \n\t\r\x0b\x0c\x1f", "a"],
}


def texts_of(alphabet: str, number: int = 1000) -> list[str]:
    random = np.random.default_rng(0)
    return ["".join(random.choice(ALPHABETS[alphabet], random.integers(0, 30))) for _ in range(number)]


def assert_encodes(encoder: TextEncoder, tokenizer, texts: list[str]) -> None:
    ids, lengths = encoder.encode(texts)
    for text, part in zip(texts, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        assert part.tolist() == tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_encoding_by_piece_is_that_of_the_tokenizer(objective, alphabet):
    tokenizer = train_tokenizer([*TEXTS, *texts_of(alphabet)], 500, objective)
    assert_encodes(TextEncoder(tokenizer), tokenizer, texts_of(alphabet))


def test_what_was_forgotten_is_encoded_again(monkeypatch):
    monkeypatch.setattr(encoding, "_MOST_KEPT_TOKENS", 100)
    monkeypatch.setattr(encoding, "_CHUNK_CHARACTERS", 50)
    tokenizer = train_tokenizer(TEXTS * 3, 400, "clm")
    encoder = TextEncoder(tokenizer)
    for alphabet in ("odd", "ascii", "odd"):
        assert_encodes(encoder, tokenizer, texts_of(alphabet, 200))


def test_nothing_to_encode():
    encoder = TextEncoder(train_tokenizer(TEXTS * 3, 400, "clm"))
    for nothing in ([], [""], ["", ""]):
        ids, lengths = encoder.encode(nothing)
        assert (ids.tolist(), lengths.tolist()) == ([], [0] * len(nothing))
        assert (ids.dtype, lengths.dtype) == (np.int32, np.int64)
