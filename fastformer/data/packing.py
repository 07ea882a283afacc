"""Packed batches: sequences laid end to end with no padding, filled up to a number of tokens."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, count, cycle, islice, pairwise
from typing import Any, NamedTuple, TypedDict

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


class PackedPairBatch(TypedDict):
    """B pairs of a source, S tokens in all, and a target, T tokens in all, for an encoder and its decoder.

    Keys:
        input_ids, position_ids: (S,) int64; cu_seqlens: (B + 1,) int32; max_seqlen: int: the sources, as in
            `PackedBatch`.
        decoder_input_ids, decoder_position_ids, decoder_cu_seqlens, decoder_max_seqlen: likewise the targets, each
            moved one place to the right behind the decoder's start token.
        labels: (T,) int64, the targets.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    decoder_input_ids: Tensor
    decoder_position_ids: Tensor
    decoder_cu_seqlens: Tensor
    decoder_max_seqlen: int
    labels: Tensor


def pack(sequences: Sequence[NDArray[np.integer]]) -> dict[str, Any]:
    """Sequences, none empty, end to end: input_ids, position_ids, cu_seqlens and max_seqlen as in `PackedBatch`."""
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    return {
        "input_ids": torch.from_numpy(np.concatenate(sequences).astype(np.int64)),
        "position_ids": torch.from_numpy(np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)),
        "cu_seqlens": torch.from_numpy(cu_seqlens.astype(np.int32)),
        "max_seqlen": int(lengths.max()),
    }


def pack_pairs(
    sources: Sequence[NDArray[np.integer]], targets: Sequence[NDArray[np.integer]], decoder_start: int
) -> PackedPairBatch:
    """Sources and targets end to end; see `PackedPairBatch`."""
    right = [np.concatenate([[decoder_start], target[:-1]]) for target in targets]
    decoder = {f"decoder_{name}": value for name, value in pack(right).items()}
    labels = torch.from_numpy(np.concatenate(targets).astype(np.int64))
    return PackedPairBatch(**pack(sources), **decoder, labels=labels)  # type: ignore[typeddict-item]


class BatchRecipe(NamedTuple):
    """What a batch is made of."""

    epoch: int
    examples: Examples


class PackedDataset(Dataset[Any]):
    """Turns recipes into packed batches; to be used with a batch sampler of recipes and no collation.

    What is drawn at random for an example is a pure function of (seed, epoch, example index), whatever batch it is in.

    Args:
        corpus: what the examples refer to.
        make_batch: makes the batch of a recipe, from the corpus and the seed.
        seed: 0 to 2^64 - 1.
    """

    def __init__(self, corpus: Any, make_batch: Callable[[Any, BatchRecipe, int], Any], seed: int) -> None:
        self.corpus = corpus
        self.make_batch = make_batch
        self.seed = seed

    def __getitems__(self, recipe: BatchRecipe) -> Any:
        return self[recipe]

    def __getitem__(self, recipe: BatchRecipe) -> Any:
        return self.make_batch(self.corpus, recipe, self.seed)


def masked_batch(
    corpus: TokenizedCorpus, recipe: BatchRecipe, seed: int, *, masking: MaskedLanguageModelling
) -> PackedBatch:
    """The examples of a recipe, laid out and masked."""
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


def example_generators(recipe: BatchRecipe, seed: int) -> list[np.random.Generator]:
    """For what is drawn anew for each example."""
    return [generator(seed, Stream.MASKS, recipe.epoch, index) for index in recipe.examples["index"].tolist()]


class _Tokens(NamedTuple):
    input_ids: NDArray[np.int64]  # (T,)
    token_type_ids: NDArray[np.int64]  # (T,)
    special: NDArray[np.bool_]  # (T,)
    cu_seqlens: NDArray[np.int64]  # (B + 1,)


# What an example consists of, and how each part is marked.
_PARTS = ("[CLS]", "A opening", "A following", "[SEP]", "B opening", "B following", "[SEP]")
_PART_TYPES = np.array([0, 0, 0, 0, 1, 1, 1])
_PART_SPECIAL = np.array([part.startswith("[") for part in _PARTS])


