"""Each batch knows the number of its labels and of those of its optimizer step."""

import pytest
import torch

from fastformer.training.loading.steps import label_counts, with_label_counts


def masked(tokens: int, pairs: int) -> dict:
    labels = torch.full((20,), -100)
    labels[:tokens] = 7
    return {
        "labels": labels,
        "masked_positions": torch.arange(tokens),
        "next_sentence_label": torch.zeros(pairs, dtype=torch.int64),
    }


def test_counts_of_a_batch() -> None:
    assert label_counts(masked(5, 3)).tolist() == [5, 3]
    assert label_counts({"labels": torch.tensor([-100, 4, 5, -100, 6])}).tolist() == [3, 0]


def test_counts_of_the_steps() -> None:
    batches = [masked(5, 3), masked(2, 1), masked(9, 4), masked(1, 2)]
    counted = list(with_label_counts(batches, [1, 2, 1]))
    assert [batch["label_counts"].tolist() for batch in counted] == [
        [[5, 3], [5, 3]],
        [[2, 1], [11, 5]],
        [[9, 4], [11, 5]],
        [[1, 2], [1, 2]],
    ]
    assert all(batch["labels"] is given["labels"] for batch, given in zip(counted, batches, strict=True))


def test_looks_ahead_no_further_than_the_step() -> None:
    def batches():
        yield from [masked(1, 1), masked(2, 2)]
        raise RuntimeError("asked for too much")

    coming = with_label_counts(batches(), [2, 2])
    assert next(coming)["label_counts"][1].tolist() == next(coming)["label_counts"][1].tolist() == [3, 3]
    with pytest.raises(RuntimeError):
        next(coming)
