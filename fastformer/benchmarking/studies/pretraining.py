"""Speed and peak memory of BERT's pretraining step, compared with Hugging Face's Trainer with dynamic padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from transformers import BertForPreTraining

from fastformer.benchmarking.measurement import OURS, PEAK_MEMORY, Goal
from fastformer.benchmarking.study import Case, Peer, Setting, TimedStudy
from fastformer.benchmarking.timing import Run
from fastformer.benchmarking.training import (
    BASE,
    HUGGING_FACE,
    OPTIMIZATION,
    SMALL,
    TINY,
    VOCABULARY,
    Shape,
    assert_equal_losses,
    attention_mask,
    bert,
    median_batches,
    ours,
    padded,
    theirs,
)
from fastformer.data.packing import IGNORE_INDEX
from fastformer.data.pretraining.batches import BatchRecipe, PackedDataset
from fastformer.models.conversion import from_hugging_face
from fastformer.training.loading.pretraining import PretrainingDataModule
from fastformer.training.pretraining import MaskedLanguageModeling


@dataclass(frozen=True)
class Work:
    """The work of a run.

    Attributes:
        shape: fields of `BertConfig` that differ from bert-base's.
        pairs: sentence pairs of each batch.
        steps: the number of batches.
        dropout: the dropout of hidden states and attention weights.
        max_length: the most tokens of a pair.
    """

    shape: Shape
    pairs: int
    steps: int = 1
    dropout: float = 0.1
    max_length: int = 512

    def model(self) -> BertForPreTraining:
        """Build the model with random weights, always the same."""
        torch.manual_seed(0)
        return BertForPreTraining(bert(self.shape, self.dropout)).train()

    def data(self) -> SentencePairs:
        return sentence_pairs(self.pairs, self.steps, self.max_length)


class SentencePairs(PretrainingDataModule):
    """Batches with a fixed number of sentence pairs of the default corpus, rather than of tokens.

    Pairs are drawn and masked as usual. `median_batches` chooses the batches of the epoch.
    """

    def __init__(self, pairs: int, batches: int, max_length: int) -> None:
        super().__init__(vocab_size=VOCABULARY, max_length=max_length, tokens_per_batch=pairs * max_length)
        self.prepare_data()
        self.setup()
        assert self._train is not None and self._predicting is not None
        examples = self._examples(self._train, range(self._train.num_blocks), 0)
        chosen = median_batches(self._predicting.lengths(examples), pairs, batches)
        self.recipes = [BatchRecipe(0, examples[batch]) for batch in chosen]
        self.tokens = int(sum(self._predicting.lengths(recipe.examples).sum() for recipe in self.recipes))

    def _rest_of_epoch(self) -> Any:
        return iter(self.recipes)

    def one_by_one(self) -> list[dict[str, torch.Tensor]]:
        """All pairs of all batches, with the same masks."""
        assert self._train is not None and self._predicting is not None
        dataset = PackedDataset(self._train.corpus, self._predicting.batch, self.seed)
        return [pair for recipe in self.recipes for pair in _unpacked(dataset[recipe])]


def _unpacked(batch: Any) -> list[dict[str, torch.Tensor]]:
    return [
        {
            **{name: batch[name][begin:end] for name in ("input_ids", "token_type_ids", "labels")},
            "next_sentence_label": label,
        }
        for (begin, end), label in zip(
            pairwise(batch["cu_seqlens"].tolist()), batch["next_sentence_label"], strict=True
        )
    ]


def collate(pairs: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch padded to its longest pair."""
    columns = {name: [pair[name] for pair in pairs] for name in pairs[0]}
    return {
        "input_ids": padded(columns["input_ids"], 0),
        "token_type_ids": padded(columns["token_type_ids"], 0),
        "labels": padded(columns["labels"], IGNORE_INDEX),
        "attention_mask": attention_mask(columns["input_ids"]),
        "next_sentence_label": torch.stack(columns["next_sentence_label"]),
    }


sentence_pairs = cache(SentencePairs)


def cases(setting: Setting) -> list[Case]:
    if setting.quick:
        return [case("1 layer, 64 wide, 4 pairs", Work(TINY, pairs=4, max_length=64))]
    return [
        case("4 layers, 512 wide, 16 pairs", Work(SMALL, pairs=16, steps=2)),
        case("bert-base, 8 pairs", Work(BASE, pairs=8)),
    ]


def case(name: str, work: Work) -> Case:
    unchanged = replace(work, pairs=2, steps=2, dropout=0.0)
    peers = {OURS: Peer(lambda: our_steps(work)), HUGGING_FACE: Peer(lambda: their_steps(work))}
    return Case(
        name,
        peers,
        {"tokens": work.data().tokens},
        lambda _: assert_equal_losses({OURS: our_steps(unchanged), HUGGING_FACE: their_steps(unchanged)}),
    )


def our_steps(work: Work, compiled: bool = False) -> Run:
    """A run of our steps, by torch.compile if `compiled`."""
    module = MaskedLanguageModeling(optimization=OPTIMIZATION)
    module.model = from_hugging_face(work.model()).train()
    if compiled:
        module.model.compile(dynamic=True)
    return ours(module, work.data(), work.steps)


def their_steps(work: Work, compiled: bool = False) -> Run:
    return theirs(work.model(), work.data().one_by_one(), collate, work.pairs, compiled=compiled)


STUDY = TimedStudy(
    name="pretraining",
    title="BERT's pretraining step: masked language modelling and next-sentence prediction",
    cases=cases,
    rounds=3,
    memory="everything",
    goals=(
        Goal("4 layers", HUGGING_FACE, at_least=2.5),
        Goal("4 layers", HUGGING_FACE, PEAK_MEMORY, at_most=0.5),
        Goal("bert-base", HUGGING_FACE, at_least=2.5),
        Goal("bert-base", HUGGING_FACE, PEAK_MEMORY, at_most=0.5),
    ),
    note=(
        "Sentence pairs of the default corpus, drawn as for BERT, up to 512 tokens long, in float32 with dropout 0.1. "
        f"The embedding has {VOCABULARY:,} rows; the corpus's tokenizer uses fewer. Tokens are counted without "
        "padding; peers pad each batch to its longest pair. Each side runs in its own trainer, Lightning's and Hugging "
        "Face's; their losses without dropout are equal. Memory is the growth of the resident set, with weights, "
        "gradients and the optimizer's state."
    ),
)
