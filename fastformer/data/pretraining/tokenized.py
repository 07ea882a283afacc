"""A tokenized corpus: every token of every document in one flat array, in memory or mapped from a store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastformer.data.pretraining.corpus import Document
from fastformer.data.pretraining.encoding import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TokenizedCorpus:
    """Tokens of S sentences in D documents.

    In byte-level BPE, a word's token includes the space before it. Each sentence is therefore kept in two forms: as the
    first of a segment (`opening`, without a space) and as a later one (`following`, with a space). A segment made of
    these forms has the same tokens as its sentences joined by spaces.

    Attributes:
        ids: (2 + opening tokens + following tokens,) integers: ``[CLS]``, ``[SEP]``, the opening forms of all
            sentences, then their following forms.
        opening_offsets: (S + 1,) int64: sentence s opens with ``ids[opening_offsets[s] : opening_offsets[s + 1]]``.
        following_offsets: (S + 1,) int64, likewise.
        document_offsets: (D + 1,) int64: document d has the sentences from ``document_offsets[d]`` on.
    """

    ids: NDArray[np.integer]
    opening_offsets: NDArray[np.int64]
    following_offsets: NDArray[np.int64]
    document_offsets: NDArray[np.int64]

    CLS_POSITION = 0
    SEP_POSITION = 1

    @property
    def num_documents(self) -> int:
        return len(self.document_offsets) - 1

    @property
    def num_sentences(self) -> int:
        return len(self.opening_offsets) - 1

    def segment_lengths(self, begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (N,) tokens of each segment of sentences begin to end (exclusive), 0 if begin == end."""
        first = np.minimum(begin, self.num_sentences - 1)
        opening = self.opening_offsets[first + 1] - self.opening_offsets[first]
        following = self.following_offsets[end] - self.following_offsets[first + 1]
        return np.where(end > begin, opening + following, 0)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the tokens and their layout, in hexadecimal."""
        digest = hashlib.sha256()
        for field in fields(self):
            digest.update(np.ascontiguousarray(getattr(self, field.name)).data)
        return digest.hexdigest()

    def segment(self, sentences: Sequence[int]) -> NDArray[np.integer]:
        """Return the tokens of some sentences, joined in the given order."""
        first, *others = sentences
        opening = self.ids[self.opening_offsets[first] : self.opening_offsets[first + 1]]
        following = [self.ids[self.following_offsets[s] : self.following_offsets[s + 1]] for s in others]
        return np.concatenate([opening, *following])

    def part(self, begin: int, end: int) -> TokenizedCorpus:
        """Return the documents begin to end (exclusive) as a separate corpus, whose first sentence is sentence 0."""
        first, last = self.document_offsets[begin], self.document_offsets[end]
        return TokenizedCorpus(
            self.ids,
            self.opening_offsets[first : last + 1],
            self.following_offsets[first : last + 1],
            self.document_offsets[begin : end + 1] - first,
        )


class SentenceTokens(NamedTuple):
    """Tokens of the sentences of some documents, in both forms, before they become part of a corpus."""

    opening: NDArray[np.integer]
    following: NDArray[np.integer]
    opening_lengths: NDArray[np.int64]
    following_lengths: NDArray[np.int64]
    document_lengths: NDArray[np.int64]


def tokenize(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> TokenizedCorpus:
    """Tokenize documents; sentences keep their order. Special tokens spelled out in a text are plain text.

    Raises:
        ValueError: there is no document, or a document is empty or has an empty sentence.
    """
    if not documents or not all(document and all(document) for document in documents):
        raise ValueError("documents must be at least one non-empty list of non-empty sentences")
    tokens = encode_sentences(documents, TextEncoder(tokenizer))
    special = np.array([tokenizer.cls_token_id, tokenizer.sep_token_id], dtype=np.int32)
    return TokenizedCorpus(
        ids=np.concatenate([special, tokens.opening, tokens.following]),
        opening_offsets=len(special) + offsets(tokens.opening_lengths),
        following_offsets=len(special) + len(tokens.opening) + offsets(tokens.following_lengths),
        document_offsets=offsets(tokens.document_lengths),
    )


def encode_sentences(documents: Sequence[Document], encoder: TextEncoder) -> SentenceTokens:
    """Tokenize each sentence as the first of a segment and as a later one."""
    sentences = [sentence for document in documents for sentence in document]
    opening, opening_lengths = encoder.encode(sentences)
    following, following_lengths = encoder.encode([f" {sentence}" for sentence in sentences])
    document_lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    return SentenceTokens(opening, following, opening_lengths, following_lengths, document_lengths)


def offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return (N + 1,) the start of each of N consecutive segments of these lengths, then the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths)])
