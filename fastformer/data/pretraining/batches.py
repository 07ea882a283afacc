"""Collect examples into batches of at most a number of tokens: recipes, their stream, and the dataset of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from fastformer.data.packing import TokenBudgetSampler
from fastformer.data.pretraining.bert import Examples, example_lengths
from fastformer.data.randomness import Stream, generator


class BatchRecipe(NamedTuple):
    """The examples of a batch, and their epoch."""

    epoch: int
    examples: Examples


class PackedDataset(Dataset[Any]):
    """Turn recipes into packed batches, for a batch sampler of recipes and no collation.

    The random choices for an example depend only on (seed, epoch, example index), not on the batch it is in.

    Args:
        corpus: the corpus that the examples refer to.
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


def example_generators(recipe: BatchRecipe, seed: int) -> list[np.random.Generator]:
    """Return a random generator for each example of a recipe."""
    return [generator(seed, Stream.MASKS, recipe.epoch, index) for index in recipe.examples["index"].tolist()]


class BatchStream:
    """The endless batches of one rank: pass after pass over the examples, each pass in another order.

    The batches of all ranks together form one sequence, which does not depend on the number of ranks. Rank r of n takes
    batches r, r + n, r + 2 n and so on. A place in the stream is a number of batches from the beginning of that
    sequence. Passes may differ in their number of batches (next-sentence prediction draws new segments in each), and a
    resumed run may have another number of ranks.

    Args:
        examples_of_pass: returns the examples of a pass, given its number.
        tokens_per_batch, seed, rank, world_size: see `TokenBudgetSampler`.
        example_lengths: returns the number of tokens of each example.
        passes_per_epoch: number of passes in an epoch.
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
        """Number of batches of each pass so far; set it to the list of an equal stream to avoid making them again."""

    def from_batch(self, start: int) -> Iterator[BatchRecipe]:
        """Yield this rank's share of the batches of all ranks from number `start` on, without end."""
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
        """Number of this rank's batches in an epoch: its share of the first pass, times the passes per epoch."""
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
