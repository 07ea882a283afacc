"""Metrics of each task, computed from predictions and references alone, without any model.

Names are imported when first used, so that importing this package does not import the libraries of metrics.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastformer.evaluation.classification import classification_metrics, draw_confusion, regression_metrics
    from fastformer.evaluation.embedding import retrieval_metrics
    from fastformer.evaluation.perplexity import corpus_perplexity
    from fastformer.evaluation.question_answering import answer_metrics
    from fastformer.evaluation.summarization import summary_metrics
    from fastformer.evaluation.tagging import tagging_metrics
    from fastformer.evaluation.translation import translation_metrics

_MODULE_OF = {
    "answer_metrics": "question_answering",
    "classification_metrics": "classification",
    "corpus_perplexity": "perplexity",
    "draw_confusion": "classification",
    "regression_metrics": "classification",
    "retrieval_metrics": "embedding",
    "summary_metrics": "summarization",
    "tagging_metrics": "tagging",
    "translation_metrics": "translation",
}

__all__ = [
    "answer_metrics",
    "classification_metrics",
    "corpus_perplexity",
    "draw_confusion",
    "regression_metrics",
    "retrieval_metrics",
    "summary_metrics",
    "tagging_metrics",
    "translation_metrics",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
