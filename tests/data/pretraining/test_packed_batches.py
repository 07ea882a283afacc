from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastformer.data.packing import IGNORE_INDEX, TokenBudgetSampler
from fastformer.data.pretraining.batches import BatchRecipe, BatchStream, PackedDataset
from fastformer.data.pretraining.bert import (
    EXAMPLE,
    MaskedLanguageModelling,
    example_lengths,
    next_sentence_examples,
    single_segment_examples,
)
from fastformer.data.pretraining.masked_batches import masked_batch

# --- Batches ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(corpus, tokenizer) -> PackedDataset:
    return PackedDataset(corpus, partial(masked_batch, masking=MaskedLanguageModelling(tokenizer)), seed=3)


def unmasked(batch) -> torch.Tensor:
    return torch.where(batch["labels"] == IGNORE_INDEX, batch["input_ids"], batch["labels"])


def sequences_of(batch, name_or_values) -> list[list[int]]:
    values = batch[name_or_values] if isinstance(name_or_values, str) else name_or_values
    return [part.tolist() for part in values.split(batch["cu_seqlens"].diff().tolist())]


def check_form(batch, sequences: int) -> None:
    """Check the shapes, the dtypes and the consistency of a packed batch."""
    tokens = len(batch["input_ids"])
    for name in ("input_ids", "token_type_ids", "position_ids", "labels"):
        assert batch[name].shape == (tokens,)
        assert batch[name].dtype == torch.int64
    assert batch["cu_seqlens"].shape == (sequences + 1,)
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["cu_seqlens"][0] == 0
    assert batch["cu_seqlens"][-1] == tokens
    assert type(batch["max_seqlen"]) is int
    assert batch["max_seqlen"] == batch["cu_seqlens"].diff().max()
    assert batch["masked_positions"].dtype == torch.int64
    assert torch.equal(batch["masked_positions"], (batch["labels"] != IGNORE_INDEX).nonzero().squeeze(1))
    assert all(positions == list(range(len(positions))) for positions in sequences_of(batch, "position_ids"))


@pytest.mark.quick
def test_pairs_are_laid_out_as_the_tokenizer_does(dataset, corpus, tokenizer, documents):
    sentences = [sentence for document in documents for sentence in document]
    examples = next_sentence_examples(corpus, 48, seed=1, epoch=0)
    batch = dataset[BatchRecipe(0, examples)]
    check_form(batch, len(examples))
    assert torch.equal(batch["next_sentence_label"], torch.from_numpy(examples["next_sentence_label"].copy()))
    ids, types = sequences_of(batch, unmasked(batch)), sequences_of(batch, "token_type_ids")
    whole = 0
    for row, sequence, sequence_types in zip(examples, ids, types, strict=True):
        a, b = (" ".join(sentences[row[f"{segment}_begin"] : row[f"{segment}_end"]]) for segment in "ab")
        expected = tokenizer(a, b)
        if len(expected.input_ids) <= 48:
            assert (sequence, sequence_types) == (expected.input_ids, expected.token_type_ids)
            whole += 1
            continue
        parts = []
        for segment, text in (("a", a), ("b", b)):
            front, length = row[f"{segment}_front"], row[f"{segment}_length"]
            parts.append(tokenizer(text, add_special_tokens=False).input_ids[front : front + length])
        assert (
            sequence == tokenizer.build_inputs_with_special_tokens(*parts) if False else [2, *parts[0], 3, *parts[1], 3]
        )
        assert sequence_types == [0] * (len(parts[0]) + 2) + [1] * (len(parts[1]) + 1)
        assert len(sequence) == 48
    assert 50 < whole < len(examples) - 50  # both kinds were seen


@pytest.mark.parametrize("max_length", [3, 9, 64])
def test_single_segments_are_laid_out_as_the_tokenizer_does(dataset, corpus, tokenizer, documents, max_length):
    examples = single_segment_examples(corpus, max_length)
    batch = dataset[BatchRecipe(0, examples)]
    check_form(batch, len(examples))
    assert "next_sentence_label" not in batch
    assert batch["max_seqlen"] == max_length
    assert not batch["token_type_ids"].any()
    sentences = [sentence for document in documents for sentence in document]
    for row, sequence in zip(examples, sequences_of(batch, unmasked(batch)), strict=True):
        text = " ".join(sentences[row["a_begin"] : row["a_end"]])
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert sequence == [2, *ids[row["a_front"] : row["a_front"] + row["a_length"]], 3]


def test_masks_of_an_example_do_not_depend_on_its_batch(dataset, corpus):
    examples = next_sentence_examples(corpus, 48, seed=1, epoch=0)
    together = dataset[BatchRecipe(7, examples[[5, 3, 8]])]
    alone = dataset[BatchRecipe(7, examples[[3]])]
    for name in ("input_ids", "labels"):
        assert sequences_of(together, name)[1] == alone[name].tolist()
    assert dataset[BatchRecipe(8, examples[[3]])]["labels"].tolist() != alone["labels"].tolist()


def test_special_tokens_are_never_masked(dataset, corpus, tokenizer):
    batch = dataset[BatchRecipe(0, next_sentence_examples(corpus, 32, seed=1, epoch=0))]
    assert not torch.isin(batch["labels"], torch.tensor(tokenizer.all_special_ids)).any()
    assert len(batch["masked_positions"]) > 0


