"""Windows of documents: the examples of objectives that do not divide a text into sentences."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastformer.data.pretraining.bert import Examples
from fastformer.data.pretraining.store import DocumentCorpus

WINDOW = np.dtype([(name, np.int64) for name in ("index", "begin", "length")])
"""`length` tokens of one document, ``corpus.ids[begin : begin + length]``; `index` numbers the windows."""


def windows(corpus: DocumentCorpus, longest: int, overlap: int = 0) -> Examples:
    """Cut every document into windows of at most `longest` tokens, in the order of the documents.

    Each window begins with the last `overlap` tokens of the window before.

    Returns:
        Structured array of type WINDOW.
    """
    starts, ends = corpus.document_offsets[:-1], corpus.document_offsets[1:]
    stride = longest - overlap
    counts = np.maximum(1, -(-(ends - starts - overlap) // stride))
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    examples = np.zeros(len(number), dtype=WINDOW)
    examples["index"] = np.arange(len(number))
    examples["begin"] = np.repeat(starts, counts) + stride * number
    examples["length"] = np.minimum(longest, np.repeat(ends, counts) - examples["begin"])
    return examples


def tokens_of(corpus: DocumentCorpus, examples: Examples) -> list[NDArray[np.integer]]:
    """Return the tokens of each window."""
    return [
        corpus.ids[begin : begin + length]
        for begin, length in zip(examples["begin"].tolist(), examples["length"].tolist(), strict=True)
    ]
