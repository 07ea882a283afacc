"""Metrics of predictions in a file: each line's fields are checked, then the metrics of the task are computed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fastformer.data.labelled.rows import Row, read_rows
from fastformer.evaluation.classification import classification_metrics, draw_confusion, regression_metrics
from fastformer.evaluation.embedding import retrieval_metrics
from fastformer.evaluation.perplexity import corpus_perplexity
from fastformer.evaluation.question_answering import answer_metrics
from fastformer.evaluation.summarization import summary_metrics
from fastformer.evaluation.tagging import tagging_metrics
from fastformer.evaluation.translation import translation_metrics

Metrics = dict[str, float]

TASKS = ("classify", "tag", "qa", "summarize", "translate", "generate", "embed")

_BOTH = ("prediction", "reference")


def evaluate_file(
    path: Path, task: str, *, language: str | None = None, confusion: Path | None = None
) -> dict[str, Any]:
    """Compute the metrics of the predictions in a file.

    Args:
        path: JSON lines, as `fastformer predict` writes them.
        task: one of `TASKS`, which decides what fields a line needs; other fields are ignored.
        language: the target language of translations; see `translation_metrics`.
        confusion: file for a picture of the confusion matrix; only classes have one.

    Returns:
        The task, the number of examples, and each metric.

    Raises:
        ValueError: the file has no line, or a line lacks a field or has one of another type.
    """
    rows = list(read_rows(path))
    if not rows:
        raise ValueError(f"{path} holds no predictions")
    return {"task": task, "examples": len(rows), **_metrics(rows, task, language, confusion)}


def _metrics(rows: list[Row], task: str, language: str | None, confusion: Path | None) -> Metrics:
    match task:
        case "classify":
            return _classify(rows, confusion)
        case "tag":
            return _tag(rows)
        case "qa":
            return _answer(rows)
        case "summarize":
            return summary_metrics(*_texts(rows))
        case "translate":
            return translation_metrics(*_texts(rows), language=language)
        case "generate":
            return _generate(rows)
        case "embed":
            return _embed(rows)
    raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")


def _classify(rows: list[Row], confusion: Path | None) -> Metrics:
    score = next((row for row in rows for name in _BOTH if isinstance(row.values.get(name), float)), None)
    numeric = score is not None
    kind: tuple[type, ...] = (int, float) if numeric else (str, int)
    what = "the name of a class" if score is None else f"a number, because other lines have scores, as {score.where}"
    predictions, references = ([_field(row, n, kind, what) for row in rows] for n in _BOTH)
    if numeric:
        return regression_metrics(predictions, references)
    names = list(map(str, predictions)), list(map(str, references))
    if confusion is not None:
        draw_confusion(*names, confusion)
    return classification_metrics(*names)


def _tag(rows: list[Row]) -> Metrics:
    predictions, references = (
        [_list(row, name, "a list of tags") for row in rows] for name in ("prediction", "reference")
    )
    for row, predicted, expected in zip(rows, predictions, references, strict=True):
        if not all(predicted) or not all(expected):
            raise ValueError(f"{row.where}: a tag is empty; accepted are B-X, I-X and O")
        if len(predicted) != len(expected):
            raise ValueError(
                f"{row.where}: found {len(predicted)} tags as prediction and {len(expected)} as reference; there must "
                "be one of each for each word"
            )
    return tagging_metrics(predictions, references)


def _answer(rows: list[Row]) -> Metrics:
    return answer_metrics(
        [_field(row, "prediction", str, 'a text, "" for no answer') for row in rows],
        [_list(row, "references", "a list of texts") for row in rows],
    )


def _generate(rows: list[Row]) -> Metrics:
    likelihoods = [_field(row, "log_likelihood", (int, float), "a number, in nats") for row in rows]
    tokens = [_field(row, "tokens", int, "a whole number") for row in rows]
    for row, count in zip(rows, tokens, strict=True):
        if count < 0:
            raise ValueError(f"{row.where}: tokens must be 0 or more; found {count}")
    metrics: Metrics = {"perplexity": corpus_perplexity(likelihoods, tokens), "tokens": sum(tokens)}
    if all("prediction" in row.values for row in rows):
        metrics |= summary_metrics(*_texts(rows))
    return metrics


def _embed(rows: list[Row]) -> Metrics:
    anchors, positives = ([_vector(row, name) for row in rows] for name in ("embedding", "positive"))
    size = len(anchors[0])
    for row, *vectors in zip(rows, anchors, positives, strict=True):
        for name, vector in zip(("embedding", "positive"), vectors, strict=True):
            if len(vector) != size:
                raise ValueError(
                    f"{row.where}: {name} must have {size} numbers, like the first line's; it has {len(vector)}"
                )
    return retrieval_metrics(anchors, positives)


def _field(row: Row, name: str, kind: type | tuple[type, ...], what: str) -> Any:
    """Return a field of a row after checking its type, and that a number is finite."""
    value = row.values.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) or not _is_finite(value):
        found = f"found {value!r:.60}" if name in row.values else f"found fields {', '.join(row.values)}"
        raise ValueError(f"{row.where}: {name} must be {what}; {found}")
    return value


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, (int, float)) or math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False


def _list(row: Row, name: str, what: str) -> list[str]:
    """Return a field that is a list of texts."""
    values: list[str] = _field(row, name, list, what)
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{row.where}: {name} must be {what}; found {value!r:.60} in it")
    return values


def _texts(rows: list[Row]) -> tuple[list[str], list[str]]:
    predictions, references = ([_field(row, n, str, "a text") for row in rows] for n in ("prediction", "reference"))
    return predictions, references


def _vector(row: Row, name: str) -> list[float]:
    vector = _field(row, name, list, "a list of numbers")
    kinds = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in vector)
    if not vector or not kinds or not all(map(_is_finite, vector)):
        raise ValueError(f"{row.where}: {name} must be a list of finite numbers; found {vector!r:.60}")
    return vector
