"""The pretraining objectives for a data module: how to tokenize, which examples to draw, how to make a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastformer.data.packing import IGNORE_INDEX, PackedBatch, PackedPairBatch, pack, pack_pairs
from fastformer.data.pretraining.batches import BatchRecipe, example_generators
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
from fastformer.data.pretraining.masked_batches import masked_batch
from fastformer.data.pretraining.store import DocumentCorpus, DocumentLayout, Layout, SentenceLayout, TokenStore
from fastformer.data.pretraining.tokenized import TokenizedCorpus
from fastformer.data.pretraining.tokenizer import SENTINELS
from fastformer.data.pretraining.windows import tokens_of, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class PretrainingObjective(Protocol):
    """A pretraining objective: it defines what the model predicts, and from which input.

    Attributes:
        layout: how the corpus is tokenized.
        best_fit: whether batches are filled by best fit; see `TokenBudgetSampler`.
    """

    layout: Layout
    best_fit: bool

    def check(self, corpus: Any) -> None:
        """Raise ValueError if the corpus gives no examples."""

    def examples(self, store: TokenStore, block: int, *, seed: int, epoch: int) -> Examples:
        """Return the examples of one block, as positions in the whole corpus; `index` counts from 0 in the block."""

    def lengths(self, examples: Examples) -> NDArray[np.int64]:
        """Return (N,) the number of tokens of each example; for pairs, of source and target together."""

    def batch(self, corpus: Any, recipe: BatchRecipe, seed: int) -> Any:
        """Return the packed batch of a recipe."""


class MaskedLanguage:
    """BERT's objective: predict masked tokens, and for pairs of segments whether they belong together, or their order.

    Args:
        tokenizer: made for "mlm".
        max_length: tokens of the longest sequence.
        next_sentence: make pairs of segments instead of single segments.
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
    """GPT's objective: predict every token from the tokens before it in its document.

    A document of more than `max_length` tokens is cut into windows. Each window begins with the last token of the
    window before, so that every token of the corpus is predicted exactly once. Labels are the ids, but -100 at each
    sequence's first token, which nothing predicts; the model shifts labels by one place, as Hugging Face's models do.
    """

    best_fit = True

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}")
        self.layout: Layout = DocumentLayout(tokenizer, mark_ends=True)
        self.max_length = max_length

    def check(self, corpus: DocumentCorpus) -> None:
        """Accept every corpus: each document gives examples."""

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
    """T5's objective: predict the spans that were replaced by sentinels.

    A document is cut into windows whose sources have at most `max_length` tokens. A window has at most 100 spans, the
    number of sentinels.

    Args:
        tokenizer: made for "span-corruption".
        max_length: tokens of the longest source.
        noise: the share of tokens left out, and the length of spans.
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
        """Accept every corpus: each document gives examples."""

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
    """BART's objective: predict a text from a copy with masked spans and with sentences in random order.

    Args:
        tokenizer: made for "denoising".
        max_length: tokens of the longest source and target.
        mask_probability: share of the tokens that are masked.
        permute_sentences: False keeps the sentences in order.
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
        """Accept every corpus: each document gives examples."""

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
        if len(sentences) == 1:  # it may be a part of a long sentence
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
    for name in ("a_begin", "a_end"):  # positions in the whole corpus
        examples[name] += first
    return examples
