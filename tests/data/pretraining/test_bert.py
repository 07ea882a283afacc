from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastformer.data.packing import IGNORE_INDEX
from fastformer.data.pretraining.bert import (
    EXAMPLE,
    MaskedLanguageModelling,
    _truncate_pairs,
    example_lengths,
    next_sentence_examples,
    single_segment_examples,
)
from fastformer.data.pretraining.tokenized import TokenizedCorpus, tokenize
from fastformer.data.randomness import Stream, generator

pytestmark = pytest.mark.quick

IS_NEXT, RANDOM = 0, 1


def assert_binomial(successes: int, trials: int, probability: float) -> None:
    """Check that the successes are within five standard deviations of their mean.

    A right program fails for fewer than one seed in a million.
    """
    deviation = math.sqrt(trials * probability * (1 - probability))
    assert abs(successes - trials * probability) <= 5 * deviation, (successes, trials, probability)


def corpus_of_lengths(documents: list[list[int]]) -> TokenizedCorpus:
    """Return a corpus whose sentences have these numbers of tokens, all different, in both of their forms."""
    lengths = np.array([length for document in documents for length in document])
    opening = 2 + np.concatenate([[0], np.cumsum(lengths)])
    return TokenizedCorpus(
        ids=np.arange(2 + 2 * lengths.sum(), dtype=np.int32),
        opening_offsets=opening,
        following_offsets=opening + lengths.sum(),
        document_offsets=np.concatenate([[0], np.cumsum([len(document) for document in documents])]),
    )


corpora = st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=12), min_size=2, max_size=8).filter(
    lambda documents: any(len(document) > 1 for document in documents)
)

# --- Next-sentence prediction -----------------------------------------------------------------------------------------


@given(corpora, st.integers(5, 40), st.integers(0, 2**64 - 1))
def test_pairs_are_those_of_bert(documents, max_length, seed):
    """The pairs follow BERT's walk through a document: the chunks, the begin of B, and the begin of the next chunk."""
    corpus = corpus_of_lengths(documents)
    examples = next_sentence_examples(corpus, max_length, seed=seed, epoch=3, short_sequence_probability=0)
    longest = max_length - 3
    lengths = np.array([length for document in documents for length in document])
    document_of = np.repeat(np.arange(len(documents)), [len(document) for document in documents])

    assert examples["index"].tolist() == list(range(len(examples)))
    rows = iter(examples.tolist())
    for document, first in enumerate(corpus.document_offsets[:-1].tolist()):
        end = first + len(documents[document])
        while first < end:
            _, a_begin, a_end, _, _, b_begin, b_end, _, _, label = next(rows)
            reached = np.flatnonzero(np.cumsum(lengths[first:end]) >= longest)
            chunk_end = first + 1 + int(reached[0]) if len(reached) else end
            assert a_begin == first
            if label == IS_NEXT:
                assert a_begin < a_end == b_begin < b_end == chunk_end
                first = b_end
            else:
                assert a_begin < a_end <= max(a_begin + 1, chunk_end - 1)
                assert document_of[b_begin] == document_of[b_end - 1] != document
                missing = longest - lengths[a_begin:a_end].sum()
                assert lengths[b_begin : b_end - 1].sum() < max(missing, 1)
                assert (
                    lengths[b_begin:b_end].sum() >= missing
                    or b_end == corpus.document_offsets[document_of[b_begin] + 1]
                )
                first = a_end
    assert next(rows, None) is None


def truncate_as_bert(a: int, b: int, longest: int) -> tuple[int, int]:
    while a + b > longest:
        if a > b:
            a -= 1
        else:
            b -= 1
    return a, b


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=30), st.integers(2, 70))
def test_truncation_is_that_of_bert(pairs, longest):
    corpus = corpus_of_lengths([list(pair) for pair in pairs])
    examples = np.zeros(len(pairs), dtype=EXAMPLE)
    examples["a_begin"] = np.arange(len(pairs)) * 2
    for offset, name in enumerate(("a_end", "b_begin", "b_end"), start=0):
        examples[name] = examples["a_begin"] + (1, 1, 2)[offset]
    _truncate_pairs(examples, corpus, longest, np.random.default_rng(0))
    assert list(zip(examples["a_length"], examples["b_length"], strict=True)) == [
        truncate_as_bert(a, b, longest) for a, b in pairs
    ]
    for segment, lengths in zip("ab", np.array(pairs).T, strict=True):
        front, kept = examples[f"{segment}_front"], examples[f"{segment}_length"]
        assert ((front >= 0) & (front + kept <= lengths)).all()


