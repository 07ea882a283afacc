"""Tell each batch the label counts of its optimizer step, so that the step's loss is the mean over all its labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from fastformer.data.packing import IGNORE_INDEX


def label_counts(batch: dict[str, Any]) -> torch.Tensor:
    """Count the labelled tokens and the labelled pairs of segments of a packed batch: (2,) int64, on its device."""
    labels = batch["labels"]
    pairs = batch.get("next_sentence_label", labels[:0])
    return torch.stack([(labels != IGNORE_INDEX).sum(), (pairs != IGNORE_INDEX).sum()])


def with_label_counts(
    batches: Iterable[dict[str, Any]],
    step_sizes: Iterable[int],
    count: Callable[[dict[str, Any]], torch.Tensor] = label_counts,
) -> Iterator[dict[str, Any]]:
    """Yield the batches, each with ``label_counts``: (2, n), the `count` of the batch and the sum over its step.

    Micro-batches have different numbers of labels, so the mean of their means is not the mean over the step's labels.
    Each batch must be weighted by its share, so this function reads ahead to the end of the step.

    Args:
        batches: the batches of one process.
        step_sizes: the number of batches of each optimizer step.
        count: returns (n,), the number of labels of a batch for each part of the loss.
    """
    coming = iter(batches)
    for size in step_sizes:
        step = list(islice(coming, size))
        counts = [count(batch) for batch in step]
        for batch, own in zip(step, counts, strict=True):
            yield {**batch, "label_counts": torch.stack([own, sum(counts, torch.zeros_like(own))])}
