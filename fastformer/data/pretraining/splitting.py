"""Hold documents out. The split depends on their text alone, so two copies of a document are never separated."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_KEYS = 1 << 64
_TOKENIZER_TRAINING_CHARACTERS = 1 << 28


def document_key(text: str) -> int:
    """Return a 64-bit hash of a document, without its white space."""
    return int.from_bytes(hashlib.blake2b("".join(text.split()).encode(), digest_size=8).digest(), "big")


class Split(NamedTuple):
    """A rule that decides for any document whether it is held out.

    Attributes:
        heldout_below: documents with a lower key are held out.
        sample_from: documents with at least this key form the sample on which a tokenizer is trained.
    """

    heldout_below: int
    sample_from: int

    def is_heldout(self, text: str) -> bool:
        return document_key(text) < self.heldout_below

    def is_for_training(self, text: str) -> bool:
        return not self.is_heldout(text)

    def is_sampled(self, text: str) -> bool:
        return document_key(text) >= max(self.heldout_below, self.sample_from)


def find_split_and_sample(texts: Iterable[str], heldout_fraction: float) -> tuple[Split, list[str]]:
    """Read the documents once; return the split, and the sample to train a tokenizer on.

    The distinct documents with the lowest keys are held out: ``max(1, round(heldout_fraction * distinct))`` of them,
    whatever the order of the documents. The sample has the documents with the highest keys, in the given order: at most
    about 256 million characters. Of the other documents, only 8 bytes each are kept in memory.

    Raises:
        ValueError: `heldout_fraction` is out of range, or is above 0 with fewer than two distinct documents.
    """
    _check_fraction(heldout_fraction)
    keys = array("Q")
    sample = _Sample(_TOKENIZER_TRAINING_CHARACTERS)
    for text in texts:
        keys.append(document_key(text))
        sample.add(keys[-1], text)
    split = Split(_heldout_below(np.frombuffer(keys, np.uint64), heldout_fraction), sample.lowest_key)
    return split, [text for key, text in sample.kept if key >= max(split.heldout_below, split.sample_from)]


class _Sample:
    """The documents with the highest keys, as many as make up about `limit` characters."""

    def __init__(self, limit: int) -> None:
        self.kept: list[tuple[int, str]] = []
        self._limit = limit
        self._characters_kept = 0
        self._characters = 0
        self._most_kept = 1.25 * limit

    @property
    def lowest_key(self) -> int:
        """The lowest key that belongs to the sample, given the documents added so far."""
        return int((1 - min(1.0, self._limit / max(self._characters, 1))) * _KEYS)

    def add(self, key: int, text: str) -> None:
        self._characters += len(text)
        self.kept.append((key, text))
        self._characters_kept += len(text)
        if self._characters_kept > self._most_kept:
            lowest = self.lowest_key
            self.kept = [(key, text) for key, text in self.kept if key >= lowest]
            self._characters_kept = sum(len(text) for _, text in self.kept)
            # Without this, after one very long document, each new document would start another pass over all kept ones.
            self._most_kept = max(self._most_kept, 1.25 * self._characters_kept)


def _heldout_below(keys: NDArray[np.uint64], heldout_fraction: float) -> int:
    if heldout_fraction == 0:
        return 0
    distinct = np.unique(keys)
    if len(distinct) < 2:
        raise ValueError(
            f"heldout_fraction={heldout_fraction} of {len(distinct)} distinct document(s) leaves nothing to train on; "
            "separate documents by blank lines, or set heldout_fraction=0"
        )
    count = min(max(1, math.floor(heldout_fraction * len(distinct) + 0.5)), len(distinct) - 1)
    return int(distinct[count])


def _check_fraction(heldout_fraction: float) -> None:
    if not 0 <= heldout_fraction < 1:
        raise ValueError(f"heldout_fraction must be in [0, 1), got {heldout_fraction}")