def test_statistics_of_pairs():
    random = np.random.default_rng(2)
    documents = [random.integers(1, 9, size=100).tolist() for _ in range(300)]
    corpus = corpus_of_lengths(documents)
    examples = next_sentence_examples(corpus, 48, seed=5, epoch=0, short_sequence_probability=0)

    # If the last sentence of a document is a chunk of its own, a random sentence always follows it.
    several = (examples["a_begin"] + 1) % 100 != 0
    assert several.sum() > 1000
    assert_binomial((examples["next_sentence_label"][several] == RANDOM).sum(), several.sum(), 0.5)

    drawn = examples[examples["next_sentence_label"] == RANDOM]
    of, origin = drawn["b_begin"] // 100, drawn["a_begin"] // 100
    assert not (of == origin).any()
    assert_binomial((of < 100).sum(), len(of), np.where(origin < 100, 99 / 299, 100 / 299).mean())
    assert_binomial((drawn["b_begin"] % 100 < 30).sum(), len(drawn), 0.3)

    removed = corpus.segment_lengths(examples["a_begin"], examples["a_end"]) - examples["a_length"]
    assert removed.sum() > 1000
    assert_binomial(examples["a_front"].sum(), removed.sum(), 0.5)


def test_short_sequences():
    documents = [[1] * 60 for _ in range(5000)]
    examples = next_sentence_examples(corpus_of_lengths(documents), 43, seed=1, epoch=0, short_sequence_probability=0.1)
    first_chunks = examples[(examples["a_begin"] % 60 == 0) & (examples["next_sentence_label"] == IS_NEXT)]
    # Sentences of one token: a chunk has exactly the target length. A short one is uniform in 2 to 40.
    lengths = example_lengths(first_chunks) - 3
    assert lengths.min() == 2
    assert_binomial((lengths < 40).sum(), len(lengths), 0.1 * 38 / 39)
    assert_binomial((lengths[lengths < 40] < 20).sum(), (lengths < 40).sum(), 18 / 38)


def test_pairs_are_a_function_of_seed_and_epoch(corpus):
    def pairs(seed, epoch):
        return next_sentence_examples(corpus, 64, seed=seed, epoch=epoch).tolist()

    assert pairs(1, 2) == pairs(1, 2)
    assert pairs(1, 2) != pairs(1, 3)
    assert pairs(1, 2) != pairs(2, 2)


def test_pairs_of_a_document_do_not_depend_on_the_others():
    documents = [[3] * 30, [4] * 50, [2] * 40]
    changed = [documents[0], documents[1], [5] * 40]
    first, second = (next_sentence_examples(corpus_of_lengths(d), 32, seed=0, epoch=0) for d in (documents, changed))
    names = ["a_begin", "a_end", "next_sentence_label"]
    before = first["a_begin"] < 80
    assert first[before][names].tolist() == second[second["a_begin"] < 80][names].tolist()


@pytest.mark.parametrize(
    ("unfit", "message"),
    [([["One.", "Two."]], "at least two documents, got 1"), ([["One."], ["Two."]], "each of the 2")],
)
def test_corpus_without_pairs_is_refused(tokenizer, unfit, message):
    with pytest.raises(ValueError, match=message):
        next_sentence_examples(tokenize(unfit, tokenizer), 32, seed=0, epoch=0)


def test_too_short_sequences_are_refused(corpus):
    with pytest.raises(ValueError, match="max_length must be at least 5 for pairs, got 4"):
        next_sentence_examples(corpus, 4, seed=0, epoch=0)
    with pytest.raises(ValueError, match="max_length must be at least 3, got 2"):
        single_segment_examples(corpus, 2)


# --- Single segments --------------------------------------------------------------------------------------------------


@given(corpora, st.integers(3, 40))
def test_single_segments_cover_each_token_once(documents, max_length):
    corpus = corpus_of_lengths(documents)
    examples = single_segment_examples(corpus, max_length)
    assert example_lengths(examples).max() <= max_length
    lengths = corpus.segment_lengths(examples["a_begin"], examples["a_end"])
    covered = np.zeros(corpus.opening_offsets[-1], dtype=int)
    for row, length in zip(examples, lengths, strict=True):
        start = corpus.opening_offsets[row["a_begin"]] + row["a_front"]
        covered[start : start + row["a_length"]] += 1
        assert row["a_front"] + row["a_length"] <= length
        # Only a sentence too long for an example is cut.
        assert row["a_length"] == length or (row["a_end"] == row["a_begin"] + 1 and length > max_length - 2)
        # One more sentence would not fit, unless the document ends, or a sentence to be cut comes next or came before.
        if row["a_length"] == length and row["a_end"] not in corpus.document_offsets:
            assert corpus.segment_lengths(row["a_begin"], row["a_end"] + 1) > max_length - 2
    assert covered[2:].tolist() == [1] * (len(covered) - 2)


# --- Masked language modelling ----------------------------------------------------------------------------------------


def random_sequences(tokenizer, seed: int, count: int, longest: int):
    random = np.random.default_rng(seed)
    lengths = random.integers(3, longest + 1, size=count)
    ids = random.integers(5, len(tokenizer), size=lengths.sum())
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    special = np.zeros(len(ids), dtype=bool)
    special[cu_seqlens[:-1]] = special[cu_seqlens[1:] - 1] = True
    ids[special] = tokenizer.sep_token_id
    return ids, cu_seqlens, special