def lay_out(corpus: TokenizedCorpus, examples: Examples) -> _Tokens:
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
        best_fit: put each sequence into the batch that it fills best, so that batches are full with long sequences too.
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
        best_fit: bool = False,
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
        if best_fit:
            order, ends = _fill_best(order, lengths[order], tokens_per_batch)
        else:
            ends = _fill(np.cumsum(lengths[order]), tokens_per_batch)
        ends = _halve_fullest(ends, np.cumsum(lengths[order]), world_size)
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


_OPEN_BATCHES = 64


def _fill_best(
    order: NDArray[np.int64], lengths: NDArray[np.int64], capacity: int
) -> tuple[NDArray[np.int64], list[int]]:
    """The order batch by batch, and the ends of the batches, by best fit over the batches that are open.

    (Ding et al., "Fewer Truncations Improve Language Modeling" (2024).) Only so many are open at a time: a batch that
    was opened long ago is about full.
    """
    space_left: list[tuple[int, int]] = []  # of each open batch, ascending, with its number
    batches: list[list[int]] = []
    for sequence, length in zip(order.tolist(), lengths.tolist(), strict=True):
        place = bisect_left(space_left, (length, -1))
        if place < len(space_left):
            left, number = space_left.pop(place)
        else:
            left, number = capacity, len(batches)
            batches.append([])
        batches[number].append(sequence)
        if left > length:
            insort(space_left, (left - length, number))
        if len(space_left) > _OPEN_BATCHES:
            space_left.pop(0)
    return np.concatenate([np.array(batch) for batch in batches]), [*accumulate(map(len, batches))]


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

    The batches of all ranks together are one sequence, the same whatever their number; rank r of n takes those r,
    r + n, r + 2 n and so on. A place is a number of batches from the beginning of that sequence: passes need not have
    the same number (next-sentence prediction draws its segments anew), nor runs the same number of ranks.

    Args:
        examples_of_pass: the examples of the pass of a given number.
        tokens_per_batch, seed, rank, world_size: see `TokenBudgetSampler`.
        example_lengths: the tokens of each example.
        passes_per_epoch: as many passes are one epoch.
        best_fit: see `TokenBudgetSampler`.
    """

    def __init__(
        self,
        examples_of_pass: Callable[[int], Examples],
        tokens_per_batch: int,
        *,
        seed: int,
        example_lengths: Callable[[Examples], NDArray[np.int64]] = example_lengths,
        passes_per_epoch: int = 1,
        best_fit: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._examples_of_pass = lru_cache(maxsize=1)(examples_of_pass)
        self._example_lengths = example_lengths
        self._tokens_per_batch = tokens_per_batch
        self._seed = seed
        self._passes_per_epoch = passes_per_epoch
        self._best_fit = best_fit
        self._rank = rank
        self._world_size = world_size
        self.batches_per_pass: list[int] = []
        """Of the passes seen so far; may be set to what the same stream had, which saves making those passes again."""

    def from_batch(self, start: int) -> Iterator[BatchRecipe]:
        """This rank's share of the batches of all ranks from number `start` on, without end."""
        return islice(self._from_batch(start), self._rank, None, self._world_size)

    def _from_batch(self, start: int) -> Iterator[BatchRecipe]:
        for number in count():
            if number < len(self.batches_per_pass) and start >= self.batches_per_pass[number]:
                start -= self.batches_per_pass[number]
                continue
            batches = self._recipes(number)
            yield from batches[start:]
            start = max(0, start - len(batches))

    def __len__(self) -> int:
        """This rank's batches in an epoch: all of the first pass, times the passes per epoch."""
        first = self.batches_per_pass[0] if self.batches_per_pass else len(self._recipes(0))
        return -(-first * self._passes_per_epoch // self._world_size)

    def _recipes(self, number: int) -> list[BatchRecipe]:
        examples = self._examples_of_pass(number)
        sampler = TokenBudgetSampler(
            self._example_lengths(examples),
            self._tokens_per_batch,
            seed=self._seed,
            epoch=number,
            best_fit=self._best_fit,
        )
        if number == len(self.batches_per_pass):
            self.batches_per_pass.append(len(sampler))
        return [BatchRecipe(number, examples[batch]) for batch in sampler]
