"""Tests of the inputs and labels of each objective: windows, corrupted spans, infilled text, sentences in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastformer.data.packing import IGNORE_INDEX, TokenBudgetSampler
from fastformer.data.pretraining.batches import BatchRecipe
from fastformer.data.pretraining.bert import sentence_order_examples
from fastformer.data.pretraining.corruption import SpanNoise, corrupt_spans, infill
from fastformer.data.pretraining.objectives import CausalLanguage, Denoising, MaskedLanguage, SpanCorruption
from fastformer.data.pretraining.sources import texts_source
from fastformer.data.pretraining.store import load_or_build_store
from fastformer.data.pretraining.tokenizer import SENTINELS, train_tokenizer

END, MASK = 1, 2
FIRST_SENTINEL = 1000
SENTINEL_IDS = np.arange(FIRST_SENTINEL, FIRST_SENTINEL + 100)


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- Span corruption --------------------------------------------------------------------------------------------------


def undo_spans(source, target) -> list[int]:
    """Replace the sentinels of the source by the spans of the target."""
    assert source[-1] == target[-1] == END
    spans: dict[int, list[int]] = {}
    for token in target[:-1].tolist():
        if token >= FIRST_SENTINEL:
            span = spans[token] = []
        else:
            span.append(token)
    assert list(spans) == list(range(FIRST_SENTINEL, FIRST_SENTINEL + len(spans)))
    assert all(spans.values())
    return [token for kept in source[:-1].tolist() for token in spans.get(kept, [kept])]


@given(st.integers(1, 300), st.sampled_from([0.05, 0.15, 0.5]), st.sampled_from([1.0, 3.0, 10.0]), st.integers(0, 99))
def test_spans_can_be_put_back(length, density, mean_length, seed):
    tokens = np.arange(10, 10 + length)
    noise = SpanNoise(density, mean_length)
    sentinels = np.arange(FIRST_SENTINEL, FIRST_SENTINEL + length)
    source, target = corrupt_spans(tokens, sentinels, END, noise, random(seed))
    assert undo_spans(source, target) == tokens.tolist()
    assert len(source) == noise.source_lengths(np.array(length))
    assert len(target) == noise.target_lengths(np.array(length))
    if length > 1:
        lost = int((target < FIRST_SENTINEL).sum()) - 1
        assert lost == min(max(1, round(density * length)), length - 1)
        assert source[0] == tokens[0]  # the kept part comes first


def test_spans_are_t5s_on_average():
    lengths = []
    covered = np.zeros(200)
    for seed in range(400):
        _, target = corrupt_spans(np.arange(200), SENTINEL_IDS, END, SpanNoise(), random(seed))
        starts = np.flatnonzero(target >= FIRST_SENTINEL)
        lengths += np.diff([*starts, len(target) - 1]).tolist()
        covered[target[target < 200][:-1]] += 1
    assert np.mean(lengths) - 1 == 3.0  # always 30 tokens in 10 spans
    # Each place is lost in about 60 of 400 draws, all places but those at the ends equally often.
    middle = covered[20:-20]
    assert abs(middle.mean() / 400 - 0.15) < 0.01
    assert middle.std() / 400 < 3 * np.sqrt(0.15 * 0.85 / 400)


# --- Denoising --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.sampled_from([0.1, 0.3, 0.9]), st.integers(0, 99))
def test_infilling_loses_the_share_and_keeps_the_order(length, probability, seed):
    tokens = np.arange(10, 10 + length)
    source = infill(tokens, MASK, random(seed), probability)
    kept = source[source != MASK]
    assert len(kept) == length - max(1, round(probability * length))
    assert (np.diff(kept) > 0).all()
    assert len(kept) < len(source) <= length


def test_infilled_spans_are_poissons():
    masks = [int((infill(np.arange(1000), 2000, random(seed)) == 2000).sum()) for seed in range(50)]
    # 300 tokens are in spans of 3 on average, and some spans have length 0.
    assert abs(np.mean(masks) - 100) < 3


# --- A whole corpus ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(documents) -> list[str]:
    return ["\n".join(document) for document in documents[:60]]


@pytest.fixture(scope="module")
def prepare(texts, tmp_path_factory):
    """Return an objective, its tokenizer and the store of the texts in its layout."""
    folder = tmp_path_factory.mktemp("stores")

    def make(name, objective, **arguments):
        tokenizer = train_tokenizer(texts, 450, name)
        predicting = objective(tokenizer, **arguments)
        store = load_or_build_store(
            folder / name, [texts_source(texts, "texts")], predicting.layout, block_characters=3000
        )
        return predicting, tokenizer, store

    return make


def everything(predicting, store, seed=0, epoch=0):
    """Return the batch of all examples."""
    blocks = [predicting.examples(store, block, seed=seed, epoch=epoch) for block in range(store.num_blocks)]
    examples = np.concatenate(blocks)
    examples["index"] = np.arange(len(examples))
    return examples, predicting.batch(store.corpus, BatchRecipe(epoch, examples), seed)


def sequences(batch, name: str, prefix: str = "") -> list[list[int]]:
    lengths = batch[f"{prefix}cu_seqlens"].diff().tolist()
    assert max(lengths) == batch[f"{prefix}max_seqlen"]
    return [part.tolist() for part in batch[name].split(lengths)]


def test_causal_language_predicts_every_token_once(prepare, texts):
    predicting, tokenizer, store = prepare("clm", CausalLanguage, max_length=32)
    examples, batch = everything(predicting, store)
    predicted = []
    for ids, labels, positions in zip(
        *(sequences(batch, name) for name in ("input_ids", "labels", "position_ids")), strict=True
    ):
        assert positions == list(range(len(ids)))
        assert 2 <= len(ids) <= 32
        assert labels == [IGNORE_INDEX, *ids[1:]]
        predicted += labels[1:]
    expected = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in texts]
    assert predicted == [token for document in expected for token in document]
    assert predicting.lengths(examples).tolist() == [len(ids) for ids in sequences(batch, "input_ids")]


def test_span_corruption(prepare, texts):
    predicting, tokenizer, store = prepare("span-corruption", SpanCorruption, max_length=32)
    examples, batch = everything(predicting, store)
    sentinels = tokenizer.convert_tokens_to_ids(list(SENTINELS))
    place = {token: FIRST_SENTINEL + number for number, token in enumerate(sentinels)} | {tokenizer.eos_token_id: END}

    def renamed(ids):
        return np.array([place.get(token, token) for token in ids])

    found = []
    for source, target, decoder, length in zip(
        sequences(batch, "input_ids"),
        sequences(batch, "labels", "decoder_"),
        sequences(batch, "decoder_input_ids", "decoder_"),
        predicting.lengths(examples).tolist(),
        strict=True,
    ):
        assert len(source) <= 32
        assert len(source) + len(target) == length
        assert decoder == [tokenizer.pad_token_id, *target[:-1]]
        found += undo_spans(renamed(source), renamed(target))
    assert found == [t for text in texts for t in tokenizer(text, add_special_tokens=False).input_ids]
    assert max(len(source) for source in sequences(batch, "input_ids")) == 32


def test_denoising(prepare, texts):
    predicting, tokenizer, store = prepare("denoising", Denoising, max_length=1000)
    _, batch = everything(predicting, store)
    targets = sequences(batch, "labels", "decoder_")
    assert [tokenizer.decode(target[1:-1]) for target in targets] == [" ".join(text.split("\n")) for text in texts]
    assert [ids for target in targets for ids in (target[0], target[-1])] == [0, 2] * len(texts)
    for source, target in zip(sequences(batch, "input_ids"), targets, strict=True):
        assert (source[0], source[-1]) == (0, 2)
        assert len(source) <= len(target)
        assert tokenizer.mask_token_id in source
    moved, _, _ = prepare("denoising", Denoising, max_length=1000, mask_probability=1e-9)
    moved_texts = [tokenizer.decode(s[1:-1]) for s in sequences(everything(moved, store)[1], "input_ids")]
    in_order = 0
    for text, permuted in zip(texts, moved_texts, strict=True):
        assert abs(len(text.split()) - len(permuted.split())) <= 2  # one token is masked
        in_order += permuted[:20] == text.replace("\n", " ")[:20]
    assert in_order < 0.5 * len(texts)


@pytest.mark.parametrize(
    ("name", "objective"), [("span-corruption", SpanCorruption), ("denoising", Denoising), ("mlm", MaskedLanguage)]
)
def test_batches_are_a_function_of_seed_epoch_and_example(prepare, name, objective):
    predicting, _, store = prepare(name, objective, max_length=64)
    examples, whole = everything(predicting, store, seed=1, epoch=2)
    half = predicting.batch(store.corpus, BatchRecipe(2, examples[10:20]), 1)
    assert sequences(half, "input_ids") == sequences(whole, "input_ids")[10:20]
    for seed, epoch in ((2, 2), (1, 3)):
        assert not torch.equal(everything(predicting, store, seed, epoch)[1]["input_ids"], whole["input_ids"])


def test_blocks_give_the_pairs_of_the_whole(prepare):
    """The pairs of a document, also the random ones, do not depend on the block in which the document is."""
    from fastformer.data.pretraining.bert import next_sentence_examples

    predicting, _, store = prepare("mlm", MaskedLanguage, max_length=64)
    examples, _ = everything(predicting, store, seed=3)
    whole = next_sentence_examples(store.corpus, 64, seed=3, epoch=0)
    names = ["a_begin", "a_end", "b_begin", "b_end", "next_sentence_label"]
    assert store.num_blocks > 2
    assert examples[names].tolist() == whole[names].tolist()


# --- Sentence order ---------------------------------------------------------------------------------------------------


def test_sentence_order(corpus):
    examples = sentence_order_examples(corpus, 64, seed=0, epoch=0)
    swapped = examples["next_sentence_label"] == 1
    assert abs(swapped.mean() - 0.5) < 3 * 0.5 / np.sqrt(len(examples))
    first, second = (
        np.where(swapped, examples[f"{a}_{end}"], examples[f"{b}_{end}"])
        for a, b, end in (("b", "a", "end"), ("a", "b", "begin"))
    )
    assert np.array_equal(first, second)  # consecutive, after they are put back in order
    covered = np.zeros(corpus.num_sentences, int)
    for example in examples:
        covered[example["a_begin"] : example["a_end"]] += 1
        covered[example["b_begin"] : example["b_end"]] += 1
    several = np.repeat(np.diff(corpus.document_offsets) > 1, np.diff(corpus.document_offsets))
    assert np.array_equal(covered, several.astype(int))  # each sentence once; a document of one sentence has none
    assert (examples["a_length"] + examples["b_length"] <= 61).all()


# --- Best fit ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 100), min_size=1, max_size=200), st.integers(0, 9))
def test_best_fit_packs_each_sequence_once(lengths, seed):
    lengths = np.array(lengths)
    batches = list(TokenBudgetSampler(lengths, 100, seed=seed, best_fit=True))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(lengths[batch].sum() <= 100 for batch in batches)


def test_best_fit_wastes_little_where_filling_in_order_wastes_much():
    lengths = np.minimum(random().geometric(1 / 300, size=3000), 1024)

    def full(best_fit: bool) -> float:
        return lengths.sum() / 1024 / len(TokenBudgetSampler(lengths, 1024, seed=0, best_fit=best_fit))

    assert full(best_fit=True) > 0.98
    assert full(best_fit=False) < 0.9


@pytest.mark.parametrize(
    ("name", "objective", "message"),
    [
        ("clm", CausalLanguage, "max_length must be at least 2"),
        ("span-corruption", SpanCorruption, "at least 4"),
    ],
)
def test_too_short_sequences_are_refused(texts, name, objective, message):
    with pytest.raises(ValueError, match=message):
        objective(train_tokenizer(texts, 400, name), 1)
