"""Turn texts into token ids, fast: words that were tokenized before are looked up."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Encoded = tuple[NDArray[np.int32], NDArray[np.int64]]
"""All tokens of all texts in one array, and their number in each text."""

# GPT-2's pattern never joins the two sides of such a place: it joins white space only to what follows.
_PIECE_BORDER = re.compile(r"(?<=\S)(?=[ \t\n\r])")
# GPT-2's pattern for ASCII text, where Python's `re` can express letters, digits and white space.
_ASCII_WORD = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^ \t-\rA-Za-z0-9]+|[ \t-\r]+(?![^ \t-\r])|[ \t-\r]+"
)
_ASCII_BYTES = {byte: 256 + byte for byte in range(33)} | {127: 256 + 33}
"""Maps ASCII's unprintable characters to the characters that stand for them in a byte-level vocabulary."""

_SPACES = (" ", "\t", "\n", "\r")

_CHUNK_CHARACTERS = 1 << 20
_MOST_KEPT_TOKENS = 1 << 19


class TextEncoder:
    """Encode texts without adding special tokens; special tokens spelled out in a text are plain text.

    With a byte-level BPE tokenizer without a normalizer, as `train_tokenizer` makes, the tokens of a word depend on
    the word alone. Texts are divided at white space into pieces, and known pieces are looked up. New pieces are divided
    into words, and known words are looked up. The result equals the tokenizer's. Any other tokenizer gets whole texts.
    Apart from the result, memory does not grow with the number of texts or calls.

    Args:
        tokenizer: a fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        from tokenizers import Tokenizer

        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.encode_special_tokens = True
        self._backend.no_padding()
        self._backend.no_truncation()
        self._model = self._backend.model
        self._pieces = _Lexicon(self._piece_tokens)
        self._words = _Lexicon(self._word_tokens)
        self._encode = self._by_piece if _is_byte_level(self._backend) else self._whole

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the ids of all texts, (T,), and the number of tokens of each text, (N,)."""
        encoded = [self._encode(chunk) for chunk in _chunks(texts)]
        ids = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in encoded)])
        return ids, np.concatenate([np.zeros(0, np.int64), *(lengths for _, lengths in encoded)])

    def _by_piece(self, texts: Sequence[str]) -> Encoded:
        pieces = list(map(_PIECE_BORDER.split, texts))
        ids, lengths = self._pieces.look_up(list(chain.from_iterable(pieces)))
        return ids, _sums(lengths, np.fromiter(map(len, pieces), np.int64, len(pieces)))

    def _piece_tokens(self, pieces: Sequence[str]) -> _Tokens:
        # Pieces that begin and end as inside a text are joined, and divided into words as one text.
        joins = np.array([piece.isascii() and piece[:1] in _SPACES and not piece[-1:].isspace() for piece in pieces])
        joined = [piece for piece, joins_others in zip(pieces, joins, strict=True) if joins_others]
        words = _ASCII_WORD.findall("".join(joined))
        word_ends = np.cumsum(np.fromiter(map(len, words), np.int64, len(words)))
        piece_ends = np.cumsum(np.fromiter(map(len, joined), np.int64, len(joined)))
        ids, word_lengths = self._words.look_up(words)
        other_ids, other_lengths = self._whole(
            [piece for piece, joins_others in zip(pieces, joins, strict=True) if not joins_others]
        )
        lengths = np.zeros(len(pieces), np.int64)
        starts = np.zeros(len(pieces), np.int64)
        lengths[joins] = _sums(word_lengths, np.diff(np.searchsorted(word_ends, piece_ends, side="right"), prepend=0))
        lengths[~joins] = other_lengths
        starts[joins] = _starts(lengths[joins])
        starts[~joins] = len(ids) + _starts(other_lengths)
        return _Tokens(np.concatenate([ids, other_ids]), starts, lengths)

    def _word_tokens(self, words: Sequence[str]) -> _Tokens:
        tokens = [self._model.tokenize(word.translate(_ASCII_BYTES)) for word in words]
        ids, lengths = _flat([[token.id for token in of_word] for of_word in tokens])
        return _Tokens(ids, _starts(lengths), lengths)

    def _whole(self, texts: Sequence[str]) -> Encoded:
        return _flat([encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)])


class _Tokens(NamedTuple):
    """The tokens of several strings: string s has ``ids[starts[s] : starts[s] + lengths[s]]``."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def joined(self, others: _Tokens) -> _Tokens:
        return _Tokens(
            np.concatenate([self.ids, others.ids]),
            np.concatenate([self.starts, len(self.ids) + others.starts]),
            np.concatenate([self.lengths, others.lengths]),
        )


_NO_TOKENS = _Tokens(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))


class _Numbers(dict[str, int]):
    """A dictionary that numbers strings from 0 in the order of their first look-up."""

    def __missing__(self, string: str) -> int:
        number = self[string] = len(self)
        return number


class _Lexicon:
    """A cache of strings and their tokens; it is emptied when it holds too many.

    Args:
        tokens: tokenizes strings that are not in the cache.
    """

    def __init__(self, tokens: Callable[[Sequence[str]], _Tokens]) -> None:
        self._find = tokens
        self._numbers = _Numbers()
        self._kept = _NO_TOKENS

    def look_up(self, strings: Sequence[str]) -> Encoded:
        """Return the ids of all strings, (T,), and the number of tokens of each string, (N,)."""
        if len(self._kept.ids) > _MOST_KEPT_TOKENS:
            self._numbers, self._kept = _Numbers(), _NO_TOKENS
        known = len(self._numbers)
        numbers = np.fromiter(map(self._numbers.__getitem__, strings), np.int64, len(strings))
        if len(self._numbers) > known:
            new = self._find(list(islice(self._numbers, known, None)))
            self._kept = self._kept.joined(new)
        lengths = self._kept.lengths[numbers]
        moves = self._kept.starts[numbers] - _starts(lengths)
        return self._kept.ids[np.arange(lengths.sum()) + np.repeat(moves, lengths)], lengths


def _is_byte_level(backend: object) -> bool:
    from tokenizers import models, pre_tokenizers

    pre_tokenizer = backend.pre_tokenizer  # type: ignore[attr-defined]
    return (
        isinstance(backend.model, models.BPE)  # type: ignore[attr-defined]
        and isinstance(pre_tokenizer, pre_tokenizers.ByteLevel)
        and pre_tokenizer.use_regex
        and not pre_tokenizer.add_prefix_space
        and backend.normalizer is None  # type: ignore[attr-defined]
        and all(token.special for token in backend.get_added_tokens_decoder().values())  # type: ignore[attr-defined]
    )


def _chunks(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Group neighbouring texts into chunks of at least `_CHUNK_CHARACTERS` characters, except the last."""
    begin = characters = 0
    for end, text in enumerate(texts, 1):
        characters += len(text)
        if characters >= _CHUNK_CHARACTERS or end == len(texts):
            yield texts[begin:end]
            begin, characters = end, 0


def _flat(ids: Sequence[Sequence[int]]) -> Encoded:
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the start of each of consecutive segments of these lengths."""
    return np.cumsum(lengths) - lengths


def _sums(values: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sum of each of consecutive segments of these lengths."""
    ends = np.cumsum(lengths)
    return np.diff(np.concatenate([[0], np.cumsum(values)])[np.concatenate([[0], ends])])
