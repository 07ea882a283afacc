"""Make the packed batch of a masked-language-modelling recipe: lay its examples end to end, and mask them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastformer.data.packing import IGNORE_INDEX, PackedBatch
from fastformer.data.pretraining.batches import BatchRecipe, example_generators
from fastformer.data.pretraining.bert import NO_LABEL, Examples, MaskedLanguageModelling
from fastformer.data.pretraining.tokenized import TokenizedCorpus


def masked_batch(
    corpus: TokenizedCorpus, recipe: BatchRecipe, seed: int, *, masking: MaskedLanguageModelling
) -> PackedBatch:
    """Return the batch of a recipe's examples, laid end to end and masked."""
    examples = recipe.examples
    tokens = lay_out(corpus, examples)
    generators = example_generators(recipe, seed)
    input_ids, labels = masking(tokens.input_ids, tokens.cu_seqlens, tokens.special, generators)
    lengths = np.diff(tokens.cu_seqlens)
    batch = PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        token_type_ids=torch.from_numpy(tokens.token_type_ids),
        position_ids=torch.from_numpy(np.arange(len(input_ids)) - np.repeat(tokens.cu_seqlens[:-1], lengths)),
        cu_seqlens=torch.from_numpy(tokens.cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        labels=torch.from_numpy(labels),
        masked_positions=torch.from_numpy(np.flatnonzero(labels != IGNORE_INDEX)),
    )
    if (examples["next_sentence_label"] != NO_LABEL).all():
        batch["next_sentence_label"] = torch.from_numpy(examples["next_sentence_label"].copy())
    return batch


class _Tokens(NamedTuple):
    input_ids: NDArray[np.int64]  # (T,)
    token_type_ids: NDArray[np.int64]  # (T,)
    special: NDArray[np.bool_]  # (T,)
    cu_seqlens: NDArray[np.int64]  # (B + 1,)


# The parts of an example, and the token type and special-token mark of each.
_PARTS = ("[CLS]", "A opening", "A following", "[SEP]", "B opening", "B following", "[SEP]")
_PART_TYPES = np.array([0, 0, 0, 0, 1, 1, 1])
_PART_SPECIAL = np.array([part.startswith("[") for part in _PARTS])


def lay_out(corpus: TokenizedCorpus, examples: Examples) -> _Tokens:
    """Lay examples end to end: ``[CLS] A [SEP] B [SEP]``, or ``[CLS] A [SEP]`` without a second segment."""
    starts = np.zeros((len(examples), len(_PARTS)), dtype=np.int64)
    lengths = np.zeros_like(starts)
    starts[:, _PART_SPECIAL] = corpus.CLS_POSITION, corpus.SEP_POSITION, corpus.SEP_POSITION
    lengths[:, _PART_SPECIAL] = 1
    lengths[:, -1] = examples["next_sentence_label"] != NO_LABEL
    for column, segment in ((1, "a"), (4, "b")):
        begin, front, length = (examples[f"{segment}_{name}"] for name in ("begin", "front", "length"))
        opening_start = corpus.opening_offsets[begin] + front
        opening_left = np.maximum(corpus.opening_offsets[begin + 1] - opening_start, 0)
        starts[:, column] = opening_start
        lengths[:, column] = np.minimum(opening_left, length)
        skipped = np.maximum(opening_start - corpus.opening_offsets[begin + 1], 0)
        starts[:, column + 1] = corpus.following_offsets[begin + 1] + skipped
        lengths[:, column + 1] = length - lengths[:, column]
    part_lengths = lengths.ravel()
    return _Tokens(
        input_ids=corpus.ids[_ranges(starts.ravel(), part_lengths)].astype(np.int64),
        token_type_ids=np.repeat(np.tile(_PART_TYPES, len(examples)), part_lengths),
        special=np.repeat(np.tile(_PART_SPECIAL, len(examples)), part_lengths),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths.sum(axis=1))]),
    )


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the ranges of integers with these starts and lengths, one after another."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)
