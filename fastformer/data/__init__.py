"""Corpora, tokenizers, pretraining objectives and packed batches. Knows no model.

Names are imported when first used, so that importing this package imports neither transformers nor lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastformer.data.corpus import Document, default_corpus, load_corpus, split_sentences
    from fastformer.data.module import PretrainingDataModule
    from fastformer.data.objectives import MaskedLanguageModelling, next_sentence_examples, single_segment_examples
    from fastformer.data.packing import BatchRecipe, BatchStream, PackedBatch, PackedDataset, TokenBudgetSampler
    from fastformer.data.splitting import split_documents
    from fastformer.data.store import TokenStore, load_or_build_store
    from fastformer.data.tokenized import TokenizedCorpus, tokenize
    from fastformer.data.tokenizer import load_or_train_tokenizer, train_tokenizer

_MODULES = {
    "corpus": ("Document", "default_corpus", "load_corpus", "split_sentences"),
    "module": ("PretrainingDataModule",),
    "objectives": ("MaskedLanguageModelling", "next_sentence_examples", "single_segment_examples"),
    "packing": ("BatchRecipe", "BatchStream", "PackedBatch", "PackedDataset", "TokenBudgetSampler"),
    "splitting": ("split_documents",),
    "store": ("TokenStore", "load_or_build_store"),
    "tokenized": ("TokenizedCorpus", "tokenize"),
    "tokenizer": ("load_or_train_tokenizer", "train_tokenizer"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BatchRecipe",
    "BatchStream",
    "Document",
    "MaskedLanguageModelling",
    "PackedBatch",
    "PackedDataset",
    "PretrainingDataModule",
    "TokenBudgetSampler",
    "TokenStore",
    "TokenizedCorpus",
    "default_corpus",
    "load_corpus",
    "load_or_build_store",
    "load_or_train_tokenizer",
    "next_sentence_examples",
    "single_segment_examples",
    "split_documents",
    "split_sentences",
    "tokenize",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
