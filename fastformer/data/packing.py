"""Packed batches: sequences laid end to end with no padding, filled up to a number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import count, cycle, islice, pairwise
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fastformer.data.objectives import (
    IGNORE_INDEX,
    NO_LABEL,
    Examples,
    MaskedLanguageModelling,
    Stream,
    example_lengths,
    generator,
)
from fastformer.data.tokenized import TokenizedCorpus


class _PackedSequences(TypedDict):
    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labels: Tensor
    masked_positions: Tensor


class PackedBatch(_PackedSequences, total=False):
    """B sequences of T tokens in all, M of them to be predicted.

    Keys:
        input_ids, token_type_ids, position_ids: (T,) int64.
        cu_seqlens: (B + 1,) int32, where each sequence starts, and T.
        max_seqlen: tokens of the longest sequence.
        labels: (T,) int64, the token to predict, -100 where there is none.
        masked_positions: (M,) int64, where labels is not -100, ascending.
        next_sentence_label: (B,) int64, 0 if the second segment follows the first and 1 if it is random; absent without
            next-sentence prediction.
    """

    next_sentence_label: Tensor


class BatchRecipe(NamedTuple):
    """What a batch is made of."""

    epoch: int
    examples: Examples


class PackedDataset(Dataset[PackedBatch]):
    """Turns recipes into packed, masked batches; to be used with a batch sampler of recipes and no collation.

    The masks of an example are a pure function of (seed, epoch, example index), whatever batch it is in.

    Args:
        corpus: what the examples refer to.
        masking: the masking objective.
        seed: of the masks, 0 to 2^64 - 1.
    """

    def __init__(self, corpus: TokenizedCorpus, masking: MaskedLanguageModelling, seed: int) -> None:
        self.corpus = corpus
        self.masking = masking
        self.seed = seed

    def __getitems__(self, recipe: BatchRecipe) -> PackedBatch:
        return self[recipe]

    def __getitem__(self, recipe: BatchRecipe) -> PackedBatch:
        examples = recipe.examples
        tokens = _lay_out(self.corpus, examples)
        generators = [generator(self.seed, Stream.MASKS, recipe.epoch, index) for index in examples["index"].tolist()]
        input_ids, labels = self.masking(tokens.input_ids, tokens.cu_seqlens, tokens.special, generators)
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


# What an example consists of, and how each part is marked.
_PARTS = ("[CLS]", "A opening", "A following", "[SEP]", "B opening", "B following", "[SEP]")
_PART_TYPES = np.array([0, 0, 0, 0, 1, 1, 1])
_PART_SPECIAL = np.array([part.startswith("[") for part in _PARTS])


def _lay_out(corpus: TokenizedCorpus, examples: Examples) -> _Tokens:
    """The tokens of examples, end to end: ``[CLS] A [SEP] B [SEP]``, or ``[CLS] A [SEP]`` without a second segment."""
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
    """The integers from each start on, `lengths` of them, one range after another."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)


# --- Batches ----------------------------------------------------------------------------------------------------------


