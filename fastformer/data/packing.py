"""Packed batches: sequences laid end to end without padding, and the sampler that groups sequences into batches."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import accumulate, cycle, islice, pairwise
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from fastformer.data.randomness import Stream, generator

IGNORE_INDEX = -100
"""The label of a token that is not to be predicted."""


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
        cu_seqlens: (B + 1,) int32, the start of each sequence, then T.
        max_seqlen: tokens of the longest sequence.
        labels: (T,) int64, the token to predict, -100 if there is none.
        masked_positions: (M,) int64, the positions at which labels is not -100, ascending.
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
            shifted one place to the right after the decoder's start token.
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
    """Lay non-empty sequences end to end: input_ids, position_ids, cu_seqlens and max_seqlen as in `PackedBatch`."""
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
    """Lay sources end to end, and likewise targets; see `PackedPairBatch`."""
    right = [np.concatenate([[decoder_start], target[:-1]]) for target in targets]
    decoder = {f"decoder_{name}": value for name, value in pack(right).items()}
    labels = torch.from_numpy(np.concatenate(targets).astype(np.int64))
    return PackedPairBatch(**pack(sources), **decoder, labels=labels)  # type: ignore[typeddict-item]


# --- Batches ----------------------------------------------------------------------------------------------------------


class TokenBudgetSampler(Sampler[NDArray[np.int64]]):
    """Batches of sequences with at most `tokens_per_batch` tokens each, in an order drawn from (seed, epoch).

    Every sequence is in exactly one batch of exactly one rank. A batch takes sequences in order until the next one does
    not fit. If the number of batches is not a multiple of the number of ranks, the fullest batches are halved until it
    is, so that no rank waits for another. (If each batch has only one sequence, the first batches are repeated instead,
    as in `DistributedSampler`.)

    Args:
        lengths: (N,) tokens of each sequence.
        tokens_per_batch: the most tokens in a batch, at least the longest sequence.
        seed, epoch: they determine the order.
        shuffle: False keeps the given order.
        best_fit: put each sequence into the batch that it fills best, so that batches of long sequences are full too.
        rank, world_size: this rank gets every `world_size`-th batch from number `rank` on.
        start: number of this rank's batches to skip at the beginning, to resume.

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
    """Fill batches in order, each until the next sequence does not fit; return their ends.

    Args:
        cumulative: running sum of the lengths.
        capacity: the most tokens in a batch.
    """
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
    """Fill batches by best fit over the open batches; return the order of the sequences and the ends of the batches.

    (Ding et al., "Fewer Truncations Improve Language Modeling" (2024).) At most `_OPEN_BATCHES` are open at a time: a
    batch that has been open for long is about full.
    """
    space_left: list[tuple[int, int]] = []  # (space left, number) of each open batch, ascending
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
    """Halve batches, fullest first, until their number is a multiple of `multiple` or each has one sequence."""
    totals = np.concatenate([[0], cumulative])
    batches = list(pairwise([0, *ends]))
    while len(batches) % multiple and len(batches) < len(cumulative):
        divisible = [(begin, end) for begin, end in batches if end - begin > 1]
        begin, end = max(divisible, key=lambda batch: totals[batch[1]] - totals[batch[0]])
        place, middle = batches.index((begin, end)), (begin + end) // 2
        batches[place : place + 1] = [(begin, middle), (middle, end)]
    return [end for _, end in batches]
