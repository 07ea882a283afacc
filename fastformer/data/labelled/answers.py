"""Answers to questions, made of what a model says about each token of the windows of their contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastformer.data.labelled.examples import Question
from fastformer.data.labelled.features import QuestionFeature


@dataclass(frozen=True)
class PredictedAnswer:
    """An answer and its score, the sum of two logits; an empty text means "no answer"."""

    text: str
    score: float


def best_answers(
    questions: Sequence[Question],
    features: Sequence[QuestionFeature],
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    *,
    no_answer: bool,
    count: int = 20,
    max_answer_tokens: int = 30,
    no_answer_threshold: float = 0.0,
) -> list[list[PredictedAnswer]]:
    """Return the best answers to each question over all its windows, the best first.

    Args:
        questions: the questions that the features were made of.
        features: all features of these questions.
        start_logits, end_logits: for each feature, one logit per token.
        no_answer: whether some questions have no answer (SQuAD 2.0). The score of "no answer" is the lowest score of
            the first token over all windows.
        count: number of begins and of ends to try in each window, and the most answers to return per question.
        max_answer_tokens: tokens of the longest answer.
        no_answer_threshold: "no answer" comes first if its score exceeds the best answer's by more than this.

    Returns:
        At least one answer for each question.
    """
    found: list[dict[str, float]] = [{} for _ in questions]
    nothing = [np.inf] * len(questions)
    for feature, start, end in zip(features, start_logits, end_logits, strict=True):
        number = feature.question
        nothing[number] = min(nothing[number], float(start[0] + end[0]))
        for text, score in _spans(feature, start, end, questions[number].context, count, max_answer_tokens):
            found[number][text] = max(score, found[number].get(text, -np.inf))
    return [
        _ranked(texts, score, no_answer, no_answer_threshold)[:count]
        for texts, score in zip(found, nothing, strict=True)
    ]


def _spans(
    feature: QuestionFeature, start: np.ndarray, end: np.ndarray, context: str, count: int, longest: int
) -> list[tuple[str, float]]:
    """Return the texts and scores of the best spans of one window."""
    of_context = np.array([offset is not None and offset[1] > offset[0] for offset in feature.offsets])
    begins, ends = (
        np.argsort(np.where(of_context, logits[: len(of_context)], -np.inf), kind="stable")[::-1][:count]
        for logits in (start, end)
    )
    spans = []
    for first in begins.tolist():
        for last in ends.tolist():
            if of_context[first] and of_context[last] and first <= last < first + longest:
                begin, stop = feature.offsets[first], feature.offsets[last]
                assert begin is not None and stop is not None  # both are in the context
                spans.append((context[begin[0] : stop[1]], float(start[first] + end[last])))
    return spans


def _ranked(
    texts: dict[str, float], no_answer_score: float, no_answer: bool, threshold: float
) -> list[PredictedAnswer]:
    ranked = [PredictedAnswer(text, score) for text, score in sorted(texts.items(), key=lambda item: -item[1])]
    nothing = PredictedAnswer("", no_answer_score)
    if not ranked:
        return [nothing]
    if not no_answer:
        return ranked
    return [nothing, *ranked] if no_answer_score - ranked[0].score > threshold else [*ranked, nothing]
