"""A tokenized corpus: every token of every document in one flat array."""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastformer.data.corpus import Document
from fastformer.data.files import atomic_file
from fastformer.data.progress import track
from fastformer.data.tokenizer import text_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FORMAT = 1
_SENTENCES_PER_CALL = 4096


@dataclass(frozen=True)
class TokenizedCorpus:
    """Tokens of S sentences in D documents.

    In byte-level BPE a word's token includes the space before it. So each sentence is kept in two forms: as the first
    of a segment (`opening`, without a space) and as a later one (`following`, with a space). A segment put together
    from them has the very tokens that the tokenizer gives for its sentences joined by spaces.

    Attributes:
        ids: (2 + opening tokens + following tokens,) int32: ``[CLS]``, ``[SEP]``, the opening forms of all sentences,
            then their following forms.
        opening_offsets: (S + 1,) int64: sentence s opens with ``ids[opening_offsets[s] : opening_offsets[s + 1]]``.
        following_offsets: (S + 1,) int64, likewise.
        document_offsets: (D + 1,) int64: document d has the sentences from ``document_offsets[d]`` on.
    """

    ids: NDArray[np.int32]
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
        """(N,) tokens of the segments of sentences begin to end (exclusive), 0 where begin == end."""
        first = np.minimum(begin, self.num_sentences - 1)
        opening = self.opening_offsets[first + 1] - self.opening_offsets[first]
        following = self.following_offsets[end] - self.following_offsets[first + 1]
        return np.where(end > begin, opening + following, 0)

    def fingerprint(self) -> str:
        """SHA-256 of the tokens and their layout, in hexadecimal."""
        digest = hashlib.sha256()
        for field in fields(self):
            digest.update(np.ascontiguousarray(getattr(self, field.name)).data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes an ``.npz`` file, whole or not at all."""
        with atomic_file(path) as file:
            np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path) -> TokenizedCorpus:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is cut short or damaged.
        """
        try:
            with np.load(path) as arrays:  # an archive whose checksums are verified on reading
                return cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except (zipfile.BadZipFile, KeyError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is cut short or damaged: {error}") from error


def tokenize(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> TokenizedCorpus:
    """Tokenizes documents, special tokens spelled out in a text being plain text. Sentences keep their order.

    Raises:
        ValueError: no document, or one that is empty or has an empty sentence.
    """
    if not documents or not all(document and all(document) for document in documents):
        raise ValueError("documents must be non-empty lists of non-empty sentences, and at least one")
    sentences = [sentence for document in documents for sentence in document]
    opening, opening_lengths = _encode(sentences, tokenizer, "tokenizing (1/2)")
    following, following_lengths = _encode([f" {sentence}" for sentence in sentences], tokenizer, "tokenizing (2/2)")
    special = np.array([tokenizer.cls_token_id, tokenizer.sep_token_id], dtype=np.int32)
    return TokenizedCorpus(
        ids=np.concatenate([special, opening, following]),
        opening_offsets=len(special) + _offsets(opening_lengths),
        following_offsets=len(special) + len(opening) + _offsets(following_lengths),
        document_offsets=_offsets([len(document) for document in documents]),
    )


def load_or_tokenize(
    folder: str | os.PathLike[str], documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast
) -> TokenizedCorpus:
    """As `tokenize`, kept below `folder` in a file named after text and tokenizer; a damaged one is made anew."""
    text = text_fingerprint(sentence for document in documents for sentence in (*document, ""))
    key = text_fingerprint([text, tokenizer.backend_tokenizer.to_str()])
    path = Path(folder) / f"tokens-{key[:32]}-v{_FORMAT}.npz"
    if path.exists():
        try:
            return TokenizedCorpus.load(path)
        except ValueError as error:
            warnings.warn(f"{error}; it is made anew", stacklevel=2)
    corpus = tokenize(documents, tokenizer)
    corpus.save(path)
    return corpus


def _encode(
    sentences: Sequence[str], tokenizer: PreTrainedTokenizerFast, description: str
) -> tuple[NDArray[np.int32], list[int]]:
    """All tokens of all sentences in one array, and their number in each."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    parts: list[NDArray[np.int32]] = []
    for begin in track(range(0, len(sentences), _SENTENCES_PER_CALL), description):
        batch = sentences[begin : begin + _SENTENCES_PER_CALL]
        parts += [
            np.array(encoding.ids, np.int32) for encoding in backend.encode_batch_fast(batch, add_special_tokens=False)
        ]
    return np.concatenate(parts), [len(part) for part in parts]


def _offsets(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.array(list(accumulate(lengths, initial=0)), dtype=np.int64)
