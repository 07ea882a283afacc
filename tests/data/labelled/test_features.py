"""Examples become tokens, labels and batches, packed or dense, with our tokenizers and with those of other projects."""

from __future__ import annotations

import re

import pytest
import torch
from data.labelled.questions import CONTEXT, question

from fastformer.data.labelled.collation import collate, collate_pairs, collate_similar
from fastformer.data.labelled.examples import (
    Answer,
    ClassifiedText,
    Conversation,
    Message,
    Question,
    SimilarTexts,
    SourceTarget,
    TaggedWords,
    UnlearntMessage,
)
from fastformer.data.labelled.features import (
    MATCH_TYPE,
    classification_features,
    conversation_features,
    label_names,
    pair_features,
    prompt_ids,
    question_features,
    similarity_features,
    tag_names,
    tagging_features,
    word_tags,
)
from fastformer.data.pretraining.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def text(documents) -> list[str]:
    return [" ".join(document) for document in documents]


@pytest.fixture(scope="module")
def causal(text):
    return train_tokenizer(text, 400, "clm")


@pytest.fixture(scope="module")
def denoising(text):
    return train_tokenizer(text, 400, "denoising")


# --- Classification and embedding -------------------------------------------------------------------------------------


def test_classes(tokenizer):
    examples = [ClassifiedText("a file", "each line", "yes"), ClassifiedText("text", "bytes", "no")]
    names = label_names(examples)
    assert names == ["no", "yes"]
    features = classification_features(examples, tokenizer, 64, names)
    assert [feature.labels for feature in features] == [1, 0]
    for example, feature in zip(examples, features, strict=True):
        expected = tokenizer(example.text, example.second)
        assert feature.input_ids == expected.input_ids
        assert feature.token_type_ids == expected.token_type_ids


def test_regression_and_prediction(causal):
    examples = [ClassifiedText("a", None, 0.5), ClassifiedText("b c", None, 4.0)]
    assert label_names(examples) is None
    features = classification_features(examples, causal, 64, None)
    assert torch.equal(collate(features, "dense", 1)["labels"], torch.tensor([0.5, 4.0]))
    assert features[0].token_type_ids is None
    (unlabelled,) = classification_features([ClassifiedText("a", None, None)], causal, 64, ["x", "y"])
    assert "labels" not in collate([unlabelled], "packed", 1)


