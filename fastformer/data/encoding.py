"""Texts to token ids, fast: a word with the white space before it is tokenized once and looked up afterwards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Encoded = tuple[NDArray[np.int32], NDArray[np.int64]]
"""All tokens of all texts in one array, and their number in each text."""

# GPT-2's pattern never joins what lies on the two sides of here: white space is only ever joined to what follows it.
_PIECE_BORDER = re.compile(r"(?<=\S)(?=[ \t\n\r])")
_LONGEST_KEPT_PIECE = 64
_MOST_PIECES = 1 << 20


class TextEncoder:
    """Encodes texts without special tokens added; special tokens spelled out in a text are plain text.

    A byte-level BPE tokenizer without a normalizer, as `train_tokenizer` makes, is looked up piece by piece, with the
    very result of the tokenizer; any other is asked for whole texts.

    Args:
        tokenizer: a fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True
        self._backend.no_padding()
        self._backend.no_truncation()
        self._by_piece = _splits_at_spaces(self._backend)
        self._known: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> Encoded:
        """(T,) ids of all texts and (N,) tokens of each."""
        ids = self._ids_by_piece(texts) if self._by_piece else self._backend_ids(texts)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths

    def _ids_by_piece(self, texts: Sequence[str]) -> list[list[int]]:
        pieces = list(map(_PIECE_BORDER.split, texts))
        if len(self._known) > _MOST_PIECES:
            self._known.clear()
        known = self._known
        new = [piece for piece in set(chain.from_iterable(pieces)) if piece not in known]
        known.update(zip(new, self._backend_ids(new), strict=True))
        ids = [list(chain.from_iterable(map(known.__getitem__, of_text))) for of_text in pieces]
        for piece in new:
            if len(piece) > _LONGEST_KEPT_PIECE:
                del known[piece]
        return ids

    def _backend_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def _splits_at_spaces(backend: object) -> bool:
    from tokenizers import pre_tokenizers

    pre_tokenizer = backend.pre_tokenizer  # type: ignore[attr-defined]
    return (
        isinstance(pre_tokenizer, pre_tokenizers.ByteLevel)
        and pre_tokenizer.use_regex
        and not pre_tokenizer.add_prefix_space
        and backend.normalizer is None  # type: ignore[attr-defined]
        and all(token.special for token in backend.get_added_tokens_decoder().values())  # type: ignore[attr-defined]
    )
