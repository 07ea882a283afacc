"""Precision, recall and F1 of whole entities, as CoNLL's evaluation counts them, by seqeval; accuracy of tags."""

from __future__ import annotations

from collections.abc import Sequence

from fastformer.evaluation.checks import check_as_many


def tagging_metrics(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Metrics of predicted tags (B-X, I-X, O), micro-averaged over entities; 0 if there is no entity at all.

    Raises:
        ValueError: the number of tags of a prediction differs from that of its reference.
    """
    from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

    check_as_many(predictions, references)
    for number, (predicted, expected) in enumerate(zip(predictions, references, strict=True)):
        if len(predicted) != len(expected):
            raise ValueError(f"prediction {number} has {len(predicted)} tags and its reference {len(expected)}")
    given = [list(map(list, side)) for side in (references, predictions)]
    return {
        "accuracy": float(accuracy_score(*given)),
        "precision": float(precision_score(*given, zero_division=0)),
        "recall": float(recall_score(*given, zero_division=0)),
        "f1": float(f1_score(*given, zero_division=0)),
    }
