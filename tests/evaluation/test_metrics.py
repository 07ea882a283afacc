"""Metrics equal values worked out by hand or given in their papers, and bad input is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pictures import saved_figures

from fastformer.evaluation import (
    answer_metrics,
    classification_metrics,
    corpus_perplexity,
    draw_confusion,
    regression_metrics,
    retrieval_metrics,
    summary_metrics,
    tagging_metrics,
    translation_metrics,
)
from fastformer.evaluation.question_answering import normalized_answer

pytestmark = pytest.mark.quick


def test_two_classes():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    predictions = ["p"] * 4 + ["n"] * 6
    references = ["p"] * 3 + ["n"] + ["p"] * 2 + ["n"] * 4
    metrics = classification_metrics(predictions, references)
    assert metrics["accuracy"] == pytest.approx(0.7)
    assert metrics["precision"] == pytest.approx((3 / 4 + 4 / 6) / 2)
    assert metrics["recall"] == pytest.approx((3 / 5 + 4 / 5) / 2)
    assert metrics["f1"] == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert metrics["mcc"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    assert metrics["baseline"] == 0.5


def test_a_class_that_is_never_predicted_counts_as_nothing():
    metrics = classification_metrics(["a", "a"], ["a", "b"])
    assert metrics["precision"] == 0.25
    assert metrics["mcc"] == 0


def test_regression():
    metrics = regression_metrics([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
    assert metrics["pearson"] == pytest.approx(1)
    assert metrics["spearman"] == pytest.approx(1)
    assert metrics["mean_squared_error"] == pytest.approx((1 + 4 + 16) / 3)
    assert regression_metrics([1.0, 1.0], [1.0, 2.0])["pearson"] == 0


def test_confusion_is_a_picture(tmp_path, monkeypatch):
    saved = saved_figures(monkeypatch)
    draw_confusion(["a", "b", "ü"], ["a", "a", "ü"], tmp_path / "new" / "confusion.png")
    assert (tmp_path / "new" / "confusion.png").exists()
    (axes,) = saved[0].axes
    assert axes.images[0].get_array().tolist() == [[0.5, 0.5, 0], [0, 0, 0], [0, 0, 1]]
    assert [text.get_text() for text in axes.texts] == ["1", "1", "0", "0", "0", "0", "0", "0", "1"]
    for axis, label in ((axes.xaxis, "predicted"), (axes.yaxis, "reference")):
        assert [tick.get_text() for tick in axis.get_ticklabels()] == ["a", "b", "ü"]
        assert axis.get_label_text() == label


def test_entities_count_only_whole():
    references = [["B-X", "I-X", "O", "B-Y"], ["O", "B-X"]]
    predictions = [["B-X", "O", "O", "B-Y"], ["O", "B-X"]]
    metrics = tagging_metrics(predictions, references)
    assert metrics["precision"] == metrics["recall"] == metrics["f1"] == pytest.approx(2 / 3)
    assert metrics["accuracy"] == pytest.approx(5 / 6)
    assert tagging_metrics([["O"]], [["O"]])["f1"] == 0
    with pytest.raises(ValueError, match="prediction 0 has 1 tags and its reference 2"):
        tagging_metrics([["O"]], [["O", "O"]])


@pytest.mark.parametrize(
    ("text", "normalized"),
    [("The  Cat's, hat!", "cats hat"), ("an apple a day", "apple day"), ("", ""), ("theatre", "theatre")],
)
def test_squad_normalization(text, normalized):
    assert normalized_answer(text) == normalized


def test_answers():
    metrics = answer_metrics(["the Cat", "big dog", ""], [["cat", "lion"], ["a dog"], ["x"]])
    assert metrics["exact_match"] == pytest.approx(100 / 3)
    assert metrics["f1"] == pytest.approx(100 * (1 + 2 / 3 + 0) / 3)
    assert set(metrics) == {"exact_match", "f1"}


def test_questions_without_an_answer():
    metrics = answer_metrics(["", "cat", "dog"], [[], [], ["dog"]])
    assert metrics["no_answer_accuracy"] == 50
    assert metrics["has_answer_exact_match"] == metrics["has_answer_f1"] == 100
    assert metrics["exact_match"] == pytest.approx(200 / 3)


def test_bleu_is_papinenis():
    """BLEU follows Papineni et al.: the clipped precisions are 5/6, 3/5, 2/4 and 1/3.

    There is one sentence with one reference, and no penalty for length.
    """
    metrics = translation_metrics(["the cat sat on mat now"], ["the cat sat on the mat"])
    # 5 of 6 words match, the pairs the-cat, cat-sat and sat-on of 5, 2 of 4 triples, and 1 of 3 quadruples.
    assert metrics["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, abs=0.01)
    assert 0 < metrics["chrf"] < 100
    assert translation_metrics(["a b c d e"], ["a b c d e"]) == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}


@pytest.mark.parametrize(
    ("language", "text"),
    [("ja", "この値は整数ではありません"), ("zh_CN", "内联值与父实例不匹配"), ("ko", "값이 정수가 아닙니다")],
)
def test_languages_without_spaces_are_judged_by_characters(language, text):
    nearly = text[:-1] + "x"
    assert translation_metrics([nearly], [text], language)["bleu"] > 50
    assert translation_metrics([text], [text], language)["bleu"] == pytest.approx(100)


def test_right_to_left():
    arabic = "لا تتطابق القيمة المضمنة مع المثيل الأصلي."
    assert translation_metrics([arabic], [arabic], "ar")["bleu"] == pytest.approx(100)


def test_rouge():
    metrics = summary_metrics(["the cat sat"], ["the cats sat down"])
    assert metrics["rouge1"] == pytest.approx(100 * 6 / 7)  # "cats" is stemmed to "cat"
    assert metrics["rouge2"] == pytest.approx(100 * 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3))
    assert metrics["rougeL"] == pytest.approx(100 * 6 / 7)


def test_perplexity():
    assert corpus_perplexity([-math.log(8), -math.log(2)], [3, 1]) == pytest.approx(2)
    assert corpus_perplexity([-1e6], [1]) == math.inf
    with pytest.raises(ValueError, match="at least one; got a sum of 0"):
        corpus_perplexity([0.0], [0])


def test_retrieval():
    anchors = np.eye(4)
    assert retrieval_metrics(anchors, 3 * anchors)["recall_at_1"] == 1
    swapped = anchors[[1, 0, 2, 3]]
    metrics = retrieval_metrics(anchors, swapped)
    assert metrics["recall_at_1"] == 0.5
    assert metrics["mean_reciprocal_rank"] == pytest.approx((1 + 1 + 1 / 4 + 1 / 4) / 4)
    assert retrieval_metrics(np.ones((4, 2)), np.ones((4, 2)))["recall_at_1"] == 0  # ties count as not found
    with pytest.raises(ValueError, match=r"must both be \(N, D\); got \(4, 4\) and \(3, 4\)"):
        retrieval_metrics(anchors, anchors[:3])


@pytest.mark.parametrize(
    "metric", [classification_metrics, tagging_metrics, answer_metrics, translation_metrics, summary_metrics]
)
def test_as_many_predictions_as_references(metric):
    with pytest.raises(ValueError, match="got 1 predictions and 2 references"):
        metric(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="predictions are empty"):
        metric([], [])
