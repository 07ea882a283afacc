"""What a batch must know of its optimizer step for the loss of the step to be the mean over all its labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from fastformer.data.packing import IGNORE_INDEX


def label_counts(batch: dict[str, Any]) -> torch.Tensor:
    """(2,) int64 on the labels' device: the labelled tokens of a packed batch, and its labelled pairs of segments."""
    labels = batch["labels"]
    pairs = batch.get("next_sentence_label", labels[:0])
    return torch.stack([(labels != IGNORE_INDEX).sum(), (pairs != IGNORE_INDEX).sum()])


def with_label_counts(
    batches: Iterable[dict[str, Any]],
    step_sizes: Iterable[int],
    count: Callable[[dict[str, Any]], torch.Tensor] = label_counts,
) -> Iterator[dict[str, Any]]:
    """The batches, each with ``label_counts``: (2, n), its own `count` and the sum of those of its step.

    Micro-batches have unequal numbers of labels, so that the mean of their means is not the mean over the labels of the
    step; each must be weighted by its share, which takes looking ahead to the end of the step.

    Args:
        batches: of one process.
        step_sizes: the number of batches of each optimizer step.
        count: (n,), the labels of a batch for each part of the loss.
    """
    coming = iter(batches)
    for size in step_sizes:
        step = list(islice(coming, size))
        counts = [count(batch) for batch in step]
        for batch, own in zip(step, counts, strict=True):
            yield {**batch, "label_counts": torch.stack([own, sum(counts, torch.zeros_like(own))])}
