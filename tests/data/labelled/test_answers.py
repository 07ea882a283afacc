"""Answers are the best spans of the context that logits name, and "no answer" has its place among them."""

from __future__ import annotations

import numpy as np
import pytest
from data.labelled.questions import question

from fastformer.data.labelled.answers import best_answers
from fastformer.data.labelled.examples import Question
from fastformer.data.labelled.features import question_features


def test_answers_come_back_from_logits(tokenizer):
    asked = [question("line 117", "a"), question(None, "b"), question("The file 0", "c")]
    features = question_features(asked, tokenizer, 64, 16)
    starts, ends = ([np.zeros(len(f.input_ids)) for f in features] for _ in range(2))
    for feature, start, end in zip(features, starts, ends, strict=True):
        start[feature.start] = end[feature.end] = 10
        start[len(feature.input_ids) - 1] = 50  # [SEP] is not part of the context
    best = best_answers(asked, features, starts, ends, no_answer=True)
    assert [answers[0].text for answers in best] == ["line 117", "", "The file 0"]
    assert all(len(answers) <= 20 for answers in best)
    assert all(a.score >= b.score for a, b in zip(best[0], best[0][1:-1], strict=False))
    without = best_answers(asked, features, starts, ends, no_answer=False)
    assert all(answer.text for answers in without for answer in answers)
    reluctant = best_answers(asked, features, starts, ends, no_answer=True, no_answer_threshold=100)
    assert reluctant[1][0].text


@pytest.mark.parametrize("no_answer", [False, True])
def test_a_question_without_any_span_has_an_answer(tokenizer, no_answer):
    asked = [question("line 117")]
    features = question_features(asked, tokenizer, 64, 16)
    places = [np.arange(len(feature.input_ids), dtype=np.float64) for feature in features]
    # The only end that is considered lies before the only beginning.
    (found,) = best_answers(asked, features, places, [-place for place in places], no_answer=no_answer, count=1)
    assert [answer.text for answer in found] == [""]


def test_answers_are_ranked_without_a_gap(word_piece):
    asked = [Question("q", "Which?", "alpha beta gamma delta epsilon", None)]
    (feature,) = question_features(asked, word_piece, 64, 16)
    words = [place for place, offset in enumerate(feature.offsets) if offset and offset[1] > offset[0]]
    scores = np.full(len(feature.input_ids), -100.0)
    scores[words] = np.random.default_rng(0).permutation(len(words))
    (found,) = best_answers(
        asked, [feature], [scores], [scores], no_answer=False, max_answer_tokens=1, count=len(words)
    )
    best_first = sorted(words, key=lambda place: -scores[place])
    texts = [asked[0].context[slice(*feature.offsets[place])] for place in best_first]
    assert [answer.text for answer in found] == list(dict.fromkeys(texts))


def test_long_answers_are_not_found(tokenizer):
    asked = [question("line 117")]
    features = question_features(asked, tokenizer, 64, 16)
    logits = [np.random.default_rng(n).normal(size=len(f.input_ids)) for n, f in enumerate(features)]
    for answer in best_answers(asked, features, logits, logits, no_answer=False, max_answer_tokens=3)[0]:
        # An answer read without the space before it may have one token more.
        assert len(tokenizer(answer.text, add_special_tokens=False).input_ids) <= 4
