"""Both sides of a study of training are given the same data."""

from __future__ import annotations

import numpy as np
import torch

from fastformer.benchmarking.studies.pretraining import SentencePairs, collate
from fastformer.benchmarking.training import median_batches


def test_batches_have_the_middle_share_of_padding() -> None:
    lengths = np.random.default_rng(1).integers(1, 100, 403)
    batches = median_batches(lengths, 4, 100)
    assert sorted(np.concatenate(batches).tolist()) != list(range(403))  # three sequences are left over
    shares = [lengths[batch].mean() / lengths[batch].max() for batch in batches]
    (middle,) = median_batches(lengths, 4, 1)
    assert lengths[middle].mean() / lengths[middle].max() in (sorted(shares)[49], sorted(shares)[50])


def test_both_see_the_same_pairs_masked_alike() -> None:
    data = SentencePairs(3, 2, 64)
    packed, pairs = list(data.train_dataloader()), data.one_by_one()
    assert len(packed) == 2 and sum(len(batch["input_ids"]) for batch in packed) == data.tokens
    for number, batch in enumerate(packed):
        dense = collate(pairs[3 * number : 3 * number + 3])
        real = dense["attention_mask"].bool()
        assert real.sum(dim=1).tolist() == batch["cu_seqlens"].diff().tolist()
        assert torch.equal(dense["next_sentence_label"], batch["next_sentence_label"])
        for name in ("input_ids", "token_type_ids", "labels"):
            assert torch.equal(dense[name][real], batch[name])
        assert (dense["labels"][~real] == -100).all() and (dense["labels"] != -100).any()
