"""The objectives of BERT and ALBERT: next-sentence prediction, sentence order and masked language modelling.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding" (2019), section 3.1
and appendix A.2, and `create_pretraining_data.py` of its authors' implementation. Every random choice depends only on
(seed, epoch, index): not on earlier choices, the batch or the process.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastformer.data.packing import IGNORE_INDEX
from fastformer.data.pretraining.tokenized import TokenizedCorpus
from fastformer.data.randomness import Stream, generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NO_LABEL = -1
"""The next-sentence label of an example without a second segment."""

EXAMPLE = np.dtype(
    [(name, np.int64) for name in ("index", "a_begin", "a_end", "a_front", "a_length")]
    + [(name, np.int64) for name in ("b_begin", "b_end", "b_front", "b_length", "next_sentence_label")]
)
"""A training example, as indices into a corpus.

Segment A has the sentences a_begin to a_end (exclusive) without their first a_front tokens, a_length tokens in all.
Segment B is defined likewise; it is empty if next_sentence_label is NO_LABEL. The label is 0 if B follows A and 1 if B
is from another document. `index` numbers the examples of the epoch.
"""

Examples = NDArray[np.void]


# --- Next-sentence prediction -----------------------------------------------------------------------------------------

PAIR_SPECIAL_TOKENS = 3
SINGLE_SPECIAL_TOKENS = 2


def next_sentence_examples(
    corpus: TokenizedCorpus,
    max_length: int,
    *,
    seed: int,
    epoch: int,
    documents: range | None = None,
    short_sequence_probability: float = 0.1,
) -> Examples:
    """Make pairs of segments as BERT's `create_instances_from_document` does, in the order of the documents.

    A document is cut into chunks of whole sentences that reach the target length. The target is `max_length` minus
    three special tokens, or, in a share of `short_sequence_probability` of the documents, a random number from 2 to
    that. A chunk is split into A and B after a random sentence. Half of the time, and always in a chunk of one
    sentence, B is drawn from a random place in another document instead; the sentences it replaced start the next
    chunk. A pair that is too long loses tokens of its longer segment, each from a random end.

    Args:
        corpus: at least two documents, at least one of them with two sentences.
        max_length: tokens per example with the three special tokens, at least 5.
        seed, epoch: they determine all random choices.
        documents: a range of documents to make pairs of, None for all; random segments come from all documents.
        short_sequence_probability: share of the documents with a shorter target length.

    Returns:
        Structured array of type EXAMPLE; every label is 0 or 1.
    """
    check_next_sentence_corpus(corpus)
    documents = range(corpus.num_documents) if documents is None else documents
    pairs = _Pairs(corpus, documents, _longest_pair(max_length), short_sequence_probability)
    rows = [row for d in documents for row in pairs.of_document(d, generator(seed, Stream.PAIRS, epoch, d))]
    return _pair_examples(rows, corpus, max_length, generator(seed, Stream.TRUNCATION, epoch, documents.start))


def sentence_order_examples(
    corpus: TokenizedCorpus, max_length: int, *, seed: int, epoch: int, documents: range | None = None
) -> Examples:
    """Make pairs of consecutive segments and swap half of them; the label is 1 for a swapped pair.

    Lan et al., "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations" (2020), section 3.1.
    Segments are made as in `next_sentence_examples`, except that a chunk has at least two sentences; a single last
    sentence joins the chunk before it. A document of one sentence gives no example.

    Args:
        corpus: at least one document with two sentences.
        max_length, seed, epoch, documents: see `next_sentence_examples`.
    """
    check_sentence_order_corpus(corpus)
    documents = range(corpus.num_documents) if documents is None else documents
    pairs = _Pairs(corpus, documents, _longest_pair(max_length), short_sequence_probability=0.1)
    rows = [row for d in documents for row in pairs.in_order(d, generator(seed, Stream.PAIRS, epoch, d))]
    return _pair_examples(rows, corpus, max_length, generator(seed, Stream.TRUNCATION, epoch, documents.start))


def check_sentence_order_corpus(corpus: TokenizedCorpus) -> None:
    """Raise ValueError if no document of the corpus has two sentences."""
    if corpus.num_sentences == corpus.num_documents:
        raise ValueError(
            f"sentence order needs documents of several sentences, but each of the {corpus.num_documents} documents "
            "has only one"
        )


def _longest_pair(max_length: int) -> int:
    if max_length < PAIR_SPECIAL_TOKENS + 2:
        raise ValueError(f"max_length must be at least {PAIR_SPECIAL_TOKENS + 2} for pairs, got {max_length}")
    return max_length - PAIR_SPECIAL_TOKENS


def _pair_examples(
    rows: list[tuple[int, int, int, int, int]], corpus: TokenizedCorpus, max_length: int, random: np.random.Generator
) -> Examples:
    examples = np.zeros(len(rows), dtype=EXAMPLE)
    examples["index"] = np.arange(len(rows))
    for name, column in zip(
        ("a_begin", "a_end", "b_begin", "b_end", "next_sentence_label"),
        np.array(rows, np.int64).reshape(-1, 5).T,
        strict=True,
    ):
        examples[name] = column
    _truncate_pairs(examples, corpus, _longest_pair(max_length), random)
    return examples


def check_next_sentence_corpus(corpus: TokenizedCorpus) -> None:
    """Raise ValueError if the corpus cannot give pairs with both labels."""
    if corpus.num_documents < 2:
        raise ValueError(
            f"next-sentence prediction needs at least two documents, got {corpus.num_documents}: "
            "a random next sentence comes from another document; separate documents by blank lines"
        )
    if corpus.num_sentences == corpus.num_documents:
        raise ValueError(
            f"next-sentence prediction needs documents of several sentences, but each of the {corpus.num_documents} "
            "documents has only one"
        )


class _Pairs:
    """The pairs of segments of some consecutive documents of a corpus, before they are truncated."""

    def __init__(
        self, corpus: TokenizedCorpus, documents: range, longest: int, short_sequence_probability: float
    ) -> None:
        first, last = (int(corpus.document_offsets[d]) for d in (documents.start, documents.stop))
        self.corpus = corpus
        self.base = first  # the lists hold these documents only, and count their sentences from 0
        self.opening = np.diff(corpus.opening_offsets[first : last + 1]).tolist()
        self.following = corpus.following_offsets[first : last + 1].tolist()
        self.longest = longest
        self.short_sequence_probability = short_sequence_probability

    def of_document(self, document: int, random: np.random.Generator) -> list[tuple[int, int, int, int, int]]:
        """Return (a_begin, a_end, b_begin, b_end, label) of each pair of a document."""
        target = self._target(random)
        begin, end = self._sentences(document)
        pairs = []
        while begin < end:
            chunk_end = self._reach(begin, end, target)
            a_end = begin + 1 if chunk_end == begin + 1 else int(random.integers(begin + 1, chunk_end))
            a = self.base + begin, self.base + a_end
            if chunk_end == begin + 1 or random.random() < 0.5:
                missing = target - self._length(begin, a_end)
                pairs.append((*a, *self._elsewhere(document, missing, random), 1))
                begin = a_end
            else:
                pairs.append((*a, self.base + a_end, self.base + chunk_end, 0))
                begin = chunk_end
        return pairs

    def in_order(self, document: int, random: np.random.Generator) -> list[tuple[int, int, int, int, int]]:
        """Return the pairs of consecutive segments of a document, half of them swapped."""
        target = self._target(random)
        begin, end = self._sentences(document)
        pairs = []
        while end - begin > 1:
            chunk_end = max(begin + 2, self._reach(begin, end, target))
            if end - chunk_end == 1:
                chunk_end = end
            middle = int(random.integers(begin + 1, chunk_end))
            segments = ((self.base + begin, self.base + middle), (self.base + middle, self.base + chunk_end))
            swapped = random.random() < 0.5
            first, second = segments[::-1] if swapped else segments
            pairs.append((*first, *second, int(swapped)))
            begin = chunk_end
        return pairs

    def _target(self, random: np.random.Generator) -> int:
        if random.random() < self.short_sequence_probability:
            return int(random.integers(2, self.longest, endpoint=True))
        return self.longest

    def _sentences(self, document: int) -> tuple[int, int]:
        begin, end = self.corpus.document_offsets[document : document + 2].tolist()
        return begin - self.base, end - self.base

    def _elsewhere(self, document: int, length: int, random: np.random.Generator) -> tuple[int, int]:
        """Return a random segment of another document of the whole corpus."""
        corpus = self.corpus
        other = int(random.integers(corpus.num_documents - 1))
        other += other >= document
        start, end = corpus.document_offsets[other : other + 2].tolist()
        begin = int(random.integers(start, end))
        following = corpus.following_offsets[begin + 1 : end + 1]
        missing = length - int(corpus.opening_offsets[begin + 1] - corpus.opening_offsets[begin])
        return begin, begin + 1 + int(np.searchsorted(following[:-1], missing + following[0]))

    def _length(self, begin: int, end: int) -> int:
        return self.opening[begin] + self.following[end] - self.following[begin + 1]

    def _reach(self, begin: int, end: int, length: int) -> int:
        """Return the end, at most `end`, of the shortest segment from `begin` with at least `length` tokens.

        The segment has at least one sentence.
        """
        offset = length - self.opening[begin] + self.following[begin + 1]
        return bisect_left(self.following, offset, lo=begin + 1, hi=end)


def _truncate_pairs(examples: Examples, corpus: TokenizedCorpus, longest: int, random: np.random.Generator) -> None:
    """Set fronts and lengths so that no pair has more than `longest` tokens (BERT's `truncate_seq_pair`).

    BERT removes one token at a time, from A if A is longer and otherwise from B. This is the result in closed form: the
    longer segment keeps the space that the shorter one leaves, unless both are longer than half of `longest`.
    """
    a = corpus.segment_lengths(examples["a_begin"], examples["a_end"])
    b = corpus.segment_lengths(examples["b_begin"], examples["b_end"])
    a_kept = np.minimum(a, np.maximum(longest - b, (longest + 1) // 2))
    b_kept = np.minimum(b, longest - a_kept)
    for name, length, kept in (("a", a, a_kept), ("b", b, b_kept)):
        examples[f"{name}_length"] = kept
        examples[f"{name}_front"] = random.binomial(length - kept, 0.5)


# --- Single segments --------------------------------------------------------------------------------------------------


def single_segment_examples(corpus: TokenizedCorpus, max_length: int) -> Examples:
    """Cut every document into examples of one segment, for masked language modelling alone.

    An example has as many whole sentences as fit. A sentence that is too long for one example continues in the next
    ones, so each token of the corpus is in exactly one example. (Liu et al., "RoBERTa" (2019), section 4.2,
    DOC-SENTENCES.)

    Args:
        corpus: the documents.
        max_length: tokens per example with the two special tokens, at least 3.

    Returns:
        Structured array of type EXAMPLE; every label is NO_LABEL.
    """
    longest = max_length - SINGLE_SPECIAL_TOKENS
    if longest < 1:
        raise ValueError(f"max_length must be at least {SINGLE_SPECIAL_TOKENS + 1}, got {max_length}")
    opening = np.diff(corpus.opening_offsets).tolist()
    following = corpus.following_offsets.tolist()
    rows: list[tuple[int, int, int, int]] = []  # begin, end, front, length
    for begin, end in pairwise(corpus.document_offsets.tolist()):
        while begin < end:
            if opening[begin] > longest:
                fronts = range(0, opening[begin], longest)
                rows += [(begin, begin + 1, front, min(longest, opening[begin] - front)) for front in fronts]
                begin += 1
                continue
            base = following[begin + 1] - opening[begin]
            last = bisect_left(following, base + longest + 1, lo=begin + 1, hi=end + 1) - 1
            rows.append((begin, last, 0, following[last] - base))
            begin = last
    examples = np.zeros(len(rows), dtype=EXAMPLE)
    examples["index"] = np.arange(len(rows))
    for name, column in zip(("a_begin", "a_end", "a_front", "a_length"), np.array(rows).T, strict=True):
        examples[name] = column
    examples["next_sentence_label"] = NO_LABEL
    return examples


def example_lengths(examples: Examples) -> NDArray[np.int64]:
    """Return (N,) the number of tokens of each example with its special tokens."""
    single = examples["next_sentence_label"] == NO_LABEL
    special = np.where(single, SINGLE_SPECIAL_TOKENS, PAIR_SPECIAL_TOKENS)
    return examples["a_length"] + examples["b_length"] + special


# --- Masked language modelling ----------------------------------------------------------------------------------------


class MaskedLanguageModelling:
    """BERT's masking: a share of each sequence's tokens is chosen for prediction.

    80 % of the chosen tokens are replaced by ``[MASK]``, 10 % by a random entry of the vocabulary, and 10 % are kept.
    Of n tokens that are not special, exactly ``max(1, round(probability * n))`` are chosen (BERT's own code counts the
    special tokens in n, its paper does not). With `whole_word`, words are chosen in random order as long as they fit
    into that number, but at least one word. A word starts at a token with a leading space, and at the first token of a
    segment.

    Args:
        tokenizer: provides the special tokens and the vocabulary.
        probability: share of tokens to predict, in (0, 1).
        whole_word: choose whole words instead of tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, probability: float = 0.15, whole_word: bool = False) -> None:
        if not 0 < probability < 1:
            raise ValueError(f"probability must be in (0, 1), got {probability}")
        self.probability = probability
        self.whole_word = whole_word
        self.mask_id = tokenizer.mask_token_id
        self.vocab_size = len(tokenizer)
        tokens = tokenizer.convert_ids_to_tokens(list(range(self.vocab_size)))
        self.starts_word = np.array([token.startswith("Ġ") for token in tokens])

    def __call__(
        self,
        input_ids: NDArray[np.int64],
        cu_seqlens: NDArray[np.int64],
        special: NDArray[np.bool_],
        generators: Sequence[np.random.Generator],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Mask packed sequences.

        Args:
            input_ids: (T,) int64.
            cu_seqlens: (B + 1,) int64 offsets of the sequences, each with at least one token that is not special.
            special: (T,) bool, true at special tokens, which are never chosen.
            generators: B generators, one per sequence.

        Returns:
            The masked ids, (T,) int64, and the labels, (T,) int64: the id of each chosen token, IGNORE_INDEX elsewhere.
        """
        sequence = np.repeat(np.arange(len(generators)), np.diff(cu_seqlens))
        lengths = np.diff(cu_seqlens).tolist()
        draws = [random.random((3, length)) for random, length in zip(generators, lengths, strict=True)]
        priority, action, replacement = np.concatenate(draws, axis=1)
        candidates = np.add.reduceat((~special).astype(np.int64), cu_seqlens[:-1])
        wanted = np.maximum(1, np.rint(self.probability * candidates)).astype(np.int64)
        if self.whole_word:
            chosen = self._choose_words(input_ids, cu_seqlens, special, priority, wanted)
        else:
            chosen = _choose_tokens(sequence, cu_seqlens, special, priority, wanted)

        labels = np.full_like(input_ids, IGNORE_INDEX)
        labels[chosen] = input_ids[chosen]
        masked = input_ids.copy()
        masked[chosen & (action < 0.8)] = self.mask_id
        random_token = chosen & (action >= 0.8) & (action < 0.9)
        masked[random_token] = (replacement[random_token] * self.vocab_size).astype(np.int64)
        return masked, labels

    def _choose_words(
        self,
        input_ids: NDArray[np.int64],
        cu_seqlens: NDArray[np.int64],
        special: NDArray[np.bool_],
        priority: NDArray[np.float64],
        wanted: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        follows_special = np.concatenate([[True], special[:-1]])
        # A special token starts a "word" too, so that the word before it ends there; its priority is the lowest.
        starts = np.flatnonzero(special | follows_special | self.starts_word[input_ids])
        ends = np.append(starts[1:], len(input_ids))
        rank = np.where(special, np.inf, priority)[starts]
        order = np.lexsort((rank, np.searchsorted(cu_seqlens, starts, side="right")))
        chosen = np.zeros(len(input_ids), dtype=bool)
        boundaries = np.searchsorted(starts, cu_seqlens)
        for number, (first, last) in zip(wanted.tolist(), pairwise(boundaries.tolist()), strict=True):
            words = order[first:last]
            words = words[~special[starts[words]]]
            for word in _fitting(ends[words] - starts[words], number):
                chosen[starts[words[word]] : ends[words[word]]] = True
        return chosen


def _choose_tokens(
    sequence: NDArray[np.int64],
    cu_seqlens: NDArray[np.int64],
    special: NDArray[np.bool_],
    priority: NDArray[np.float64],
    wanted: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Choose in each sequence the `wanted` tokens of lowest priority."""
    order = np.lexsort((np.where(special, np.inf, priority), sequence))
    rank = np.arange(len(sequence)) - cu_seqlens[sequence]
    chosen = np.zeros(len(sequence), dtype=bool)
    chosen[order[rank < wanted[sequence]]] = True
    return chosen


def _fitting(sizes: NDArray[np.int64], limit: int) -> list[int]:
    """Take items in order if their size fits into the rest of the limit; return the first one if none fits."""
    taken = []
    left = limit
    for item, size in enumerate(sizes.tolist()):
        if size <= left:
            taken.append(item)
            left -= size
            if left == 0:
                break
    return taken or [0]
