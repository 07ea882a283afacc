"""Corpora, tokenizers, pretraining objectives, labelled sets, and batches of them. Knows no model.

Names are imported when first used, so that importing this package imports neither transformers nor lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastformer.data.collation import collate, collate_pairs, collate_similar
    from fastformer.data.corpus import Document, default_corpus, load_corpus, split_sentences
    from fastformer.data.examples import (
        Answer,
        ClassifiedText,
        Conversation,
        Message,
        Question,
        SimilarTexts,
        SourceTarget,
        Splits,
        TaggedWords,
    )
    from fastformer.data.features import (
        best_answers,
        classification_features,
        conversation_features,
        pair_features,
        prompt_ids,
        question_features,
        similarity_features,
        tagging_features,
        word_tags,
    )
    from fastformer.data.module import PretrainingDataModule
    from fastformer.data.objectives import MaskedLanguageModelling, next_sentence_examples, single_segment_examples
    from fastformer.data.packing import BatchRecipe, BatchStream, PackedBatch, PackedDataset, TokenBudgetSampler
    from fastformer.data.readers import (
        find_splits,
        read_classification,
        read_conversations,
        read_questions,
        read_similar,
        read_summaries,
        read_tagging,
        read_translations,
    )
    from fastformer.data.sets import load_set
    from fastformer.data.splitting import split_documents
    from fastformer.data.store import TokenStore, load_or_build_store
    from fastformer.data.tokenized import TokenizedCorpus, tokenize
    from fastformer.data.tokenizer import load_or_train_tokenizer, train_tokenizer

_MODULES = {
    "collation": (
        "collate",
        "collate_pairs",
        "collate_similar",
    ),
    "corpus": (
        "Document",
        "default_corpus",
        "load_corpus",
        "split_sentences",
    ),
    "examples": (
        "Answer",
        "ClassifiedText",
        "Conversation",
        "Message",
        "Question",
        "SimilarTexts",
        "SourceTarget",
        "Splits",
        "TaggedWords",
    ),
    "features": (
        "best_answers",
        "classification_features",
        "conversation_features",
        "pair_features",
        "prompt_ids",
        "question_features",
        "similarity_features",
        "tagging_features",
        "word_tags",
    ),
    "module": ("PretrainingDataModule",),
    "objectives": (
        "MaskedLanguageModelling",
        "next_sentence_examples",
        "single_segment_examples",
    ),
    "packing": (
        "BatchRecipe",
        "BatchStream",
        "PackedBatch",
        "PackedDataset",
        "TokenBudgetSampler",
    ),
    "readers": (
        "find_splits",
        "read_classification",
        "read_conversations",
        "read_questions",
        "read_similar",
        "read_summaries",
        "read_tagging",
        "read_translations",
    ),
    "sets": ("load_set",),
    "splitting": ("split_documents",),
    "store": (
        "TokenStore",
        "load_or_build_store",
    ),
    "tokenized": (
        "TokenizedCorpus",
        "tokenize",
    ),
    "tokenizer": (
        "load_or_train_tokenizer",
        "train_tokenizer",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Answer",
    "BatchRecipe",
    "BatchStream",
    "ClassifiedText",
    "Conversation",
    "Document",
    "MaskedLanguageModelling",
    "Message",
    "PackedBatch",
    "PackedDataset",
    "PretrainingDataModule",
    "Question",
    "SimilarTexts",
    "SourceTarget",
    "Splits",
    "TaggedWords",
    "TokenBudgetSampler",
    "TokenStore",
    "TokenizedCorpus",
    "best_answers",
    "classification_features",
    "collate",
    "collate_pairs",
    "collate_similar",
    "conversation_features",
    "default_corpus",
    "find_splits",
    "load_corpus",
    "load_or_build_store",
    "load_or_train_tokenizer",
    "load_set",
    "next_sentence_examples",
    "pair_features",
    "prompt_ids",
    "question_features",
    "read_classification",
    "read_conversations",
    "read_questions",
    "read_similar",
    "read_summaries",
    "read_tagging",
    "read_translations",
    "similarity_features",
    "single_segment_examples",
    "split_documents",
    "split_sentences",
    "tagging_features",
    "tokenize",
    "train_tokenizer",
    "word_tags",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