class TokenBudgetSampler(Sampler[NDArray[np.int64]]):
    """Batches of sequences with at most `tokens_per_batch` tokens each, in an order drawn from (seed, epoch).

    Every sequence is in exactly one batch of exactly one rank. Batches are filled in order as far as they go; where
    their number is not a multiple of the ranks, the fullest are halved until it is, so that no rank waits for another.
    (Where each batch has but one sequence, the first ones are repeated instead, as `DistributedSampler` does.)

    Args:
        lengths: (N,) tokens of each sequence.
        tokens_per_batch: the most tokens in a batch, at least the longest sequence.
        seed, epoch: what the order is drawn from.
        shuffle: False keeps the order given.
        rank, world_size: which share of the batches to give.
        start: how many of this rank's batches to leave out at the beginning, to resume.

    Raises:
        ValueError: an argument is out of range, or there is no sequence.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        tokens_per_batch: int,
        *,
        seed: int,
        epoch: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
        if len(lengths) == 0:
            raise ValueError("lengths is empty: there are no sequences to make batches of")
        if lengths.max() > tokens_per_batch:
            raise ValueError(f"tokens_per_batch={tokens_per_batch} is less than the longest sequence, {lengths.max()}")
        order = (
            generator(seed, Stream.ORDER, epoch, 0).permutation(len(lengths)) if shuffle else np.arange(len(lengths))
        )
        cumulative = np.cumsum(lengths[order])
        ends = _halve_fullest(_fill(cumulative, tokens_per_batch), cumulative, world_size)
        batches = np.split(order, ends[:-1])
        batches += islice(cycle(batches), -len(batches) % world_size)
        batches = batches[rank::world_size]
        if not 0 <= start <= len(batches):
            raise ValueError(f"start must be in [0, {len(batches)}], got {start}")
        self._batches = batches[start:]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return iter(self._batches)


def _fill(cumulative: NDArray[np.int64], capacity: int) -> list[int]:
    """Ends of batches that are filled in order, each as far as it goes. `cumulative`: running sum of the lengths."""
    ends: list[int] = []
    filled = 0
    while filled < cumulative[-1]:
        ends.append(int(np.searchsorted(cumulative, filled + capacity, side="right")))
        filled = int(cumulative[ends[-1] - 1])
    return ends


def _halve_fullest(ends: list[int], cumulative: NDArray[np.int64], multiple: int) -> list[int]:
    """Halves batches, those with the most tokens first, until their number is a multiple or each has one sequence."""
    totals = np.concatenate([[0], cumulative])
    batches = list(pairwise([0, *ends]))
    while len(batches) % multiple and len(batches) < len(cumulative):
        divisible = [(begin, end) for begin, end in batches if end - begin > 1]
        begin, end = max(divisible, key=lambda batch: totals[batch[1]] - totals[batch[0]])
        place, middle = batches.index((begin, end)), (begin + end) // 2
        batches[place : place + 1] = [(begin, middle), (middle, end)]
    return [end for _, end in batches]


class BatchStream:
    """Batches of one rank without end: pass after pass over the examples, each in an order of its own.

    Passes need not have the same number of batches (next-sentence prediction draws its segments anew), so a place in
    the stream is a number of batches from its beginning.

    Args:
        examples_of_pass: the examples of the pass of a given number.
        tokens_per_batch, seed, rank, world_size: see `TokenBudgetSampler`.
    """

    def __init__(
        self,
        examples_of_pass: Callable[[int], Examples],
        tokens_per_batch: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._examples_of_pass = lru_cache(maxsize=1)(examples_of_pass)
        self._tokens_per_batch = tokens_per_batch
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self.batches_per_pass: list[int] = []
        """Of the passes seen so far; may be set to what the same stream had, which saves making those passes again."""

    def from_batch(self, start: int) -> Iterator[BatchRecipe]:
        """The recipes of the batches from number `start` on, without end."""
        for number in count():
            if number < len(self.batches_per_pass) and start >= self.batches_per_pass[number]:
                start -= self.batches_per_pass[number]
                continue
            batches = self._recipes(number)
            yield from batches[start:]
            start = max(0, start - len(batches))

    def __len__(self) -> int:
        """Batches in the first pass."""
        return self.batches_per_pass[0] if self.batches_per_pass else len(self._recipes(0))

    def _recipes(self, number: int) -> list[BatchRecipe]:
        examples = self._examples_of_pass(number)
        sampler = TokenBudgetSampler(
            example_lengths(examples),
            self._tokens_per_batch,
            seed=self._seed,
            epoch=number,
            rank=self._rank,
            world_size=self._world_size,
        )
        if number == len(self.batches_per_pass):
            self.batches_per_pass.append(len(sampler))
        return [BatchRecipe(number, examples[batch]) for batch in sampler]