def test_cut_texts_are_counted(tokenizer):
    examples = [ClassifiedText("a file " * n, None, str(n)) for n in (1, 20, 30)]
    with pytest.warns(UserWarning, match="2 of 3 texts have more than max_length=16 tokens and are cut"):
        features = classification_features(examples, tokenizer, 16, ["1", "20", "30"])
    assert [len(feature.input_ids) for feature in features][1:] == [16, 16]
    assert features[1].input_ids[-1] == tokenizer.sep_token_id


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", None], "example 2: no label"),
        (["a", 0.5], r"example 2: found a score, 0.5, but example 1 has a class"),
        (["a", "a"], "at least two classes, got a"),
        (["0", "1", "None"], "example 3: label 'None' .* numbers"),
        (["none", "1", "2"], "example 1: label 'none' .* numbers"),
        (["true", "N/A", "false"], "example 2: label 'N/A'"),
        (["0", "1", "1.0"], "classes 1 and 1.0 are the same number"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        label_names([ClassifiedText("x", None, label) for label in labels])


@pytest.mark.parametrize(
    ("labels", "odd"),
    [
        (["a", "None", "b", "None"], "2 of 4 examples have the class 'None'"),
        (["a", "NA", "b"], "1 of 3 examples have the class 'NA'"),
        (["0", "1", "2", "-1"], "1 of 4 examples have the class '-1'"),
    ],
)
def test_classes_that_may_be_none(labels, odd):
    with pytest.warns(UserWarning, match=odd):
        assert label_names([ClassifiedText("x", None, label) for label in labels]) == sorted(set(labels))


@pytest.mark.parametrize("names", [("Good", "good"), ("Caf\u00e9", "Cafe\u0301"), ("True", "true"), ("\ufb01t", "fit")])
def test_classes_and_tags_that_look_alike(names):
    alike = re.escape("{!a} and {!a} look alike, but are two".format(*sorted(names)))
    with pytest.warns(UserWarning, match=alike):
        assert set(label_names([ClassifiedText("x", None, name) for name in names])) == {*names}
    with pytest.warns(UserWarning, match=alike):
        assert set(tag_names([TaggedWords(("x", "y"), names)])) == {*names}


def test_classes_without_a_doubt(recwarn):
    for labels in (["none", "against"], ["NONE", "FAVOR"], ["-1", "1"], ["nano", "1.5"], ["1.10", "1.1"]):
        assert len(label_names([ClassifiedText("x", None, label) for label in labels])) == 2
    assert not recwarn.list


def test_bad_classification(tokenizer):
    with pytest.raises(ValueError, match=r"example 1: label 'z' is not among .* accepted are the classes a, b"):
        classification_features([ClassifiedText("x", None, "z")], tokenizer, 8, ["a", "b"])
    mixed = [ClassifiedText("x", None, "a"), ClassifiedText("x", "y", "a")]
    with pytest.raises(ValueError, match="example 2: found a second text, but example 1 has none"):
        classification_features(mixed, tokenizer, 8, ["a", "b"])
    with pytest.raises(ValueError, match="max_length=2 leaves no room for text"):
        classification_features([ClassifiedText("x", None, "a")], tokenizer, 2, ["a", "b"])


def test_similar(tokenizer):
    features = similarity_features([SimilarTexts("a", "a file", None), SimilarTexts("b", "line", None)], tokenizer, 16)
    batches = collate_similar(features, "packed", 0)
    assert set(batches) == {"anchor", "positive"}
    expected = tokenizer(["a file", "line"])["input_ids"]
    assert batches["positive"]["input_ids"].tolist() == [token for ids in expected for token in ids]
    features += similarity_features([SimilarTexts("a", "b", "c")], tokenizer, 16)
    with pytest.raises(ValueError, match="1 of 3 features have a negative"):
        collate_similar(features, "packed", 0)
    assert set(collate_similar(features[2:], "dense", 0)) == {"anchor", "positive", "negative"}


# --- Tagging ----------------------------------------------------------------------------------------------------------

TAGGED = TaggedWords(("When", "the", "reader", "reads", "lines", "."), ("O", "O", "B-X", "I-X", "B-Y", "O"))


def test_a_words_first_piece_has_its_tag(word_piece):
    (feature,) = tagging_features([TAGGED], word_piece, 64, ["B-X", "B-Y", "I-X", "O"])
    pieces = word_piece.convert_ids_to_tokens(feature.input_ids)
    assert pieces == ["[CLS]", "when", "the", "read", "##er", "read", "##s", "li", "##ne", "##s", ".", "[SEP]"]
    assert feature.labels == [-100, 3, 3, 0, -100, 2, -100, 1, -100, -100, 3, -100]
    assert word_tags(feature, [label if label >= 0 else 0 for label in feature.labels], tag_names([TAGGED])) == list(
        TAGGED.tags
    )


def test_byte_level_tokens_are_those_of_running_text(tokenizer):
    words = ("unless", "Ünïcode", "第三", "x[1]", "file")
    names = ["O", *(f"B-{n}" for n in range(5))]
    example = TaggedWords(words, tuple(f"B-{n}" for n in range(5)))
    (feature,) = tagging_features([example], tokenizer, 64, names)
    assert feature.input_ids == tokenizer(" ".join(words)).input_ids
    assert [label for label in feature.labels if label >= 0] == [1, 2, 3, 4, 5]
    starts = [token for token in feature.first_tokens if token is not None]
    ends = [*starts[1:], len(feature.input_ids) - 1]
    found = [tokenizer.decode(feature.input_ids[begin:end]).strip() for begin, end in zip(starts, ends, strict=True)]
    assert found == list(words)


def test_words_that_were_cut_are_outside(word_piece):
    with pytest.warns(UserWarning, match="1 of 1 texts"):
        (feature,) = tagging_features([TAGGED], word_piece, 6, ["B-X", "B-Y", "I-X", "O"])
    assert word_tags(feature, [0] * 6, ["B-X", "B-Y", "I-X", "O"]) == ["B-X", "B-X", "B-X", "O", "O", "O"]
    with pytest.raises(ValueError, match="tags B-Y are not among B-X, I-X, O"):
        tagging_features([TAGGED], word_piece, 6, ["B-X", "I-X", "O"])


# --- Question answering -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tokenizer", "denoising"])
def test_every_window_and_its_answer(request, kind):
    tokenizer = request.getfixturevalue(kind)
    asked = [question("line 117"), question(None), question("The file 0"), question("of line 139.")]
    features = question_features(asked, tokenizer, 64, 16)
    assert len({feature.question for feature in features}) == 4
    assert len(features) > 8
    for number, one in enumerate(asked):
        windows = [feature for feature in features if feature.question == number]
        covered = {c for w in windows for o in w.offsets if o is not None for c in range(*o)}
        assert covered >= {place for place, character in enumerate(CONTEXT) if not character.isspace()}
        found = [CONTEXT[w.offsets[w.start][0] : w.offsets[w.end][1]] for w in windows if w.start]
        if one.answers:
            assert found
            assert set(found) == {one.answers[0].text}
        else:
            assert not found
        assert all(w.start == w.end == 0 for w in windows if not w.start)
        assert all(len(w.input_ids) <= 64 for w in windows)


@pytest.mark.parametrize("kind", ["left", "right", "space"])
def test_an_answer_that_is_not_whole_in_a_window_is_not_in_it(word_piece, kind):
    """An answer that is cut by a border is not in the window, nor is a single space, which is in no token."""
    context = " ".join(f"The file {number}." for number in range(60))
    plain = question_features([Question("q", "Which?", context, None)], word_piece, 64, 8)
    first, second = ([offset for offset in feature.offsets if offset] for feature in plain[:2])
    begin, end = {
        "left": (second[0][0] - 4, second[0][1]),
        "right": (second[0][0], first[-1][1] + 4),
        "space": (3, 4),
    }[kind]
    asked = Question("q", "Which?", context, (Answer(context[begin:end], begin),))
    windows = question_features([asked], word_piece, 64, 8)
    assert len(windows) > 2
    for window in windows:
        offsets = [offset for offset in window.offsets if offset]
        whole = kind != "space" and offsets[0][0] <= begin and end <= offsets[-1][1]
        assert ((window.start, window.end) != (0, 0)) == whole


def test_words_that_question_and_context_share_are_marked(tokenizer):
    asked = Question("q", "What does Open.read RETURN?", "Open.read: returns text. It does not open.", None)
    (plain,), (marked,) = (question_features([asked], tokenizer, 64, 4, mark_matches=mark) for mark in (False, True))
    assert marked.input_ids == plain.input_ids
    shared = set()
    for offset, kind, before in zip(marked.offsets, marked.token_type_ids, plain.token_type_ids, strict=True):
        if kind == MATCH_TYPE:
            shared |= set(range(*offset))
        else:
            assert kind == before
    expected = {*range(4), *range(5, 9), *range(28, 32), *range(37, 41)}  # Open, read, does, open
    assert {place for place in shared if not asked.context[place].isspace()} == expected


def test_a_question_that_leaves_no_room(tokenizer):
    long = Question("q7", "Why " * 30, CONTEXT, None)
    with pytest.raises(ValueError, match=r"question 'q7' has \d+ tokens: with max_length=64 that leaves no room"):
        question_features([long], tokenizer, 64, 16)
    (first, *_) = question_features([Question("q", "Why?", CONTEXT, None)], tokenizer, 64, 16)
    assert first.start is None
    assert "start_positions" not in collate([first], "packed", 0)


# --- Sequence to sequence ---------------------------------------------------------------------------------------------


def test_pairs_in_both_forms(denoising):
    examples = [SourceTarget("a file of text", "この値"), SourceTarget("lines", "لا تتطابق")]
    features = pair_features(examples, denoising, 64, 64, prefix="translate: ")
    sources = [denoising(f"translate: {example.source}").input_ids for example in examples]
    targets = [denoising(example.target).input_ids for example in examples]
    packed = collate_pairs(features, "packed", 1, decoder_start_token_id=2)
    assert packed["input_ids"].tolist() == sources[0] + sources[1]
    assert packed["labels"].tolist() == targets[0] + targets[1]
    assert packed["decoder_input_ids"].tolist() == [2, *targets[0][:-1], 2, *targets[1][:-1]]
    assert packed["decoder_cu_seqlens"].tolist() == [0, len(targets[0]), len(targets[0]) + len(targets[1])]
    dense = collate_pairs(features, "dense", 1, decoder_start_token_id=2)
    assert set(dense) == {"input_ids", "attention_mask", "labels"}
    for row, mask, source in zip(dense["input_ids"], dense["attention_mask"], sources, strict=True):
        assert row[: len(source)].tolist() == source
        assert (row[len(source) :] == 1).all()
        assert mask.sum() == len(source)
    assert [row[row != -100].tolist() for row in dense["labels"]] == targets


def test_pairs_without_target(denoising):
    features = pair_features([SourceTarget("a", None)], denoising, 64, 64)
    assert set(collate_pairs(features, "dense", 1, 2)) == {"input_ids", "attention_mask"}
    assert "labels" not in collate_pairs(features, "packed", 1, 2)
    mixed = features + pair_features([SourceTarget("a", "b")], denoising, 64, 64)
    with pytest.raises(ValueError, match="1 of 2 features have a target"):
        collate_pairs(mixed, "dense", 1, 2)


# --- Conversations ----------------------------------------------------------------------------------------------------

TALK = Conversation(
    (
        *(Message("system", "Be brief."), Message("user", "Which file?"), Message("assistant", "The text.")),
        *(Message("user", "Why?"), Message("assistant", "Unless bytes.")),
    )
)


def learnt(feature, tokenizer) -> list[str]:
    """Return the text of each run of labelled tokens."""
    stretches: list[list[int]] = [[]]
    for label in feature.labels:
        if label == -100 and stretches[-1]:
            stretches.append([])
        elif label != -100:
            stretches[-1].append(label)
    return [tokenizer.decode(stretch) for stretch in stretches if stretch]


def test_answers_alone_are_learnt(causal):
    (feature,) = conversation_features([TALK], causal, 256)
    assert causal.decode(feature.input_ids) == (
        "<s>System: Be brief.\nUser: Which file?\nAssistant: The text.</s>\nUser: Why?\nAssistant: Unless bytes.</s>\n"
    )
    assert learnt(feature, causal) == [" The text.</s>", " Unless bytes.</s>"]
    prompt = prompt_ids(Conversation(TALK.messages[:2]), causal)
    assert feature.input_ids[: len(prompt)] == prompt
    batch = collate([feature, feature], "packed", 1)
    assert batch["labels"].shape == batch["input_ids"].shape
    assert (batch["labels"][batch["cu_seqlens"][:-1].long()] == -100).all()


def test_an_answer_that_is_not_learnt(causal):
    said = TALK.messages
    (feature,) = conversation_features(
        [Conversation((*said[:2], UnlearntMessage("assistant", "The text."), *said[3:]))], causal, 256
    )
    (whole,) = conversation_features([TALK], causal, 256)
    assert feature.input_ids == whole.input_ids
    assert learnt(feature, causal) == [" Unless bytes.</s>"]


def test_a_tokenizers_own_template(causal, text):
    own = train_tokenizer(text, 400, "clm")
    own.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (feature,) = conversation_features([TALK], own, 256)
    assert learnt(feature, own) == ["The text.", "Unless bytes."]
    own.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="chat template writes the beginning of a conversation differently"):
        conversation_features([TALK], own, 256)


