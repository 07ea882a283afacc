"""Baselines predict what one would count and copy by hand."""

from __future__ import annotations

import math

import pytest

from fastformer.evaluation import baselines, retrieval_metrics


def test_commonest_is_the_first_of_those_there_are_most_of() -> None:
    assert baselines.commonest(["a", "b", "b", "c", "c"]) == "b"
    with pytest.raises(ValueError, match="values are empty"):
        baselines.commonest([])


def test_each_word_gets_the_tag_that_it_most_often_has() -> None:
    words = [["open", "the", "file"], ["file", "it"], ["the", "file"]]
    tags = [["O", "O", "B-CODE"], ["B-CODE", "O"], ["O", "O"]]
    assert baselines.commonest_tags(words, tags, [["the", "file", "unheard"]]) == [["O", "B-CODE", "O"]]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What does walk return?", "walk: Returns nothing."),
        ("When does it raise OSError?", "It raises OSError at dawn."),
        ("Why?", "walk: Returns nothing."),  # no sentence has a word of the question: the first one
    ],
)
def test_the_sentence_asked_about_has_most_words_of_the_question(question: str, expected: str) -> None:
    context = "walk: Returns nothing. Slowly.\nrun: Returns at once. It raises OSError at dawn."
    assert baselines.sentence_asked_about(question, context) == expected
    assert baselines.sentence_asked_about(question, "") == ""


def test_the_first_sentence() -> None:
    assert baselines.first_sentence("It opens files. It closes them too.") == "It opens files."
    assert baselines.first_sentence("") == ""


def test_the_typical_text_shares_most_words_with_the_others() -> None:
    texts = ["Return the name.", "Make a socket.", "Return the size.", "Return the name of the file."]
    assert baselines.typical_text(texts) == "Return the name."
    assert baselines.typical_text(["Same.", "Other words.", "Same."]) == "Same."
    assert baselines.typical_text(["?", "!", "!"]) == "!"


def test_word_vectors_find_the_text_with_the_same_rare_words() -> None:
    anchors, positives = ["the socket", "the file", "the name"], ["a file the", "the name a", "a the socket"]
    known = [*anchors, *positives]
    own = [positives[place] for place in (2, 0, 1)]
    found = retrieval_metrics(baselines.word_vectors(known, anchors), baselines.word_vectors(known, own))
    assert found["recall_at_1"] == 1.0
    assert not baselines.word_vectors(known, ["unheard of"]).any()
    assert not baselines.word_vectors(["?"], ["unheard of"]).any()


def test_unigram_perplexity_counts_each_token_once_more() -> None:
    # (2 + 1) / (3 + 3) for token 0, (0 + 1) / 6 for token 2.
    expected = math.exp(-(math.log(3 / 6) + math.log(1 / 6)) / 2)
    assert baselines.unigram_perplexity([0, 1, 0], [0, 2], 3) == pytest.approx(expected)
