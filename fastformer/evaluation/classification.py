"""Accuracy, precision, recall, F1, Matthews' correlation and the confusion matrix; correlations for regression."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastformer.console import printable
from fastformer.data.labelled.examples import in_order
from fastformer.evaluation.checks import check_as_many
from fastformer.files import atomic_file

_WITH_ZEROS = 40
"""The largest number of classes for which a confusion matrix shows zeros too."""
_LARGEST = 8000
"""The most pixels of a picture's side."""


def classification_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Metrics of predicted classes. All are from 0 to 1, except MCC, which is from -1 to 1.

    Precision, recall and F1 are means over all classes of the references and predictions, with equal weights (macro).
    A class that was never predicted has precision 0. "baseline" is the accuracy of always predicting the most frequent
    class.
    """
    from sklearn.metrics import accuracy_score, matthews_corrcoef, precision_recall_fscore_support

    check_as_many(predictions, references)
    precision, recall, f1, _ = precision_recall_fscore_support(
        references, predictions, average="macro", zero_division=0
    )
    _, counts = np.unique(references, return_counts=True)
    return {
        "accuracy": float(accuracy_score(references, predictions)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "mcc": float(matthews_corrcoef(references, predictions)),
        "baseline": float(counts.max() / counts.sum()),
    }


def regression_metrics(predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation (GLUE's STS-B) and the mean squared error.

    The correlations are 0 if all predictions, or all references, are equal.
    """
    from scipy.stats import pearsonr, spearmanr

    check_as_many(predictions, references)
    predicted, expected = np.asarray(predictions, float), np.asarray(references, float)
    varied = len(set(predicted.tolist())) > 1 and len(set(expected.tolist())) > 1
    return {
        "pearson": float(pearsonr(predicted, expected).statistic) if varied else 0.0,
        "spearman": float(spearmanr(predicted, expected).statistic) if varied else 0.0,
        "mean_squared_error": float(np.mean((predicted - expected) ** 2)),
    }


def draw_confusion(predictions: Sequence[str], references: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix as PNG: rows are reference classes, columns predicted ones, shades the share of a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from sklearn.metrics import confusion_matrix

    check_as_many(predictions, references)
    names = in_order({*predictions, *references})
    counts = confusion_matrix(references, predictions, labels=names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.7 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    shown = [printable(name) for name in names]
    axes.set_xticks(range(len(names)), shown, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(names)), shown, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("reference")
    for (row, column), count in np.ndenumerate(counts):
        if not count and len(names) > _WITH_ZEROS:
            continue
        axes.text(
            column, row, f"{count:,}", ha="center", va="center", color="white" if shares[row, column] > 0.5 else "black"
        )
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=min(120, _LARGEST / side))