def test_conversations_that_were_cut(causal):
    short = Conversation((Message("user", "a"), Message("assistant", "file")))
    long = Conversation((Message("user", "line " * 50), Message("assistant", "file")))
    with pytest.warns(UserWarning) as caught:
        features = conversation_features([short, long], causal, 40)
    assert [str(warning.message) for warning in caught] == [
        "1 of 2 texts have more than max_length=40 tokens and are cut",
        "1 conversations are left out: once cut, they have no answer",
    ]
    assert len(features) == 1
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no conversation has an answer within"):
        conversation_features([long], causal, 40)


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_both_forms_hold_the_same(tokenizer):
    examples = [TaggedWords(tuple(["a", "file", "of", "text"][:n]), ("O",) * n) for n in (2, 4, 1)]
    features = tagging_features(examples, tokenizer, 64, ["O"])
    packed, dense = (collate(features, form, tokenizer.pad_token_id) for form in ("packed", "dense"))
    kept = dense["attention_mask"].bool()
    for name in ("input_ids", "token_type_ids", "labels"):
        assert torch.equal(dense[name][kept], packed[name])
    assert (dense["labels"][~kept] == -100).all()
    assert packed["cu_seqlens"].dtype == torch.int32
    assert packed["cu_seqlens"].diff().tolist() == kept.sum(1).tolist()
    assert packed["max_seqlen"] == max(len(feature.input_ids) for feature in features)
    with pytest.raises(ValueError, match="form must be packed or dense, got 'flat'"):
        collate(features, "flat", 0)


def test_question_batches(tokenizer):
    features = question_features([question("line 117"), question(None)], tokenizer, 64, 16)
    for form in ("packed", "dense"):
        batch = collate(features, form, 0)
        assert batch["start_positions"].tolist() == [feature.start for feature in features]
        assert batch["end_positions"].tolist() == [feature.end for feature in features]
