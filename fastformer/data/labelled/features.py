"""Turn labelled examples into token ids and labels, one function per task.

Every function takes a fast Hugging Face tokenizer and a list of examples, and returns one feature per example (for
question answering, one per window of the context). A text of more than `max_length` tokens is cut; a warning says how
many texts were cut. Nothing else is left out.
"""

from __future__ import annotations

import math
import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from fastformer.data.labelled.examples import (
    ClassifiedText,
    Conversation,
    Examples,
    Question,
    SimilarTexts,
    SourceTarget,
    TaggedWords,
    UnlearntMessage,
    in_order,
    place_of,
    written_number,
)
from fastformer.data.packing import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Label = int | float | list[int] | None


@dataclass(frozen=True)
class Feature:
    """One sequence.

    Attributes:
        input_ids: its tokens, with special tokens.
        token_type_ids: one per token; None if the tokenizer makes none.
        labels: a class or number, or a label per token; None if it is to be predicted.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None
    labels: Label


@dataclass(frozen=True)
class TaggingFeature(Feature):
    """Tagged words. `first_tokens[w]` is the index of word w's first token; None if w has none or was cut off."""

    first_tokens: list[int | None]


@dataclass(frozen=True)
class QuestionFeature(Feature):
    """A question and one window of its context.

    Attributes:
        question: the index of the question.
        offsets: for each token, its begin and end in the context, in characters; None for tokens outside the context.
        start, end: the answer's first and last token; both 0 (the first token of the sequence) if the window does not
            hold the answer; None if the answer is to be predicted.
    """

    question: int
    offsets: list[tuple[int, int] | None]
    start: int | None
    end: int | None


@dataclass(frozen=True)
class PairFeature:
    """A source and its target; no target if it is to be predicted."""

    source: list[int]
    target: list[int] | None


@dataclass(frozen=True)
class SimilarFeature:
    """The texts of one example, to be embedded."""

    anchor: Feature
    positive: Feature
    negative: Feature | None


def _feature(encoded: Any, labels: Label) -> Feature:
    return Feature(encoded["input_ids"], encoded.get("token_type_ids"), labels)


