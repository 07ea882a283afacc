"""Exact match and F1 of answers, as SQuAD's official evaluation scripts (1.1 and 2.0) count them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from fastformer.evaluation.checks import check_as_many

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def answer_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1 in per cent: each question's score with its best accepted answer, averaged over questions.

    Args:
        predictions: the predicted answers; "" for "no answer".
        references: all accepted answers of each question; an empty list if the question has no answer.

    Returns:
        "exact_match" and "f1". If some questions have no answer, also both metrics of the questions with an answer
        ("has_answer_...") and the share of the others that were predicted to have none ("no_answer_accuracy").
    """
    check_as_many(predictions, references)
    accepted = [list(answers) or [""] for answers in references]
    exact = [
        _best(lambda p, r: float(normalized_answer(p) == normalized_answer(r)), *pair)
        for pair in zip(predictions, accepted, strict=True)
    ]
    overlap = [_best(token_f1, *pair) for pair in zip(predictions, accepted, strict=True)]
    metrics = {"exact_match": _mean(exact), "f1": _mean(overlap)}
    answered = [bool(answers) for answers in references]
    if not all(answered):
        metrics["no_answer_accuracy"] = _mean([e for e, has in zip(exact, answered, strict=True) if not has])
        if any(answered):
            metrics["has_answer_exact_match"] = _mean([e for e, has in zip(exact, answered, strict=True) if has])
            metrics["has_answer_f1"] = _mean([f for f, has in zip(overlap, answered, strict=True) if has])
    return metrics


def normalized_answer(text: str) -> str:
    """`text` in lower case, without punctuation, articles and repeated spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the words that two answers share, from 0 to 1. If one is empty, F1 is 1 if both are, else 0."""
    predicted, expected = (normalized_answer(text).split() for text in (prediction, reference))
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected))


def _best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    return max(score(prediction, answer) for answer in answers)


def _mean(scores: Sequence[float]) -> float:
    return 100 * sum(scores) / len(scores)
