"""Fine-tuning of a classifier, compared with Hugging Face's Trainer with dynamic padding, unsorted and sorted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from transformers import BertForSequenceClassification

from fastformer.benchmarking.measurement import OURS, Goal
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
    bert,
    median_batches,
    ours,
    theirs,
)
from fastformer.data.labelled.collation import Form, collate
from fastformer.data.labelled.defaults import default_classes
from fastformer.data.labelled.features import Feature, classification_features
from fastformer.data.pretraining.tokenizer import train_tokenizer
from fastformer.models.conversion import from_hugging_face
from fastformer.training.finetuning import Classification
from fastformer.training.loading.finetuning import FineTuningData

SORTED = f"{HUGGING_FACE}, sorted by length"
BATCH = 32
# The default of `fastformer finetune`.
MAX_LENGTH = 128


@dataclass(frozen=True)
class Work:
    """The work of a run.

    Attributes:
        shape: fields of `BertConfig` that differ from bert-base's.
        steps: the number of batches of 32 texts.
        dropout: the dropout of hidden states and attention weights.
    """

    shape: Shape
    steps: int
    dropout: float = 0.1

    def model(self) -> BertForSequenceClassification:
        """Build the model with random weights, always the same."""
        torch.manual_seed(0)
        config = bert({**self.shape, "num_labels": len(texts().labels)}, self.dropout)
        return BertForSequenceClassification(config).train()

    def batches(self) -> list[list[Feature]]:
        """Choose the batches by `median_batches`."""
        features = texts().features
        lengths = np.array([len(feature.input_ids) for feature in features])
        return [[features[index] for index in batch] for batch in median_batches(lengths, BATCH, self.steps)]


@dataclass(frozen=True)
class Texts:
    """The default set's training examples, tokenized."""

    tokenizer: Any
    labels: list[str]
    features: list[Feature]


@cache
def texts() -> Texts:
    examples = default_classes().train
    tokenizer = train_tokenizer((example.text for example in examples), VOCABULARY, "mlm")
    labels = sorted({str(example.label) for example in examples})
    return Texts(tokenizer, labels, classification_features(examples, tokenizer, MAX_LENGTH, labels))


class Batches(FineTuningData):
    """A data module with the given batches, rather than batches of a number of tokens."""

    def __init__(self, batches: list[list[Feature]]) -> None:
        features = [feature for batch in batches for feature in batch]
        super().__init__(
            texts().tokenizer,
            features,
            features,
            lambda batch: _collate(batch, "packed"),
            lambda feature: len(feature.input_ids),
            lambda batch: len(batch["labels"]),
        )
        self.indices = np.split(np.arange(len(features)), len(batches))

    def batches_of_pass(self, lengths: np.ndarray, number: int) -> list[np.ndarray]:
        return self.indices


def _collate(features: list[Feature], form: Form) -> dict[str, Any]:
    return collate(features, form, texts().tokenizer.pad_token_id)


def cases(setting: Setting) -> list[Case]:
    if setting.quick:
        return [case("1 layer, 64 wide", Work(TINY, steps=1))]
    return [case("4 layers, 512 wide", Work(SMALL, steps=4)), case("bert-base", Work(BASE, steps=2))]


def case(name: str, work: Work) -> Case:
    unchanged = replace(work, dropout=0.0, steps=1)
    peers = {
        OURS: Peer(lambda: our_steps(work)),
        HUGGING_FACE: Peer(lambda: their_steps(work, "sequential")),
        SORTED: Peer(lambda: their_steps(work, "group_by_length")),
    }
    tokens = sum(len(feature.input_ids) for batch in work.batches() for feature in batch)
    return Case(
        name,
        peers,
        {"tokens": tokens},
        lambda _: assert_equal_losses({OURS: our_steps(unchanged), HUGGING_FACE: their_steps(unchanged, "sequential")}),
    )


def our_steps(work: Work) -> Run:
    model = from_hugging_face(work.model()).train()
    module = Classification(model, OPTIMIZATION)
    return ours(module, Batches(work.batches()), work.steps)


def their_steps(work: Work, sampling: Literal["sequential", "group_by_length"]) -> Run:
    examples = [vars(feature) for batch in work.batches() for feature in batch]

    def padded(batch: list[dict[str, Any]]) -> dict[str, Any]:
        return _collate([Feature(**example) for example in batch], "dense")

    return theirs(work.model(), examples, padded, BATCH, sampling=sampling)


STUDY = TimedStudy(
    name="finetuning",
    title="fine-tuning a classifier of texts",
    cases=cases,
    rounds=3,
    goals=(Goal("4 layers", HUGGING_FACE, at_least=1.7), Goal("bert-base", HUGGING_FACE, at_least=1.7)),
    note=(
        f"Texts of the default set for classification, with at most {MAX_LENGTH} tokens each and {BATCH} texts in a "
        "batch, in float32 with dropout 0.1. Tokens are counted without padding; peers pad each batch to its longest "
        "text. Each side runs in its own trainer, Lightning's and Hugging Face's; their losses without dropout are "
        "equal. Sorting by length makes different batches of the same texts."
    ),
)