def _rows(encoded: Any) -> list[dict[str, Any]]:
    """Divide a tokenizer's output for many texts into one dictionary per text."""
    return [dict(zip(encoded.keys(), values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def _cut(tokenizer: PreTrainedTokenizerFast, texts: Sequence[Any], max_length: int, **arguments: Any) -> list[Any]:
    """Tokenize texts, or pairs of texts, and cut them to `max_length`."""
    if max_length < 1 + tokenizer.num_special_tokens_to_add(pair=isinstance(texts[0], tuple)):
        raise ValueError(f"max_length={max_length} leaves no room for text between the special tokens")
    rows = _rows(tokenizer(list(texts), return_attention_mask=False, verbose=False, **arguments))
    too_long = sum(len(row["input_ids"]) > max_length for row in rows)
    if too_long:
        _warn_of_cut(too_long, len(rows), max_length)
        arguments |= {"truncation": True, "max_length": max_length}
        rows = _rows(tokenizer(list(texts), return_attention_mask=False, **arguments))
    return rows


def _warn_of_cut(count: int, total: int, max_length: int) -> None:
    warnings.warn(f"{count} of {total} texts have more than max_length={max_length} tokens and are cut", stacklevel=4)


# --- Classification and embedding -------------------------------------------------------------------------------------


def label_names(examples: Sequence[ClassifiedText]) -> list[str] | None:
    """Return the classes of examples, sorted: numbers by value, other names alphabetically; None for regression.

    ``None``, ``NA`` and ``N/A`` are classes, with a warning, if other classes are words. They are missing labels if all
    other classes are numbers, or true and false. ``-1`` together with 0, 1 and 2 is a class, with a warning.

    Raises:
        ValueError: a label is missing, there are fewer than two classes, some labels are classes and others scores, or
            a number is written in two ways.
    """
    names = set()
    for number, example in enumerate(examples):
        if example.label is None:
            raise ValueError(f"{place_of(examples, number)}: no label; training needs one for each example")
        if isinstance(example.label, float) != isinstance(examples[0].label, float):
            first, other = ("a class", "a score") if isinstance(example.label, float) else ("a score", "a class")
            raise ValueError(
                f"{place_of(examples, number)}: found {other}, {example.label!r}, but {place_of(examples, 0)} has "
                f"{first}; give only classes or only scores"
            )
        names.add(example.label)
    if examples and isinstance(examples[0].label, float):
        return None
    if len(names) < 2:
        raise ValueError(f"classification needs at least two classes, got {', '.join(map(str, names)) or 'none'}")
    ordered = in_order(map(str, names))
    _check_names(examples, ordered)
    return ordered


_NONE = re.compile(r"none|na|n/a|-", re.IGNORECASE)


def _warn_of_alike(names: Sequence[str]) -> None:
    """Warn of classes or tags that differ only in capitals, or in how Unicode encodes the same letters."""
    seen: dict[str, str] = {}
    for name in names:
        first = seen.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if first != name:
            warnings.warn(f"{first!a} and {name!a} look alike, but are two classes or tags", stacklevel=4)


def _check_names(examples: Sequence[ClassifiedText], names: Sequence[str]) -> None:
    """Refuse or warn of classes that may stand for a missing label, or may be the same class."""
    words = [
        name for name in names if not math.isfinite(written_number(name)) and name.lower() not in ("true", "false")
    ]
    if len(words) == 1 and _NONE.fullmatch(words[0]):
        number = next(number for number, example in enumerate(examples) if example.label == words[0])
        raise ValueError(
            f"{place_of(examples, number)}: label {words[0]!r} among numbers, true or false stands for a missing "
            "label; give it, or leave the example out"
        )
    if twice := [name for name in names if f"{name}.0" in names]:
        raise ValueError(f"the classes {twice[0]} and {twice[0]}.0 are the same number; write it in one way")
    _warn_of_alike(names)
    odd = [name for name in ("None", "NA", "N/A") if name in names] + ["-1"] * ({"-1", "0", "1", "2"} <= {*names})
    for name in odd:
        count = sum(example.label == name for example in examples)
        warnings.warn(
            f"{count:,} of {len(examples):,} examples have the class {name!r}; if it stands for a missing label, "
            "leave these examples out",
            stacklevel=3,
        )


def without_hidden_labels(examples: Examples[ClassifiedText], names: Sequence[str]) -> Examples[ClassifiedText]:
    """Replace the label -1 by None in test examples, unless -1 is a class.

    GLUE's test files from the library `datasets` hide the labels in this way.
    """
    if "-1" in names:
        return examples
    shown = (example._replace(label=None) if example.label == "-1" else example for example in examples)
    return Examples(zip(examples.places, shown, strict=True))


def classification_features(
    examples: Sequence[ClassifiedText],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    names: Sequence[str] | None,
) -> list[Feature]:
    """Return texts, or pairs of texts, with the index of their class in `names` (None for regression) as label.

    Raises:
        ValueError: a label is not among the names, or only some examples have a second text.
    """
    for number, example in enumerate(examples):
        if (example.second is None) != (examples[0].second is None):
            one, other = ("no second text", "one") if example.second is None else ("a second text", "none")
            raise ValueError(
                f"{place_of(examples, number)}: found {one}, but {place_of(examples, 0)} has {other}; give a second "
                "text to all or to none"
            )
    texts = [(example.text, example.second) if example.second is not None else example.text for example in examples]
    numbers = {name: number for number, name in enumerate(names or ())}
    labels = [_class(example.label, numbers, place_of(examples, n)) for n, example in enumerate(examples)]
    return [_feature(*pair) for pair in zip(_cut(tokenizer, texts, max_length), labels, strict=True)]


def _class(label: str | float | None, numbers: dict[str, int], place: str) -> Label:
    if label is None or (isinstance(label, float) and not numbers):
        return label
    if str(label) not in numbers:
        accepted = f"the classes {', '.join(numbers)}" if numbers else "numbers, in a column score"
        raise ValueError(f"{place}: label {label!r} is not among those known from training; accepted are {accepted}")
    return numbers[str(label)]


def similarity_features(
    examples: Sequence[SimilarTexts], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[SimilarFeature]:
    """Tokenize each text of each example by itself."""
    texts = [text for example in examples for text in example if text is not None]
    encoded = iter(_cut(tokenizer, texts, max_length))
    return [
        SimilarFeature(*(None if text is None else _feature(next(encoded), None) for text in example))  # type: ignore[arg-type]
        for example in examples
    ]


# --- Tagging ----------------------------------------------------------------------------------------------------------


def tag_names(examples: Sequence[TaggedWords]) -> list[str]:
    """Return the tags of examples, sorted; raise ValueError if an example has none."""
    for number, example in enumerate(examples):
        if example.tags is None:
            raise ValueError(f"{place_of(examples, number)}: no tags; training needs one for each word")
    names = in_order(tag for example in examples for tag in example.tags or ())
    _warn_of_alike(names)
    return names


def tagging_features(
    examples: Sequence[TaggedWords], tokenizer: PreTrainedTokenizerFast, max_length: int, names: Sequence[str]
) -> list[TaggingFeature]:
    """Return words joined by spaces; a word's tag is the label of its first token, its other tokens have label -100.

    Raises:
        ValueError: a tag is not among the names.
    """
    numbers = {name: number for number, name in enumerate(names)}
    for number, example in enumerate(examples):
        if unknown := set(example.tags or ()) - numbers.keys():
            raise ValueError(
                f"{place_of(examples, number)}: tags {', '.join(sorted(unknown))} are not among {', '.join(names)}, "
                "the tags known from training"
            )
    texts = [" ".join(example.words) for example in examples]
    rows = _cut(tokenizer, texts, max_length, return_offsets_mapping=True, return_special_tokens_mask=True)
    return [_tagging_feature(row, example, numbers) for row, example in zip(rows, examples, strict=True)]


def _tagging_feature(row: dict[str, Any], example: TaggedWords, numbers: dict[str, int]) -> TaggingFeature:
    ends = np.cumsum([len(word) + 1 for word in example.words])  # with the space after it
    first_tokens: list[int | None] = [None] * len(example.words)
    for token, ((begin, end), special) in enumerate(
        zip(row["offset_mapping"], row["special_tokens_mask"], strict=True)
    ):
        if special or begin == end:
            continue
        word = int(np.searchsorted(ends, end - 1, side="right"))  # a byte-level token begins with the space before it
        if first_tokens[word] is None:
            first_tokens[word] = token
    if example.tags is None:
        return TaggingFeature(row["input_ids"], row.get("token_type_ids"), None, first_tokens)
    labels = [IGNORE_INDEX] * len(row["input_ids"])
    for tag, first in zip(example.tags, first_tokens, strict=True):
        if first is not None:
            labels[first] = numbers[tag]
    return TaggingFeature(row["input_ids"], row.get("token_type_ids"), labels, first_tokens)


def word_tags(feature: TaggingFeature, token_tags: Sequence[int], names: Sequence[str]) -> list[str]:
    """Return the predicted tag of each word: the tag of its first token, or "O" for a word without a token."""
    return ["O" if token is None else names[token_tags[token]] for token in feature.first_tokens]


# --- Question answering -----------------------------------------------------------------------------------------------


MATCH_TYPE = 2
"""The token type of words that are in both the context and the question; 0 is the question, 1 the context."""

_WORD = re.compile(r"\w+")


def question_features(
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    stride: int,
    mark_matches: bool = False,
) -> list[QuestionFeature]:
    """Return each question with each window of its context; neighbouring windows share `stride` tokens.

    If several answers are accepted, the model learns the first.

    Args:
        mark_matches: give the token type `MATCH_TYPE` to words of the context that are in the question too, so that a
            small model need not learn to compare words (the feature "exact match" of Chen et al., "Reading Wikipedia
            to Answer Open-Domain Questions", 2017). It needs a tokenizer that makes token types.

    Raises:
        ValueError: a question is too long to leave room for `stride` tokens of context and one more.
    """
    special = tokenizer.num_special_tokens_to_add(pair=True)
    for number, length in enumerate(_question_lengths(questions, tokenizer)):
        if max_length - special - length <= stride:
            raise ValueError(
                f"{place_of(questions, number)}: question {questions[number].id!r} has {length} tokens: with "
                f"max_length={max_length} that leaves no room for more than stride={stride} tokens of context; raise "
                "max_length or lower stride"
            )
    encoded = tokenizer(
        [question.question for question in questions],
        [question.context for question in questions],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    features = [
        _question_feature(
            row, [part == 1 for part in encoded.sequence_ids(number)], questions[row["overflow_to_sample_mapping"]]
        )
        for number, row in enumerate(_rows(encoded))
    ]
    if not mark_matches:
        return features
    return [
        _with_matches(feature, shared)
        for number, windows in groupby(features, key=lambda feature: feature.question)
        for shared in [_shared(questions[number])]
        for feature in windows
    ]


def _shared(question: Question) -> np.ndarray:
    """Mark the characters of the context that belong to words of the question."""
    asked = set(_WORD.findall(question.question.lower()))
    shared = np.zeros(len(question.context), bool)
    for word in _WORD.finditer(question.context):
        shared[word.start() : word.end()] = word[0].lower() in asked
    return shared


def _with_matches(feature: QuestionFeature, shared: np.ndarray) -> QuestionFeature:
    """Give the token type `MATCH_TYPE` to words that context and question share."""
    if feature.token_type_ids is None:
        return feature
    types = [
        MATCH_TYPE if offset is not None and shared[slice(*offset)].any() else kind
        for kind, offset in zip(feature.token_type_ids, feature.offsets, strict=True)
    ]
    return replace(feature, token_type_ids=types)


def _question_lengths(questions: Sequence[Question], tokenizer: PreTrainedTokenizerFast) -> list[int]:
    texts = [question.question for question in questions]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def _question_feature(row: dict[str, Any], of_context: list[bool], question: Question) -> QuestionFeature:
    offsets = [
        _without_space(offset, question.context) if inside else None
        for offset, inside in zip(row["offset_mapping"], of_context, strict=True)
    ]
    start: int | None = None
    end: int | None = None
    if question.answers is not None:
        start, end = _answer_tokens(offsets, question)
    return QuestionFeature(
        row["input_ids"],
        row.get("token_type_ids"),
        None,
        row["overflow_to_sample_mapping"],
        offsets,
        start,
        end,
    )


def _without_space(offset: tuple[int, int], context: str) -> tuple[int, int]:
    """Move the begin of a token past its leading space: a byte-level token includes it, but the answer does not."""
    begin, end = offset
    while begin < end - 1 and context[begin].isspace():
        begin += 1
    return begin, end


def _answer_tokens(offsets: list[tuple[int, int] | None], question: Question) -> tuple[int, int]:
    """Return the first and last token of the answer; (0, 0) if this window does not hold all of it."""
    if not question.answers:
        return 0, 0
    begin = question.answers[0].start
    end = begin + len(question.answers[0].text)
    inside = [
        token for token, offset in enumerate(offsets) if offset is not None and offset[1] > begin and offset[0] < end
    ]
    spans = [offset for offset in offsets if offset is not None and offset[1] > offset[0]]
    if not inside or not spans or begin < spans[0][0] or end > spans[-1][1]:
        return 0, 0
    return inside[0], inside[-1]


# --- Sequence to sequence ---------------------------------------------------------------------------------------------


def pair_features(
    examples: Sequence[SourceTarget],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    max_target_length: int,
    prefix: str = "",
) -> list[PairFeature]:
    """Tokenize sources and targets, with special tokens, and cut them to `max_length` and `max_target_length`.

    Each source is put after `prefix` (T5: ``"summarize: "``).
    """
    sources = _cut(tokenizer, [prefix + example.source for example in examples], max_length)
    with_target = [example.target for example in examples if example.target is not None]
    targets = iter(_cut(tokenizer, with_target, max_target_length) if with_target else [])
    return [
        PairFeature(source["input_ids"], None if example.target is None else next(targets)["input_ids"])
        for source, example in zip(sources, examples, strict=True)
    ]


# --- Conversations ----------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""The template for a tokenizer without one. To save it with the tokenizer, set it as `tokenizer.chat_template`."""


def conversation_features(
    examples: Sequence[Conversation], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[Feature]:
    """Return conversations as the tokenizer's chat template writes them.

    Labels are the tokens of the assistant's messages, including the end of each message; they are -100 elsewhere, and
    in each `UnlearntMessage`. The model shifts labels by one place, as Hugging Face's models do.

    Raises:
        ValueError: the template writes a message differently once others follow, or no conversation has an answer
            within `max_length`.
    """
    rendered = [_render(example, tokenizer, place_of(examples, number)) for number, example in enumerate(examples)]
    rows = _rows(
        tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
    )
    if too_long := sum(len(row["input_ids"]) > max_length for row in rows):
        _warn_of_cut(too_long, len(rows), max_length)
    cut = [
        (row["input_ids"][:max_length], _answer_labels(row, spans)[:max_length])
        for row, (_, spans) in zip(rows, rendered, strict=True)
    ]
    with_answer = [Feature(ids, None, labels) for ids, labels in cut if set(labels) != {IGNORE_INDEX}]
    if not with_answer:
        raise ValueError(f"no conversation has an answer within its first max_length={max_length} tokens")
    if missing := len(cut) - len(with_answer):
        warnings.warn(f"{missing} conversations are left out: once cut, they have no answer", stacklevel=2)
    return with_answer


def _render(example: Conversation, tokenizer: PreTrainedTokenizerFast, place: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text, and the begin and end of each message of the assistant in it."""
    messages = [message._asdict() for message in example.messages]
    whole = _template(tokenizer, messages, place, prompt=False)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or isinstance(example.messages[number], UnlearntMessage):
            continue
        before = _template(tokenizer, messages[:number], place, prompt=True)
        after = _template(tokenizer, messages[: number + 1], place, prompt=False)
        if not whole.startswith(before) or not whole.startswith(after):
            raise ValueError(
                f"{place}: the tokenizer's chat template writes the beginning of a conversation differently when more "
                "messages follow, so the assistant's messages cannot be found; set another chat_template, such as "
                "CHAT_TEMPLATE"
            )
        spans.append((len(before), len(after.rstrip("\n"))))
    return whole, spans


def _template(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], place: str, prompt: bool) -> str:
    from jinja2 import TemplateError

    try:
        # A batch of one: a single conversation without messages (before the assistant's first) would be refused.
        texts: Any = tokenizer.apply_chat_template(
            [messages],
            chat_template=tokenizer.chat_template or CHAT_TEMPLATE,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"{place}: the tokenizer's chat template does not accept it: {error}") from error
    return str(texts[0])


def prompt_ids(example: Conversation, tokenizer: PreTrainedTokenizerFast, place: str = "the conversation") -> list[int]:
    """Return the tokens of a conversation up to the assistant's next message; errors name its `place`."""
    text = _template(tokenizer, [message._asdict() for message in example.messages], place, prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _answer_labels(row: dict[str, Any], spans: list[tuple[int, int]]) -> list[int]:
    labels = []
    for token, (begin, end) in zip(row["input_ids"], row["offset_mapping"], strict=True):
        answered = any(first <= begin < end <= last for first, last in spans)
        labels.append(token if answered else IGNORE_INDEX)
    return labels
