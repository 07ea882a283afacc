"""Read labelled data in common layouts: GLUE, SQuAD, CoNLL, XSum, WMT, chats, tables and JSON lines.

Errors name the file and the line, what was found there and what is accepted.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastformer.data.labelled.conll import conll_sentences
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
    UnlearntMessage,
    check_is_told,
    written_number,
)
from fastformer.data.labelled.rows import (
    NOTHING,
    Row,
    at_least_one,
    check_one,
    checked_text,
    examples_of,
    one_of,
    read_rows,
    shown,
    text_of,
)
from fastformer.data.labelled.tmx import tmx_units
from fastformer.lines import check_is_file, json_file, numbered_lines

ROLES = ("system", "user", "assistant")

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eng.testa", "testa"),
    "test": ("test", "eng.testb", "testb"),
}


def find_splits(folder: Path) -> dict[str, list[Path]]:
    """Return the files of a folder by split.

    A file belongs to a split if its name begins with ``train``, ``validation`` (or ``valid``, ``val``, ``dev``) or
    ``test``, followed by nothing or by ``-``, ``_`` or ``.`` and anything (``dev_matched.tsv``, ``train-v2.0.json``).

    Raises:
        FileNotFoundError: there is no such folder, or no training file in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    splits: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.iterdir() if not path.is_dir()):
        for split, names in _SPLIT_NAMES.items():
            if any(path.name == name or path.name.startswith((f"{name}.", f"{name}-", f"{name}_")) for name in names):
                splits.setdefault(split, []).append(path)
    if "train" not in splits:
        found = ", ".join(path.name for path in sorted(folder.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(f"{folder} has no training file (train.tsv, train.jsonl, ...); found {found}")
    return splits


# --- Classification ---------------------------------------------------------------------------------------------------

_FIRST = ("text", "sentence", "sentence1", "premise", "question1", "#1 String", "question")
_SECOND = ("text_pair", "sentence2", "hypothesis", "question2", "#2 String", "second")
_ASKED_ABOUT = ("sentence", "passage", "paragraph", "context", "answer")
"""Columns of the second text if the first is ``question``, as in QNLI, BoolQ and WikiQA."""
_LABEL = ("label", "labels", "gold_label", "is_duplicate", "Quality", "label_text")
_SCORE = ("score", "similarity_score")
_LARGEST_SCORE = 1e15


def read_classification(path: Path, targets: bool = False) -> Examples[ClassifiedText]:
    """Read tables and JSON lines with a text, optionally a second one, and a label (or a score, for regression).

    GLUE's TSV files are read as they are; CoLA's need no header. White space around a label is removed. JSON's true
    and false are the classes ``true`` and ``false``. Examples whose ``gold_label`` is ``-`` (in SNLI, people did not
    agree on a label) are left out; a warning says how many.

    Args:
        path: the file.
        targets: whether each example must have a label or a score. If not, as in GLUE's test files, the label of an
            example without one is None.
    """
    return examples_of(path, _agreed(path), lambda row: _classified(row, targets))


def _agreed(path: Path) -> Iterator[Row]:
    """Yield the records of a file, except those without an agreed label."""
    agreed = left_out = 0
    for row in read_rows(path):
        if row.values.get("gold_label") == "-":
            left_out += 1
        else:
            agreed += 1
            yield row
    if left_out:
        warnings.warn(
            f"{path}: {left_out:,} of {left_out + agreed:,} examples are left out: people did not agree on a label, "
            "gold_label is '-'",
            stacklevel=2,
        )


def _classified(row: Row, targets: bool) -> ClassifiedText:
    first, second = _texts(row)
    label = one_of(row, _LABEL, "label", required=False)
    if label is None:
        score = one_of(row, (*_SCORE, *_LABEL), "label or score", required=targets)
        return ClassifiedText(first, second, None if score is None else _number(score, row.where))
    if not isinstance(label, (str, int)) and not (isinstance(label, float) and math.isnan(label)):
        raise ValueError(f"{row.where}: label must be a string or a whole number, found {label!r:.60}")
    return ClassifiedText(first, second, check_is_told(_written(label).strip(), row.where, "label"))


def _texts(row: Row) -> tuple[str, str | None]:
    """Return the text and, if there is one, the second text."""
    filled = sorted(name for name, value in row.values.items() if isinstance(value, str) and value.strip())
    firsts: Sequence[str] = _FIRST
    seconds: Sequence[str] = _SECOND
    if row.values.get("question") not in NOTHING and any(row.values.get(name) is not None for name in _ASKED_ABOUT):
        firsts, seconds = ("question",), (*_SECOND, *_ASKED_ABOUT)
    texts = [name for name in filled if name in (*_FIRST, *seconds)]
    if len(texts) > (2 if any(name in filled for name in seconds) else 1):
        raise ValueError(
            f"{row.where}: found the texts {', '.join(texts)}; accepted are one, or two with the second in "
            f"{', '.join(_SECOND)} or, if the first is question, in {', '.join(_ASKED_ABOUT)}"
        )
    return text_of(row, firsts, "text column"), text_of(row, seconds, "second text", required=False)


def _written(label: Any) -> str:
    """Return a label as JSON writes it: true is the class "true"."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def _number(score: Any, where: str) -> float:
    number = math.nan
    if isinstance(score, str):
        number = written_number(score)
    elif not isinstance(score, bool):
        with suppress(TypeError, ValueError, OverflowError):
            number = float(score)
    if not math.isfinite(number):
        raise ValueError(f"{where}: score must be a finite number, found {score!r:.60}")
    if abs(number) > _LARGEST_SCORE:
        raise ValueError(
            f"{where}: score must be from {-_LARGEST_SCORE:g} to {_LARGEST_SCORE:g}, found {score!r:.60}: squares of "
            "larger scores cannot be added up in float32; divide all scores by the same number"
        )
    return number


# --- Tagging ----------------------------------------------------------------------------------------------------------


def read_tagging(path: Path, targets: bool = False) -> Examples[TaggedWords]:
    """Read tagged words: CoNLL's columns, or JSON lines or parquet.

    CoNLL: one word per line, the tag in the last column, a blank line between sentences. A line that has a tab is
    divided by tabs, any other by spaces; other white space, such as U+00A0, belongs to a word. Lines before a sentence
    that begin with ``#`` and a space are comments; `fastformer.data.labelled.conll.conll_sentences` says when such a
    line is the word ``#``.

    JSON lines and parquet: ``tokens`` (or ``words``) and ``tags`` (or ``ner_tags``, ``labels``), lists of strings.

    Args:
        path: the file.
        targets: whether each example must have tags.
    """
    if path.suffix.lower() in (".jsonl", ".ndjson", ".parquet"):
        return examples_of(path, read_rows(path), lambda row: _tagged(row, targets))
    return at_least_one(path, conll_sentences(path))


def _tagged(row: Row, targets: bool) -> TaggedWords:
    words = _strings(row, ("tokens", "words"), "words")
    tags = _strings(row, ("tags", "ner_tags", "labels"), "tags", required=targets)
    if tags is not None and len(tags) != len(words):
        raise ValueError(f"{row.where}: found {len(words)} words and {len(tags)} tags; each word has one tag")
    for tag in tags or ():
        check_is_told(tag, row.where, "tag")
    return TaggedWords(words, tags)


def _strings(row: Row, names: Sequence[str], what: str, required: bool = True) -> Any:
    check_one(row, names, what)
    values = one_of(row, names, what, required)
    if values is None:
        return None
    if not isinstance(values, list) or not values or not all(isinstance(value, str) and value for value in values):
        raise ValueError(f"{row.where}: {what} must be a list of non-empty strings, found {values!s:.60}")
    return tuple(values)


# --- Question answering -----------------------------------------------------------------------------------------------


def read_questions(path: Path, targets: bool = False) -> Examples[Question]:
    """Read questions about contexts: SQuAD 1.1 or 2.0 (JSON), or JSON lines or parquet.

    JSON lines and parquet need ``id``, ``question``, ``context`` and ``answers`` (``{"text": [...], "answer_start":
    [...]}``).

    Args:
        path: the file.
        targets: whether each question must have ``answers``; an empty list says that the context has no answer.
    """
    rows = read_rows(path) if path.suffix.lower() != ".json" else _squad_rows(path)
    return examples_of(path, rows, lambda row: _question(row, targets))


def _squad_rows(path: Path) -> Iterator[Row]:
    for article, in_article in _members(json_file(path), "data", str(path)):
        for paragraph, in_paragraph in _members(article, "paragraphs", in_article):
            context = {"context": paragraph["context"]} if "context" in paragraph else {}
            for asked, where in _members(paragraph, "qas", in_paragraph):
                yield Row(where, {**asked, **context})


def _members(parent: Any, name: str, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the objects in the list `name` of an object, and the place of each."""
    members = parent.get(name) if isinstance(parent, dict) else None
    if not isinstance(members, list):
        raise ValueError(f"{where}: not SQuAD's layout, data[].paragraphs[].qas[]: no list {name!r}")
    for number, member in enumerate(members):
        place = f"{where}, {name}[{number}]" if name == "data" else f"{where}.{name}[{number}]"
        if not isinstance(member, dict):
            raise ValueError(f"{place}: not SQuAD's layout, data[].paragraphs[].qas[]: found {shown(member)}")
        yield member, place


def _question(row: Row, targets: bool) -> Question:
    context = text_of(row, ("context",), "context")
    question = text_of(row, ("question",), "question")
    identity = str(one_of(row, ("id",), "id"))
    impossible = row.values.get("is_impossible")
    if impossible not in (None, True, False):
        raise ValueError(f"{row.where}: is_impossible must be true or false, found {impossible!r:.60}")
    given = one_of(row, ("answers",), "answers", required=targets and not impossible)
    if given is None:
        return Question(identity, question, context, () if impossible else None)
    answers = tuple(_answer(row.where, context, *answer) for answer in _given_answers(given, row.where))
    if impossible and answers:
        raise ValueError(f"{row.where}: is_impossible is true, but there is the answer {answers[0].text!r:.60}")
    return Question(identity, question, context, answers)


def _given_answers(answers: Any, where: str) -> list[tuple[Any, Any]]:
    """Return the text and start of each answer, from SQuAD's list of objects or an object of two lists."""
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            return list(zip(texts, starts, strict=True))
    elif isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers):
        return [(answer.get("text"), answer.get("answer_start")) for answer in answers]
    raise ValueError(
        f'{where}: answers must be {{"text": [...], "answer_start": [...]}}, two lists of equal length, or a list of '
        f'{{"text": ..., "answer_start": ...}}; found {answers!s:.80}'
    )


def _answer(where: str, context: str, text: Any, start: Any) -> Answer:
    if not isinstance(text, str) or not text.strip() or not isinstance(start, int) or isinstance(start, bool):
        raise ValueError(
            f"{where}: an answer needs a non-empty text, and answer_start must be a whole number; found text "
            f"{text!r:.60}, answer_start {start!r:.60}"
        )
    if start < 0:
        raise ValueError(f"{where}: answer_start must be 0 or more, found {start}")
    found = context[start : start + len(text)]
    if found != text:
        raise ValueError(f"{where}: the answer {text!r} is not at character {start} of the context, but {found!r}")
    return Answer(text, start)


# --- Sequence to sequence ---------------------------------------------------------------------------------------------

_DOCUMENT = ("document", "article", "source", "text")
_SUMMARY = ("summary", "highlights", "target")


def read_summaries(path: Path, targets: bool = False) -> Examples[SourceTarget]:
    """Read documents and their summaries.

    Accepted are tables, JSON lines and parquet with ``document`` (or ``article``, ``source``, ``text``) and ``summary``
    (or ``highlights``, ``target``), and XSum's pairs of files ``NAME.source`` and ``NAME.target`` in the same folder,
    one text per line.

    Args:
        path: the file.
        targets: whether each document must have a summary.
    """
    if path.suffix == ".source":
        return _parallel(path, path.with_suffix(".target"))
    return examples_of(
        path,
        read_rows(path),
        lambda row: SourceTarget(text_of(row, _DOCUMENT, "document"), text_of(row, _SUMMARY, "summary", targets)),
    )


def read_translations(path: Path, source: str, target: str, targets: bool = False) -> Examples[SourceTarget]:
    """Read translations from one language into another.

    Accepted are WMT's parallel files (``NAME.de`` and ``NAME.en`` in the same folder, one sentence per line; `path` is
    the file of the source language), JSON lines or parquet with ``{"translation": {"de": ..., "en": ...}}`` or with the
    language codes as fields, TSV with the codes in its first line, and TMX.

    Args:
        path: the file.
        source, target: the codes of the languages, as in the file.
        targets: whether each text must have a translation.
    """
    if path.suffix == f".{source}":
        return _parallel(path, path.with_suffix(f".{target}"))
    rows = read_rows(path) if path.suffix.lower() != ".tmx" else (Row(*unit) for unit in tmx_units(path))
    return examples_of(path, rows, lambda row: _translation(row, source, target, targets))


def _translation(row: Row, source: str, target: str, targets: bool) -> SourceTarget:
    values = row.values.get("translation", row.values)
    if not isinstance(values, dict):
        raise ValueError(f"{row.where}: translation must be an object, found {type(values).__name__}")
    row = Row(row.where, values)
    return SourceTarget(
        text_of(row, (source,), f"text in {source!r}"), text_of(row, (target,), f"text in {target!r}", targets)
    )


def _parallel(source: Path, target: Path) -> Examples[SourceTarget]:
    check_is_file(source)
    if not target.exists():
        raise FileNotFoundError(f"{source} needs {target.name} in the same folder, with as many lines")
    sources, targets = ([line for _, line in numbered_lines(path)] for path in (source, target))
    if len(sources) != len(targets):
        raise ValueError(
            f"{source} has {len(sources)} lines, but {target} has {len(targets)}; line n translates line n"
        )
    return at_least_one(source, _pairs(source, target, sources, targets))


def _pairs(
    source: Path, target: Path, sources: Sequence[str], targets: Sequence[str]
) -> Iterator[tuple[str, SourceTarget]]:
    for number, (text, other) in enumerate(zip(sources, targets, strict=True), start=1):
        if bool(text.strip()) != bool(other.strip()):
            raise ValueError(
                f"{source if not text.strip() else target}, line {number}: empty, but the same line of the other file "
                "is not"
            )
        if text.strip():
            yield f"{source}, line {number}", SourceTarget(text, other)


# --- Conversations ----------------------------------------------------------------------------------------------------


_SYSTEM, _INPUT = ("system", "system_prompt", "system_message"), ("input", "context")
_UNREAD = ("tools", "functions", "function_call", "documents", "images", "image", "audios", "audio", "videos", "video")


def read_conversations(path: Path) -> Examples[Conversation]:
    """Read conversations: JSON lines or parquet, in one of two layouts.

    - ``messages``: ``[{"role": "user", "content": ...}, ...]``, with the roles system, user and assistant.
    - ``prompt`` (or ``instruction``) and ``completion`` (or ``response``, ``output``); optionally ``input`` (or
      ``context``), which is added to the prompt, and ``history``, ``[[question, answer], ...]``, which comes before it.

    Both may have ``system``. An answer with ``"weight": 0`` is not learnt. Tool calls, pictures and any other content
    are refused with an error.
    """
    return examples_of(path, read_rows(path), _conversation)


def _conversation(row: Row) -> Conversation:
    chat = "messages" in row.values
    for name in (*_UNREAD, *((*_INPUT, "history") if chat else ())):
        if row.values.get(name) not in NOTHING:
            raise ValueError(f"{row.where}: {name} would be ignored, found {shown(row.values[name])}; leave it out")
    for name in ("label", "kto_tag"):
        if isinstance(row.values.get(name), bool):
            raise ValueError(
                f"{row.where}: {name} says whether the answer is good, but every answer is learnt; keep the good "
                f"answers only, and leave {name} out"
            )
    messages = _messages(row) if chat else _instruction(row)
    if (system := _perhaps(row, _SYSTEM, "system message")) is not None:
        if any(message.role == "system" for message in messages):
            raise ValueError(
                f"{row.where}: two system messages, one in messages and one in {', '.join(_SYSTEM)}; give one"
            )
        messages = (Message("system", system), *messages)
    return Conversation(messages)


def _perhaps(row: Row, names: Sequence[str], what: str) -> str | None:
    """Return the text in one of these columns; None if all are empty."""
    check_one(row, names, what)
    given = {name: row.values[name] for name in names if row.values.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"{row.where}: {name} must be a string, found {shown(value)}")
    return next((value for value in given.values() if value.strip()), None)


def _instruction(row: Row) -> tuple[Message, ...]:
    prompt = text_of(row, ("prompt", "instruction"), "messages or prompt")
    further = _perhaps(row, _INPUT, "input")
    if further is not None:
        prompt = f"{prompt}\n\n{further}"
    completion = text_of(row, ("completion", "response", "output"), "completion")
    return (*_history(row), Message("user", prompt), Message("assistant", completion))


def _history(row: Row) -> Iterator[Message]:
    history = row.values.get("history")
    if history in NOTHING:
        return
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise ValueError(f"{row.where}: history must be [[question, answer], ...], found {history!s:.60}")
    for number, (question, answer) in enumerate(history):
        where = f"{row.where}, history[{number}]"
        yield Message("user", checked_text(question, where, "question"))
        yield Message("assistant", checked_text(answer, where, "answer"))


def _messages(row: Row) -> tuple[Message, ...]:
    given = row.values["messages"]
    if not isinstance(given, list) or not given:
        raise ValueError(f"{row.where}: messages must be a list of at least one, found {given!s:.60}")
    messages = tuple(_message(row, number, message) for number, message in enumerate(given))
    if not any(message.role == "assistant" and not isinstance(message, UnlearntMessage) for message in messages):
        raise ValueError(f"{row.where}: no message of the assistant, so there is nothing to learn")
    if isinstance(messages[-1], UnlearntMessage):
        raise ValueError(
            f"{row.where}, messages[{len(messages) - 1}]: weight 0, and no learnt message follows; leave it out"
        )
    return messages


def _message(row: Row, number: int, message: Any) -> Message:
    where = f"{row.where}, messages[{number}]"
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise ValueError(f"{where}: a message needs role and content; found {message!s:.60}")
    role, weight = message["role"], message.get("weight")
    if role not in ROLES:
        raise ValueError(f"{where}: role {role!r}; accepted are {', '.join(ROLES)}")
    for name, value in message.items():
        if name not in ("role", "content", "weight") and value not in NOTHING:
            raise ValueError(
                f"{where}: {name} would be ignored, found {shown(value)}; a message may have role, content, weight"
            )
    if weight not in ((None, 0, 1) if role == "assistant" else (None, 0)):
        raise ValueError(
            f"{where}: weight {weight!r:.60} of a message of the {role}; accepted are 0 and 1 for the assistant, and 0 "
            "for others, whose messages are never learnt"
        )
    kind = UnlearntMessage if role == "assistant" and weight == 0 else Message
    return kind(role, checked_text(message["content"], where, "content"))


# --- Similar texts ----------------------------------------------------------------------------------------------------

_ANCHOR, _POSITIVE, _NEGATIVE = (
    ("anchor", "query", "sentence1", "text"),
    ("positive", "sentence2", "pos"),
    ("negative", "neg"),
)


def read_similar(path: Path) -> Examples[SimilarTexts]:
    """Read pairs of texts that mean about the same: tables, JSON lines or parquet.

    The columns are ``anchor`` (or ``query``, ``sentence1``, ``text``), ``positive`` (or ``sentence2``, ``pos``) and
    optionally ``negative`` (or ``neg``). A column with a label or a score, as in GLUE's pairs, is refused with an
    error, because each pair is learnt as similar.
    """
    return examples_of(path, read_rows(path), _similar)


_JUDGED = re.compile(
    r"(.*_)?(label|score|similarity|relatedness|rating)s?(_text|_score)?|quality|(is_)?(duplicate|paraphrase|similar)s?",
    re.IGNORECASE,
)
_FURTHER = re.compile(r"(hard_)?(positive|pos|negative|neg)s?_?\d*", re.IGNORECASE)


def _similar(row: Row) -> SimilarTexts:
    for name, value in row.values.items():
        if value is not None and _JUDGED.fullmatch(name):
            raise ValueError(
                f"{row.where}: column {name!r} says how similar the texts are, but every pair is learnt as similar; "
                "keep the similar pairs only, and leave the column out"
            )
        if value is not None and _FURTHER.fullmatch(name) and name not in (*_POSITIVE, *_NEGATIVE):
            accepted = ", ".join((*_POSITIVE, *_NEGATIVE))
            raise ValueError(f"{row.where}: column {name!r} would be ignored; accepted are {accepted}")
    return SimilarTexts(
        text_of(row, _ANCHOR, "anchor"),
        text_of(row, _POSITIVE, "positive"),
        text_of(row, _NEGATIVE, "negative", required=False),
    )