def mask(masking, ids, cu_seqlens, special, epoch=0):
    generators = [generator(0, Stream.MASKS, epoch, index) for index in range(len(cu_seqlens) - 1)]
    return masking(ids, cu_seqlens, special, generators)


@pytest.mark.parametrize("whole_word", [False, True])
def test_statistics_of_masks(tokenizer, whole_word):
    sequences = ids, _, special = random_sequences(tokenizer, seed=1, count=3000, longest=128)
    masked, labels = mask(MaskedLanguageModelling(tokenizer, 0.15, whole_word), *sequences)
    chosen = labels != IGNORE_INDEX
    assert not (chosen & special).any()
    assert (labels[chosen] == ids[chosen]).all()
    assert (masked[~chosen] == ids[~chosen]).all()

    total = chosen.sum()
    is_mask, is_kept = masked[chosen] == tokenizer.mask_token_id, masked[chosen] == ids[chosen]
    vocabulary = len(tokenizer)
    # A random token is the mask token with a probability of 1 / vocabulary, and the token itself with the same.
    assert_binomial(is_mask.sum(), total, 0.8 + 0.1 / vocabulary)
    assert_binomial(is_kept.sum(), total, 0.1 + 0.1 / vocabulary)
    drawn = masked[chosen][~is_mask & ~is_kept]
    assert_binomial((drawn < vocabulary // 2).sum(), len(drawn), (vocabulary // 2) / vocabulary)
    assert drawn.min() < 5  # random tokens are any entry of the vocabulary, special ones too
    assert drawn.max() >= vocabulary - 5


@pytest.mark.parametrize("probability", [0.01, 0.15, 0.5])
def test_exactly_the_share_is_chosen_in_each_sequence(tokenizer, probability):
    sequences = _, cu_seqlens, special = random_sequences(tokenizer, seed=2, count=500, longest=100)
    _, labels = mask(MaskedLanguageModelling(tokenizer, probability), *sequences)
    for begin, end in pairwise(cu_seqlens):
        ordinary = (~special[begin:end]).sum()
        assert (labels[begin:end] != IGNORE_INDEX).sum() == max(1, round(probability * ordinary))


def test_every_place_is_chosen_equally_often(tokenizer):
    ids = np.tile(np.r_[2, np.arange(10, 30), 3], 4000)
    special = np.isin(ids, (2, 3))
    _, labels = mask(MaskedLanguageModelling(tokenizer), ids, np.arange(4001) * 22, special)
    for count in (labels != IGNORE_INDEX).reshape(4000, 22)[:, 1:-1].sum(axis=0):
        assert_binomial(count, 4000, 3 / 20)


def words_of(tokenizer, ids, special):
    """Return the ranges of whole words, found token by token."""
    words: list[list[int]] = []
    for place, token in enumerate(tokenizer.convert_ids_to_tokens(ids.tolist())):
        if special[place]:
            continue
        if token.startswith("Ġ") or special[place - 1]:
            words.append([])
        words[-1].append(place)
    return words


@given(st.integers(0, 1000), st.floats(0.05, 0.6))
def test_whole_words(tokenizer, seed, probability):
    sequences = ids, cu_seqlens, special = random_sequences(tokenizer, seed=seed, count=5, longest=60)
    _, labels = mask(MaskedLanguageModelling(tokenizer, probability, whole_word=True), *sequences, epoch=seed)
    chosen = labels != IGNORE_INDEX
    for begin, end in pairwise(cu_seqlens):
        words = words_of(tokenizer, ids[begin:end], special[begin:end])
        taken = [word for word in words if chosen[begin:end][word].any()]
        assert all(chosen[begin:end][word].all() for word in taken)
        wanted = max(1, round(probability * (~special[begin:end]).sum()))
        number = sum(map(len, taken))
        assert number >= 1
        assert number <= wanted or len(taken) == 1
        # No word that was left out would still have fitted.
        assert all(number + len(word) > wanted for word in words if word not in taken)


def test_masks_change_with_the_epoch_and_repeat_with_it(tokenizer):
    sequences = random_sequences(tokenizer, seed=3, count=20, longest=50)
    masking = MaskedLanguageModelling(tokenizer)
    first, again, other = (mask(masking, *sequences, epoch=epoch) for epoch in (0, 0, 1))
    assert (first[0] == again[0]).all()
    assert (first[1] == again[1]).all()
    assert (first[1] != other[1]).any()


@pytest.mark.parametrize("probability", [0, 1, -0.1])
def test_probability_out_of_range(tokenizer, probability):
    with pytest.raises(ValueError, match=r"probability must be in \(0, 1\)"):
        MaskedLanguageModelling(tokenizer, probability)


def test_generators_are_independent():
    draws = {
        generator(seed, stream, epoch, index).random()
        for seed in (0, 1, 2**64 - 1)
        for stream in Stream
        for epoch in (0, 1, 2)
        for index in (0, 1, 2, 10**9)
    }
    assert len(draws) == 3 * len(Stream) * 3 * 4
