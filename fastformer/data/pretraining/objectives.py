"""The pretraining objectives as a data module needs them: what to tokenize, what to draw, how to make a batch of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastformer.data.packing import IGNORE_INDEX, PackedBatch, PackedPairBatch, pack, pack_pairs
from fastformer.data.pretraining.batches import BatchRecipe, example_generators, masked_batch
from fastformer.data.pretraining.bert import (
    SINGLE_SPECIAL_TOKENS,
    Examples,
    MaskedLanguageModelling,
    check_next_sentence_corpus,
    check_sentence_order_corpus,
    example_lengths,
    next_sentence_examples,
    sentence_order_examples,
    single_segment_examples,
)
from fastformer.data.pretraining.corruption import SpanNoise, corrupt_spans, infill
from fastformer.data.pretraining.store import DocumentCorpus, DocumentLayout, Layout, SentenceLayout, TokenStore
from fastformer.data.pretraining.tokenized import TokenizedCorpus
from fastformer.data.pretraining.tokenizer import SENTINELS
from fastformer.data.pretraining.windows import tokens_of, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PretrainingObjective(Protocol):
    """What is predicted from what.

    Attributes:
        layout: how the corpus is tokenized.
        best_fit: how batches are filled.
    """

    layout: Layout
    best_fit: bool

    def check(self, corpus: Any) -> None:
        """Raises ValueError for a corpus that gives no examples."""

    def examples(self, store: TokenStore, block: int, *, seed: int, epoch: int) -> Examples:
        """The examples of one block, referring to the whole corpus; their indices count from 0."""

    def lengths(self, examples: Examples) -> NDArray[np.int64]:
        """(N,) tokens of each example, those of a source and its target together."""

    def batch(self, corpus: Any, recipe: BatchRecipe, seed: int) -> Any:
        """The packed batch of a recipe."""


class MaskedLanguage:
    """BERT's: masked tokens, and with pairs of segments whether they belong together, or in which order they come.

    Args:
        tokenizer: made for "mlm".
        max_length: tokens of the longest sequence.
        next_sentence: pairs rather than single segments.
        sentence_order: the second segment always follows, and half of the pairs are swapped; needs `next_sentence`.
        whole_word, mask_probability: see `MaskedLanguageModelling`.
    """

    best_fit = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_length: int,
        next_sentence: bool = True,
        sentence_order: bool = False,
        whole_word: bool = False,
        mask_probability: float = 0.15,
    ) -> None:
        self.layout: Layout = SentenceLayout(tokenizer)
        self.max_length = max_length
        self.next_sentence = next_sentence
        self.sentence_order = sentence_order
        self.masking = MaskedLanguageModelling(tokenizer, mask_probability, whole_word)

    def check(self, corpus: TokenizedCorpus) -> None:
        if self.next_sentence:
            (check_sentence_order_corpus if self.sentence_order else check_next_sentence_corpus)(corpus)

    def examples(self, store: TokenStore, block: int, *, seed: int, epoch: int) -> Examples:
        if not self.next_sentence:
            return _segments(store, block, self.max_length)
        make = sentence_order_examples if self.sentence_order else next_sentence_examples
        documents = range(store.block_documents[block], store.block_documents[block + 1])
        return make(store.corpus, self.max_length, seed=seed, epoch=epoch, documents=documents)

    def lengths(self, examples: Examples) -> NDArray[np.int64]:
        return example_lengths(examples)

    def batch(self, corpus: TokenizedCorpus, recipe: BatchRecipe, seed: int) -> PackedBatch:
        return masked_batch(corpus, recipe, seed, masking=self.masking)


class CausalLanguage:
    """Every token from those before it in its document; no document sees another.

    A longer document is cut, each window beginning with the last token of the one before, so that every token of the
    corpus is predicted exactly once. Labels are the ids, with -100 at each sequence's first token, which nothing
    predicts; a model moves them by one place, as Hugging Face's do.
    """

    best_fit = True

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}")
        self.layout: Layout = DocumentLayout(tokenizer, mark_ends=True)
        self.max_length = max_length

    def check(self, corpus: DocumentCorpus) -> None:
        """Any will do."""

    def examples(self, store: TokenStore, block: int, *, seed: int, epoch: int) -> Examples:
        return windows(store.block(block), self.max_length, overlap=1)

    def lengths(self, examples: Examples) -> NDArray[np.int64]:
        return examples["length"]

    def batch(self, corpus: DocumentCorpus, recipe: BatchRecipe, seed: int) -> dict[str, Any]:
        batch = pack(tokens_of(corpus, recipe.examples))
        labels = batch["input_ids"].clone()
        labels[batch["cu_seqlens"][:-1].long()] = IGNORE_INDEX
        return {**batch, "labels": labels}


class SpanCorruption:
    """T5's: the spans that sentinels stand for. A document is cut into windows whose sources have `max_length` tokens
    at most; a window has no more spans than there are sentinels, 100.

    Args:
        tokenizer: made for "span-corruption".
        max_length: tokens of the longest source.
        noise: how much is left out.
    """

    best_fit = True

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int, noise: SpanNoise | None = None) -> None:
        self.noise = noise or SpanNoise()
        self.layout: Layout = DocumentLayout(tokenizer, mark_ends=False)
        self.window = self._longest_window(max_length)
        self.sentinels = np.array(tokenizer.convert_tokens_to_ids(list(SENTINELS)))
        self.end, self.start = tokenizer.eos_token_id, tokenizer.pad_token_id

    def _longest_window(self, max_length: int) -> int:
        lengths = np.arange(1, 4 * max_length + 1)
        _, spans = self.noise.counts(lengths)
        fitting = lengths[(self.noise.source_lengths(lengths) <= max_length) & (spans <= len(SENTINELS))]
        if not len(fitting) or max_length < 4:
            raise ValueError(f"max_length must be at least 4, got {max_length}")
        return int(fitting[-1])

    def check(self, corpus: DocumentCorpus) -> None:
        """Any will do."""

    def examples(self, store: TokenStore, block: int, *, seed: int, epoch: int) -> Examples:
        return windows(store.block(block), self.window)

    def lengths(self, examples: Examples) -> NDArray[np.int64]:
        return self.noise.source_lengths(examples["length"]) + self.noise.target_lengths(examples["length"])

    def batch(self, corpus: DocumentCorpus, recipe: BatchRecipe, seed: int) -> PackedPairBatch:
        pairs = [
            corrupt_spans(tokens, self.sentinels, self.end, self.noise, random)
            for tokens, random in zip(tokens_of(corpus, recipe.examples), example_generators(recipe, seed), strict=True)
        ]
        sources, targets = zip(*pairs, strict=True)
        return pack_pairs(sources, targets, self.start)


class Denoising:
    """BART's: a text from one in which spans are masked and the sentences are in random order.

    Args:
        tokenizer: made for "denoising".
        max_length: tokens of the longest source and target.
        mask_probability: share of the tokens that are masked.
        permute_sentences: False leaves them in order.
    """

    best_fit = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_length: int,
        mask_probability: float = 0.3,
        permute_sentences: bool = True,
    ) -> None:
        self.layout: Layout = SentenceLayout(tokenizer)
        self.max_length = max_length
        self.mask_probability = mask_probability
        self.permute_sentences = permute_sentences
        self.begin, self.end, self.mask = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id

    def check(self, corpus: TokenizedCorpus) -> None:
        """Any will do."""

    def examples(self, store: TokenStore, block: int, *, seed: int, epoch: int) -> Examples:
        return _segments(store, block, self.max_length)

    def lengths(self, examples: Examples) -> NDArray[np.int64]:
        return 2 * (examples["a_length"] + SINGLE_SPECIAL_TOKENS)

    def batch(self, corpus: TokenizedCorpus, recipe: BatchRecipe, seed: int) -> PackedPairBatch:
        pairs = [
            self._pair(corpus, example, random)
            for example, random in zip(recipe.examples, example_generators(recipe, seed), strict=True)
        ]
        sources, targets = zip(*pairs, strict=True)
        return pack_pairs(sources, targets, self.end)

    def _pair(
        self, corpus: TokenizedCorpus, example: np.void, random: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        sentences = range(int(example["a_begin"]), int(example["a_end"]))
        if len(sentences) == 1:  # perhaps a part of a long one
            begin = corpus.opening_offsets[sentences[0]] + example["a_front"]
            original = corrupted = corpus.ids[begin : begin + example["a_length"]]
        else:
            original = corpus.segment(sentences)
            order = random.permutation(sentences).tolist() if self.permute_sentences else sentences
            corrupted = corpus.segment(order)
        source = infill(corrupted, self.mask, random, self.mask_probability)
        return (
            np.concatenate([[self.begin], source, [self.end]]),
            np.concatenate([[self.begin], original, [self.end]]),
        )


def _segments(store: TokenStore, block: int, max_length: int) -> Examples:
    examples = single_segment_examples(store.block(block), max_length)
    first = store.corpus.document_offsets[store.block_documents[block]]
    for name in ("a_begin", "a_end"):  # of the whole corpus
        examples[name] += first
    return examples