# --- Sampler ----------------------------------------------------------------------------------------------------------

lengths_lists = st.lists(st.integers(1, 50), min_size=1, max_size=120).map(np.array)


@pytest.mark.quick
@given(lengths_lists, st.integers(50, 300), st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_every_sequence_is_in_one_batch_of_one_rank(lengths, budget, world_size, epoch, shuffle):
    ranks = [
        list(
            TokenBudgetSampler(lengths, budget, seed=1, epoch=epoch, shuffle=shuffle, rank=rank, world_size=world_size)
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    in_order = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert all(len(batch) >= 1 and lengths[batch].sum() <= budget for batch in in_order)
    everything = np.concatenate(in_order)
    if len(everything) > len(lengths):  # only if nothing can be halved, and then less than a step of all ranks more
        assert len(everything) == len(in_order) < len(lengths) + world_size
        everything = everything[: len(lengths)]
    assert np.sort(everything).tolist() == list(range(len(lengths)))
    if not shuffle:
        assert everything.tolist() == list(range(len(lengths)))
    if world_size == 1:
        # Batches are as full as possible: the first sequence of a batch does not fit into the batch before.
        for batch, following in pairwise(in_order):
            assert lengths[batch].sum() + lengths[following[0]] > budget


def test_the_fullest_batches_are_halved_for_the_ranks():
    lengths = np.array([4, 4, 3, 3, 3, 9, 2])  # in batches of 10: 4+4, 3+3+3, 9, 2
    ranks = [list(TokenBudgetSampler(lengths, 10, seed=0, shuffle=False, rank=rank, world_size=5)) for rank in range(5)]
    assert [[batch.tolist() for batch in batches] for batches in ranks] == [[[0, 1]], [[2]], [[3, 4]], [[5]], [[6]]]


@given(lengths_lists.filter(lambda lengths: len(lengths) >= 3), st.data())
def test_sampler_starts_anywhere(lengths, data):
    arguments = {"seed": 4, "epoch": 2, "rank": 1, "world_size": 3}
    whole = TokenBudgetSampler(lengths, 60, **arguments)
    start = data.draw(st.integers(0, len(whole)))
    rest = TokenBudgetSampler(lengths, 60, **arguments, start=start)
    assert len(rest) == len(whole) - start
    assert [batch.tolist() for batch in rest] == [batch.tolist() for batch in whole][start:]


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return np.concatenate(list(TokenBudgetSampler(np.full(100, 10), 100, seed=seed, epoch=epoch))).tolist()

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


@pytest.mark.parametrize(
    ("lengths", "arguments", "message"),
    [
        ([], {}, "lengths is empty"),
        ([5, 11], {}, "tokens_per_batch=10 is less than the longest sequence, 11"),
        ([5, 5], {"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size=2\), got 2"),
        ([5, 5, 5], {"start": 3}, r"start must be in \[0, 2\], got 3"),
    ],
)
def test_bad_sampler_arguments(lengths, arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenBudgetSampler(np.array(lengths, dtype=np.int64), 10, seed=0, **arguments)


# --- Stream -----------------------------------------------------------------------------------------------------------


def examples_of_pass(number: int) -> np.ndarray:
    """Return the examples of a pass; passes have different sizes."""
    examples = np.zeros(10 + 7 * (number % 3), dtype=EXAMPLE)
    examples["index"] = np.arange(len(examples))
    examples["a_length"] = 5 + number
    return examples


def keys(recipes) -> list[tuple[int, list[int]]]:
    return [(recipe.epoch, recipe.examples["index"].tolist()) for recipe in recipes]


def test_stream_makes_pass_after_pass():
    stream = BatchStream(examples_of_pass, 40, seed=1)
    recipes = []
    for recipe in stream.from_batch(0):
        if recipe.epoch == 5:
            break
        recipes.append(recipe)
    for number in range(5):
        of_pass = [recipe for recipe in recipes if recipe.epoch == number]
        indices = sorted(index for _, indices in keys(of_pass) for index in indices)
        assert indices == list(range(len(examples_of_pass(number))))
        assert all(example_lengths(recipe.examples).sum() <= 40 for recipe in of_pass)
        assert stream.batches_per_pass[number] == len(of_pass)
    assert [recipe.epoch for recipe in recipes] == sorted(recipe.epoch for recipe in recipes)
    assert len(stream) == stream.batches_per_pass[0]


@pytest.mark.parametrize("known_passes", [0, 2, 5])
def test_stream_starts_anywhere(known_passes):
    whole = BatchStream(examples_of_pass, 40, seed=1)
    iterator = whole.from_batch(0)
    expected = keys(next(iterator) for _ in range(40))
    made = []

    def counting(number):
        made.append(number)
        return examples_of_pass(number)

    for start in range(25):
        stream = BatchStream(counting, 40, seed=1)
        stream.batches_per_pass = whole.batches_per_pass[:known_passes]
        made.clear()
        recipes = stream.from_batch(start)
        assert keys(next(recipes) for _ in range(15)) == expected[start : start + 15]
        # Passes that are known to lie before the start are not made.
        assert made[0] == min(known_passes, expected[start][0])
