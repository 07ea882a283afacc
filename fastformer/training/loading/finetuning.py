"""Group features into batches by length, for training (resumable in the middle of an epoch) and for prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fastformer.data.packing import TokenBudgetSampler
from fastformer.training.loading.resuming import ResumableDataModule, check_workers
from fastformer.training.loading.steps import with_label_counts
from fastformer.training.privacy import PoissonBatches, Privacy

Collate = Callable[[list[Any]], Any]
Targets = Callable[[Any], float]
"""Returns the number of targets in the mean loss of a batch."""


def in_order(
    features: Sequence[Any], collate: Collate, length: Callable[[Any], int], tokens_per_batch: int
) -> Iterator[Any]:
    """Yield batches of `features` in their order."""
    for batch in TokenBudgetSampler(_lengths(features, length), tokens_per_batch, seed=0, shuffle=False):
        yield collate([features[index] for index in batch.tolist()])


class FineTuningData(ResumableDataModule):
    """Batches of features: for training in an order drawn from (seed, epoch), for validation in the given order.

    Args:
        tokenizer: is saved together with the model.
        train, validation: features.
        collate: makes a batch of features.
        length: returns the number of tokens of a feature.
        targets: returns the number of targets of a batch; a step's loss is the mean over the targets of its batches.
        tokens_per_batch: the most tokens in a batch of one device.
        seed: determines the order.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        privacy: draws training batches for differential privacy.
        collate_train: makes a training batch; None for `collate`.

    Raises:
        ValueError: there is no training or no validation feature, or a feature is longer than a batch.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[Any],
        validation: Sequence[Any],
        collate: Collate,
        length: Callable[[Any], int],
        targets: Targets,
        tokens_per_batch: int = 4096,
        seed: int = 0,
        num_workers: int = 0,
        privacy: Privacy | None = None,
        collate_train: Collate | None = None,
    ) -> None:
        super().__init__()
        check_workers(num_workers)
        if not train or not validation:
            raise ValueError(f"there must be training and validation examples; got {len(train)} and {len(validation)}")
        self.tokenizer = tokenizer
        self.train = train
        self.validation = validation
        self.collate = collate
        self.length = length
        self.targets = targets
        self.tokens_per_batch = tokens_per_batch
        self.seed = seed
        self.num_workers = num_workers
        self.privacy = privacy
        self.collate_train = collate_train or collate

    def train_dataloader(self) -> Any:
        """Return this process's batches of the epoch, from the trainer's position on."""
        if self.privacy is not None:
            rate = self.privacy.sample_rate(len(self.train))
            return PoissonBatches(self.train, self.collate_train, rate, self.seed, self.batches_done)
        return _TrainingBatches(self, self.train, self.collate_train)

    def batches_of_pass(self, lengths: np.ndarray, number: int) -> TokenBudgetSampler | Sequence[np.ndarray]:
        """Return the examples of each batch of all ranks in one pass over examples of these lengths."""
        return TokenBudgetSampler(lengths, self.tokens_per_batch, seed=self.seed, epoch=number)

    def val_dataloader(self) -> Any:
        """Return this process's batches of the held-out examples, the same every time."""
        return _Batches(self, self.validation, self.collate)


class _Batches:
    """Batches of features in their order. (Not a DataLoader: Lightning would shard it a second time.)"""

    def __init__(self, data: FineTuningData, features: Sequence[Any], collate: Collate) -> None:
        self.data = data
        self.features = features
        self.collate = collate
        self.lengths = _lengths(features, data.length)

    def __len__(self) -> int:
        return len(self._sampler())

    def __iter__(self) -> Iterator[Any]:
        yield from self.data.load(_Features(self.features), self.indices(), self.collate)

    def indices(self) -> Iterable[np.ndarray]:
        """Return the indices of the features of each batch."""
        return self._sampler()

    def _sampler(self) -> TokenBudgetSampler:
        rank, world_size = self.data.rank()
        return TokenBudgetSampler(
            self.lengths,
            self.data.tokens_per_batch,
            seed=self.data.seed,
            shuffle=False,
            rank=rank,
            world_size=world_size,
        )


class _TrainingBatches(_Batches):
    """The remaining batches of an epoch, from an endless stream of passes over the features.

    An epoch has as many batches as the first pass, plus a few if needed for whole optimizer steps. Passes continue into
    the next epoch, so that nothing is left out. Having a state, even an empty one, tells Lightning that an epoch can
    resume in the middle; the position is in Lightning's own progress.
    """

    def __len__(self) -> int:
        return self.data.epoch(-(-len(self._batches_of_pass(0)) // self.data.rank()[1]))

    def __iter__(self) -> Iterator[Any]:
        yield from with_label_counts(super().__iter__(), self.data.step_sizes(len(self)), self._count)

    def indices(self) -> Iterable[np.ndarray]:
        rank, world_size = self.data.rank()
        shares = islice(self._stream(self.data.batches_of_all_ranks()), rank, None, world_size)
        return islice(shares, len(self) - self.data.batches_done()[1])

    def _stream(self, start: int) -> Iterator[np.ndarray]:
        """Yield the batches of all ranks from number `start` on."""
        for number in count():
            batches = self._batches_of_pass(number)
            yield from islice(batches, min(start, len(batches)), None)
            start = max(0, start - len(batches))

    def _batches_of_pass(self, number: int) -> TokenBudgetSampler | Sequence[np.ndarray]:
        return self.data.batches_of_pass(self.lengths, number)

    def _count(self, batch: Any) -> torch.Tensor:
        return torch.tensor([self.data.targets(batch)])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        return None


class _Features(torch.utils.data.Dataset[Any]):
    """A dataset that returns all features of a batch at once."""

    def __init__(self, features: Sequence[Any]) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> Any:
        return self.features[index]

    def __getitems__(self, indices: np.ndarray) -> list[Any]:
        return [self.features[index] for index in indices.tolist()]


def _lengths(features: Sequence[Any], length: Callable[[Any], int]) -> np.ndarray:
    return np.fromiter(map(length, features), np.int64, len(features))
