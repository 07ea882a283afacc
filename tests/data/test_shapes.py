"""Batches are padded to few shapes, and the padding has no effect."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastformer.data.packing import pack, pack_pairs
from fastformer.data.shapes import FewShapes, padded

BUDGET = 320


def masked(draw: np.random.Generator) -> dict[str, Any]:
    """Return a batch as BERT's objective makes it."""
    sequences = sequences_of(draw)
    batch: dict[str, Any] = pack(sequences)
    tokens = len(batch["input_ids"])
    labels = torch.from_numpy(draw.integers(0, 50, tokens))
    positions = torch.from_numpy(np.sort(draw.permutation(tokens)[: round(0.15 * tokens) + draw.integers(3)]))
    unmasked = torch.ones(tokens, dtype=torch.bool).index_fill(0, positions, False)
    pairs = torch.from_numpy(draw.integers(0, 2, len(sequences)))
    types = torch.ones(tokens, dtype=torch.int64)
    return {
        **batch,
        "token_type_ids": types,
        "labels": labels.masked_fill(unmasked, -100),
        "masked_positions": positions,
        "next_sentence_label": pairs,
    }


def sequences_of(draw: np.random.Generator) -> list[np.ndarray]:
    """Return as many sequences as fit into a batch."""
    lengths = draw.integers(2, 33, 100)
    fitting = lengths[: np.searchsorted(np.cumsum(lengths), BUDGET, side="right")]
    return [draw.integers(1, 50, length) for length in fitting]


def test_a_masked_batch() -> None:
    batch = masked(np.random.default_rng(0))
    tokens, sequences = len(batch["input_ids"]), len(batch["cu_seqlens"]) - 1
    found = padded(batch, BUDGET)
    assert found["real_tokens"] == tokens
    for name in ("input_ids", "token_type_ids", "position_ids", "labels"):
        assert len(found[name]) == BUDGET and torch.equal(found[name][:tokens], batch[name])
    assert (found["labels"][tokens:] == -100).all() and (found["next_sentence_label"][sequences:] == -100).all()
    assert torch.equal(found["next_sentence_label"][:sequences], batch["next_sentence_label"])
    assert torch.equal(found["cu_seqlens"][: sequences + 1], batch["cu_seqlens"])
    lengths, longest = found["cu_seqlens"].diff(), batch["max_seqlen"]
    assert found["cu_seqlens"].dtype == torch.int32 and found["cu_seqlens"][-1] == BUDGET
    assert len(lengths) == 32 and lengths.min() >= 0 and lengths.max() <= longest <= found["max_seqlen"] == 32
    begins = found["cu_seqlens"][:-1].repeat_interleave(lengths)
    assert torch.equal(found["position_ids"], torch.arange(BUDGET) - begins)
    positions = found["masked_positions"]
    assert len(positions) % 10 == 0 and torch.equal(positions, positions.unique())
    labelled = found["labels"][positions] != -100
    assert torch.equal(positions[labelled], batch["masked_positions"])


def test_pairs() -> None:
    draw = np.random.default_rng(1)
    sources = [draw.integers(1, 50, length) for length in (5, 20, 13)]
    targets = [draw.integers(1, 50, length) for length in (2, 30, 3)]
    batch = dict(pack_pairs(sources, targets, 0))
    found = padded(batch, BUDGET)
    assert found["real_tokens"] == 38 + 35
    assert (len(found["input_ids"]), len(found["decoder_input_ids"]), len(found["labels"])) == (40, 40, 40)
    assert found["cu_seqlens"].tolist() == [0, 5, 25, 38, 40]
    assert found["decoder_cu_seqlens"].tolist() == [0, 2, 32, 35, 40]
    assert (found["max_seqlen"], found["decoder_max_seqlen"]) == (32, 32)
    assert found["labels"][:35].tolist() == batch["labels"].tolist() and (found["labels"][35:] == -100).all()


def test_no_sequence_is_longer_than_a_model_takes() -> None:
    batch = pack([np.arange(1, 20)])
    assert [padded(dict(batch), BUDGET, longest)["max_seqlen"] for longest in (None, 40, 25, 19)] == [32, 32, 25, 19]


def test_labels_of_sequences() -> None:
    batch = {**pack([np.arange(1, 8), np.arange(1, 5), np.arange(1, 6)]), "labels": torch.tensor([1, 0, 2])}
    found = padded(batch, BUDGET)
    assert found["labels"].tolist() == [1, 0, 2, -100]
    assert found["cu_seqlens"].tolist() == [0, 7, 11, 16, 20]


def test_few_shapes() -> None:
    """A hundred batches of varied lengths have at most six shapes."""
    make, seen = FewShapes(masked, BUDGET), set()
    for seed in range(100):
        batch = make(np.random.default_rng(seed))
        seen.add(tuple(len(each) if isinstance(each, torch.Tensor) else 0 for each in batch.values()))
    assert len(seen) <= 6


def test_what_cannot_be_padded_is_named() -> None:
    sequence = pack([np.arange(1, 8)])
    with pytest.raises(ValueError, match="attention_mask, labels_of_another_kind cannot be padded"):
        padded({**sequence, "attention_mask": torch.ones(7), "labels_of_another_kind": torch.ones(7)}, BUDGET)
    with pytest.raises(ValueError, match=r"labels must be int64 to be padded .*, got torch\.float32"):
        padded({**sequence, "labels": torch.ones(1)}, BUDGET)
