"""Splits of labelled examples: every tested class is in training, and every class with enough examples is tested."""

from __future__ import annotations

import random
import warnings

import pytest

from fastformer.data.labelled.examples import (
    Answer,
    ClassifiedText,
    Conversation,
    Examples,
    Message,
    Question,
    SimilarTexts,
    SourceTarget,
    TaggedWords,
    in_order,
)
from fastformer.data.labelled.splitting import split_examples
from fastformer.training.tasks import RECIPES

pytestmark = pytest.mark.quick


def located(examples):
    return Examples((f"line {number}", example) for number, example in enumerate(examples, 1))


def words(example):
    return example[0]


def quiet_split(examples, names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return split_examples(located(examples), names, words)


@pytest.mark.parametrize("seed", range(30))
def test_each_class_is_where_it_can_be(seed):
    draw = random.Random(seed)
    sizes = {str(number): draw.choice([1, 2, 3, 4, 5, 30]) for number in range(draw.randint(2, 8))} | {"many": 20}
    labels = [label for label, size in sizes.items() for _ in range(size)]
    examples = [ClassifiedText(f"{seed} {n}", None, label) for n, label in enumerate(labels)]
    draw.shuffle(examples)
    splits = quiet_split(examples, lambda example: [example.label])
    assert sorted(example for part in splits for example in part) == sorted(examples)
    for label, size in sizes.items():
        counts = [sum(example.label == label for example in part) for part in splits]
        assert counts[0] >= 1
        assert sum(count > 0 for count in counts) == min(size, 3)


@pytest.mark.parametrize("seed", range(30))
def test_no_tag_is_judged_that_was_not_learnt(seed):
    draw = random.Random(seed)
    tags = [f"B-{number}" for number in range(6)]
    examples = []
    for number in range(draw.randint(6, 40)):
        count = draw.randint(1, 4)
        chosen = draw.choices(["O", *tags], [20, 8, 5, 3, 2, 1, 1], k=count)
        examples.append(TaggedWords(tuple(f"{seed} {number} {n}" for n in range(count)), tuple(chosen)))
    train, validation, test = quiet_split(examples, lambda example: set(example.tags))
    learnt = {tag for example in train for tag in example.tags}
    assert validation and test
    assert {tag for example in [*validation, *test] for tag in example.tags} <= learnt


def test_copies_stay_together_and_places_are_kept():
    examples = located([ClassifiedText(f"text {number % 40}", None, "ab"[number % 2]) for number in range(120)])
    splits = split_examples(examples, lambda example: [example.label], words)
    texts = [{example.text for example in part} for part in splits]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]
    assert sum(map(len, splits)) == 120
    pairs = [*zip(examples.places, examples, strict=True)]
    for part in splits:
        assert part.places == [place for place, example in pairs if example in part]


@pytest.mark.parametrize("task", RECIPES)
def test_an_input_is_on_one_side(task):
    """Examples with the same input stay together: questions about one context, or summaries or labels of one text.

    Their order in the file does not matter.
    """
    examples = [example for number in range(60) for example in TWICE[task](f"text {number}")]
    random.Random(0).shuffle(examples)
    kind = RECIPES[task]
    splits = split_examples(located(examples), lambda example: (), kind.input_of)
    inputs = [{kind.input_of(example) for example in part} for part in splits]
    assert all(inputs) and not inputs[0] & inputs[1] and not inputs[0] & inputs[2] and not inputs[1] & inputs[2]
    assert sum(map(len, inputs)) == 60
    assert sum(map(len, splits)) == 120


def conversation(text, answer):
    return Conversation((Message("user", text), Message("assistant", answer)))


TWICE = {
    "classify": lambda text: [ClassifiedText(text, "and", label) for label in "ab"],
    "tag": lambda text: [TaggedWords((text,), (tag,)) for tag in ("O", "B-X")],
    "qa": lambda text: [Question(f"{text} {asked}", asked, text, (Answer("text", 0),)) for asked in ("Who?", "When?")],
    "summarize": lambda text: [SourceTarget(text, target) for target in ("short", "shorter")],
    "translate": lambda text: [SourceTarget(text, target) for target in ("kurz", "knapp")],
    "generate": lambda text: [conversation(text, answer) for answer in ("yes", "no")],
    "embed": lambda text: [SimilarTexts(text, positive, None) for positive in ("like", "alike")],
}


def test_large_sets_are_split_by_the_hash_alone():
    """The split of an example does not depend on the rest of the set."""
    examples = [ClassifiedText(f"text {number}", None, "ab"[number % 2]) for number in range(1000)]
    whole = split_examples(located(examples), lambda example: [example.label], words)
    half = split_examples(located(examples[::-2]), lambda example: [example.label], words)
    assert all(set(few) < set(many) for few, many in zip(half, whole, strict=True))
    assert abs(len(whole.train) - 800) < 50


@pytest.mark.parametrize("labels", ["a", "ab", "aab", "abc", "aaaa"[:2]])
def test_too_few(labels):
    examples = [ClassifiedText(f"text {number}", None, label) for number, label in enumerate(labels)]
    with pytest.raises(ValueError, match=rf"{len(labels)} different texts are too few .* give more, or a folder"):
        quiet_split(examples, lambda example: [example.label])


def test_what_cannot_be_judged_is_said():
    examples = [ClassifiedText(f"text {number}", None, "once" if number == 7 else "often") for number in range(50)]
    with pytest.warns(UserWarning, match="too few examples have once: all of them are in the training split"):
        split_examples(located(examples), lambda example: [example.label], words)


def test_order_of_names():
    assert in_order(str(number) for number in reversed(range(12))) == [str(number) for number in range(12)]
    assert in_order(["10", "-1", "0.5", "2"]) == ["-1", "0.5", "2", "10"]
    assert in_order(["b", "a", "10", "9", "a"]) == ["10", "9", "a", "b"]
    assert in_order(["nan", "10", "9"]) == ["10", "9", "nan"]
    assert in_order(["9", "1_0"]) == ["1_0", "9"]  # 1_0 is no number
