"""Labelled data in the layouts in which it comes: GLUE, SQuAD, CoNLL, XSum, WMT, chats, tables and JSON lines.

Errors name the file and the line, what was found there and what is accepted.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from xml.etree import ElementTree

from fastformer.data.examples import (
    Answer,
    ClassifiedText,
    Conversation,
    Message,
    Question,
    SimilarTexts,
    SourceTarget,
    TaggedWords,
)
from fastformer.data.sources import decoded_lines, json_object

Example = TypeVar("Example", bound=tuple)

ROLES = ("system", "user", "assistant")

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eng.testa", "testa"),
    "test": ("test", "eng.testb", "testb"),
}


def find_splits(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder by split: those named ``train``, ``validation`` (or ``valid``, ``val``, ``dev``) or
    ``test``, with any ending or suffix behind ``-``, ``_`` or ``.`` (``dev_matched.tsv``, ``train-v2.0.json``).

    Raises:
        FileNotFoundError: there is no such folder, or no training file in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    splits: dict[str, list[Path]] = {}
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        for split, names in _SPLIT_NAMES.items():
            if any(path.name == name or path.name.startswith((f"{name}.", f"{name}-", f"{name}_")) for name in names):
                splits.setdefault(split, []).append(path)
    if "train" not in splits:
        found = ", ".join(path.name for path in sorted(folder.iterdir())[:5]) or "nothing"
        raise FileNotFoundError(f"{folder} has no training file (train.tsv, train.jsonl, ...); found {found}")
    return splits


# --- Rows -------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A record of a file, and where it is."""

    where: str
    values: dict[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """The records of JSON lines, CSV (quoted as in RFC 4180), TSV (tabs, never quoted, as GLUE's) or parquet.

    Raises:
        ValueError: another suffix, or a line that is no record.
    """
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        yield from _json_rows(path)
    elif suffix in (".csv", ".tsv"):
        yield from _table_rows(path)
    elif suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        raise ValueError(f"{path}: unknown suffix {suffix!r}; accepted are .jsonl, .ndjson, .csv, .tsv, .parquet")


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield Row(where, json_object(line, where))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, (line, _) in enumerate(decoded_lines(path), start=1):
        yield number, line


def _table_rows(path: Path) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from _table_rows_of(file, path)


def _table_rows_of(file: Any, path: Path) -> Iterator[Row]:
    if path.suffix.lower() == ".csv":
        records = csv.reader(file, strict=True)
    else:
        records = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        header = next(records, None)
        if header is None:
            raise ValueError(f"{path} is empty; its first line must name the columns")
        if _is_cola(header):
            yield Row(f"{path}, line 1", {"label": header[1], "sentence": header[3]})
            header = ["", "label", "", "sentence"]
        for record in records:
            where = f"{path}, line {records.line_num}"
            if not record:
                continue
            if len(record) != len(header):
                raise ValueError(f"{where}: found {len(record)} columns, expected {len(header)}: {', '.join(header)}")
            yield Row(where, dict(zip(header, record, strict=True)))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason}") from error
    except csv.Error as error:
        raise ValueError(f"{path}, line {records.line_num}: not CSV: {error}") from error


def _is_cola(header: list[str]) -> bool:
    """GLUE's CoLA has no header: source, label, original mark, sentence."""
    return len(header) == 4 and header[1] in ("0", "1") and header[2] in ("", "*", "?", "??", "?*")


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is damaged or not parquet: {error}") from error
    with table:
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", values)


def _one_of(row: Row, names: Sequence[str], what: str, required: bool = True) -> Any:
    """The value of the first of some columns that the row has."""
    for name in names:
        if name in row.values:
            return row.values[name]
    if required:
        found = ", ".join(map(str, row.values)) or "nothing"
        raise ValueError(f"{row.where}: no {what}; found {found}; accepted are {', '.join(names)}")
    return None


def _text(row: Row, names: Sequence[str], what: str, required: bool = True) -> Any:
    value = _one_of(row, names, what, required)
    if value is None and not required:
        return None
    return _checked_text(value, row.where, what)


def _checked_text(value: Any, where: str, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {what} must be a string, found {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"{where}: {what} is empty")
    return value


def _examples(path: Path, rows: Iterator[Row], make: Callable[[Row], Example]) -> list[Example]:
    examples = [make(row) for row in rows]
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


# --- Classification ---------------------------------------------------------------------------------------------------

_FIRST = ("text", "sentence", "sentence1", "premise", "question1", "#1 String", "question")
_SECOND = ("text_pair", "sentence2", "hypothesis", "question2", "#2 String")
_LABEL = ("label", "gold_label", "is_duplicate", "Quality", "label_text")
_SCORE = ("score", "similarity_score")


def read_classification(path: Path) -> list[ClassifiedText]:
    """Tables and JSON lines with a text, perhaps a second one, and a label (or a score, for regression).

    GLUE's TSV files are read as they are, CoLA's without a header too. Without a label column, as in GLUE's test files,
    labels are None.
    """
    return _examples(path, read_rows(path), _classified)


def _classified(row: Row) -> ClassifiedText:
    first = _text(row, _FIRST, "text column")
    second = _text(row, _SECOND, "second text", required=False)
    if second is None and "question" in row.values and "sentence" in row.values:  # QNLI
        first, second = _text(row, ("question",), "question"), _text(row, ("sentence",), "sentence")
    score = _one_of(row, _SCORE, "score", required=False)
    label = _one_of(row, _LABEL, "label", required=False)
    if label is None and score is not None:
        try:
            return ClassifiedText(first, second, float(score))
        except (TypeError, ValueError):
            raise ValueError(f"{row.where}: score must be a number, found {score!r}") from None
    if label is None:
        return ClassifiedText(first, second, None)
    if not isinstance(label, (str, int)) or label == "":
        raise ValueError(f"{row.where}: label must be a string or a whole number, found {label!r}")
    return ClassifiedText(first, second, str(label))


# --- Tagging ----------------------------------------------------------------------------------------------------------


def read_tagging(path: Path) -> list[TaggedWords]:
    """CoNLL's columns (a word a line, the tag in the last column, a blank line between sentences), or JSON lines with
    ``tokens`` (or ``words``) and ``tags`` (or ``ner_tags``, ``labels``) as strings.
    """
    if path.suffix.lower() in (".jsonl", ".ndjson", ".parquet"):
        return _examples(path, read_rows(path), _tagged)
    sentences = list(_conll_sentences(path))
    if not sentences:
        raise ValueError(f"{path} holds no examples")
    return sentences


def _tagged(row: Row) -> TaggedWords:
    words = _strings(row, ("tokens", "words"), "words")
    tags = _strings(row, ("tags", "ner_tags", "labels"), "tags", required=False)
    if tags is not None and len(tags) != len(words):
        raise ValueError(f"{row.where}: found {len(words)} words and {len(tags)} tags; each word has one tag")
    return TaggedWords(words, tags)


def _strings(row: Row, names: Sequence[str], what: str, required: bool = True) -> Any:
    values = _one_of(row, names, what, required)
    if values is None and not required:
        return None
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{row.where}: {what} must be a list of strings, found {str(values)[:60]}")
    return tuple(values)


def _conll_sentences(path: Path) -> Iterator[TaggedWords]:
    words: list[str] = []
    tags: list[str] = []
    columns = 0
    for number, line in _lines(path):
        fields = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or fields[0] == "-DOCSTART-":
            if words:
                yield TaggedWords(tuple(words), tuple(tags))
                words, tags = [], []
            continue
        columns = columns or len(fields)
        if len(fields) != columns or columns < 2:
            raise ValueError(
                f"{path}, line {number}: found {len(fields)} columns, expected "
                f"{columns if columns > 1 else 'two or more'}: word ... tag"
            )
        words.append(fields[0])
        tags.append(fields[-1])
    if words:
        yield TaggedWords(tuple(words), tuple(tags))


# --- Question answering -----------------------------------------------------------------------------------------------


def read_questions(path: Path) -> list[Question]:
    """SQuAD 1.1 or 2.0 (JSON), or JSON lines or parquet with ``id``, ``question``, ``context`` and ``answers``
    (``{"text": [...], "answer_start": [...]}``).
    """
    if path.suffix.lower() != ".json":
        return _examples(path, read_rows(path), _question)
    return _examples(path, _squad_rows(path), _question)


def _squad_rows(path: Path) -> Iterator[Row]:
    text = "\n".join(line for _, line in _lines(path))
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    try:
        for a, article in enumerate(data["data"]):
            for p, paragraph in enumerate(article["paragraphs"]):
                for q, asked in enumerate(paragraph["qas"]):
                    where = f"{path}, data[{a}].paragraphs[{p}].qas[{q}]"
                    yield Row(where, {**asked, "context": paragraph["context"]})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not SQuAD's layout, data[].paragraphs[].qas[]: no {error}") from error


def _question(row: Row) -> Question:
    context = _text(row, ("context",), "context")
    question = _text(row, ("question",), "question")
    identity = str(_one_of(row, ("id",), "id"))
    answers = row.values.get("answers")
    if row.values.get("is_impossible"):
        return Question(identity, question, context, ())
    if answers is None:
        return Question(identity, question, context, None)
    if isinstance(answers, dict):
        answers = [
            {"text": text, "answer_start": start}
            for text, start in zip(answers.get("text", ()), answers.get("answer_start", ()), strict=True)
        ]
    return Question(identity, question, context, tuple(_answer(row, context, answer) for answer in answers))


def _answer(row: Row, context: str, answer: Mapping[str, Any]) -> Answer:
    text, start = answer.get("text"), answer.get("answer_start")
    if not isinstance(text, str) or not isinstance(start, int):
        raise ValueError(f"{row.where}: an answer needs text and answer_start; found {str(answer)[:80]}")
    if context[start : start + len(text)] != text:
        found = context[start : start + len(text)]
        raise ValueError(f"{row.where}: the answer {text!r} is not at character {start} of the context, but {found!r}")
    return Answer(text, start)


# --- Sequence to sequence ---------------------------------------------------------------------------------------------

_DOCUMENT = ("document", "article", "source", "text")
_SUMMARY = ("summary", "highlights", "target")


def read_summaries(path: Path) -> list[SourceTarget]:
    """Tables and JSON lines with ``document`` (or ``article``, ``source``, ``text``) and ``summary`` (or
    ``highlights``, ``target``), or a file ``NAME.source`` beside ``NAME.target`` with a text a line, as XSum is handed
    on.
    """
    if path.suffix == ".source":
        return _parallel(path, path.with_suffix(".target"))
    return _examples(
        path,
        read_rows(path),
        lambda row: SourceTarget(_text(row, _DOCUMENT, "document"), _text(row, _SUMMARY, "summary", required=False)),
    )


def read_translations(path: Path, source: str, target: str) -> list[SourceTarget]:
    """Translations from one language into another, whose codes are those in the file.

    Accepted are WMT's parallel files (``NAME.de`` beside ``NAME.en``, a sentence a line; `path` is the one of the
    source language), JSON lines or parquet with ``{"translation": {"de": ..., "en": ...}}`` or with the codes as
    fields, TSV with the codes in its first line, and TMX.
    """
    suffix = path.suffix.lower()
    if path.suffix == f".{source}":
        return _parallel(path, path.with_suffix(f".{target}"))
    if suffix == ".tmx":
        return _examples(path, _tmx_rows(path), lambda row: _translation(row, source, target))
    return _examples(path, read_rows(path), lambda row: _translation(row, source, target))


def _translation(row: Row, source: str, target: str) -> SourceTarget:
    values = row.values.get("translation", row.values)
    if not isinstance(values, dict):
        raise ValueError(f"{row.where}: translation must be an object, found {type(values).__name__}")
    row = Row(row.where, values)
    return SourceTarget(
        _text(row, (source,), f"text in {source!r}"), _text(row, (target,), f"text in {target!r}", required=False)
    )


_XML_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"


def _tmx_rows(path: Path) -> Iterator[Row]:
    number = 0
    try:
        for _, element in ElementTree.iterparse(path):
            if element.tag != "tu":
                continue
            number += 1
            texts = {
                variant.get(_XML_LANGUAGE, variant.get("lang", "")): "".join(segment.itertext())
                for variant in element.iter("tuv")
                if (segment := variant.find("seg")) is not None
            }
            yield Row(f"{path}, unit {number}", texts)
            element.clear()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not TMX: {error}") from error


def _parallel(source: Path, target: Path) -> list[SourceTarget]:
    if not target.exists():
        raise FileNotFoundError(f"{source} needs {target.name} beside it, with as many lines")
    sources, targets = ([line for _, line in _lines(path)] for path in (source, target))
    if len(sources) != len(targets):
        raise ValueError(
            f"{source} has {len(sources)} lines, but {target} has {len(targets)}; line n translates line n"
        )
    pairs = []
    for number, (text, other) in enumerate(zip(sources, targets, strict=True), start=1):
        if bool(text.strip()) != bool(other.strip()):
            raise ValueError(f"{source if not text.strip() else target}, line {number}: empty, while its pair is not")
        if text.strip():
            pairs.append(SourceTarget(text, other))
    if not pairs:
        raise ValueError(f"{source} holds no examples")
    return pairs


# --- Conversations ----------------------------------------------------------------------------------------------------


def read_conversations(path: Path) -> list[Conversation]:
    """JSON lines or parquet with ``messages`` (``[{"role": "user", "content": ...}, ...]``, roles system, user and
    assistant), or with ``prompt`` (or ``instruction``, perhaps with ``input``) and ``completion`` (or ``response``,
    ``output``).
    """
    return _examples(path, read_rows(path), _conversation)


def _conversation(row: Row) -> Conversation:
    if "messages" not in row.values:
        prompt = _text(row, ("prompt", "instruction"), "messages or prompt")
        if (further := row.values.get("input")) and isinstance(further, str):
            prompt = f"{prompt}\n\n{further}"
        completion = _text(row, ("completion", "response", "output"), "completion")
        return Conversation((Message("user", prompt), Message("assistant", completion)))
    given = row.values["messages"]
    if not isinstance(given, list) or not given:
        raise ValueError(f"{row.where}: messages must be a list of at least one, found {str(given)[:60]}")
    messages = tuple(_message(row, number, message) for number, message in enumerate(given))
    if not any(message.role == "assistant" for message in messages):
        raise ValueError(f"{row.where}: no message of the assistant; there is nothing to learn")
    return Conversation(messages)


def _message(row: Row, number: int, message: Any) -> Message:
    where = f"{row.where}, messages[{number}]"
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise ValueError(f"{where}: a message needs role and content; found {str(message)[:60]}")
    if message["role"] not in ROLES:
        raise ValueError(f"{where}: role {message['role']!r}; accepted are {', '.join(ROLES)}")
    return Message(message["role"], _checked_text(message["content"], where, "content"))


# --- Similar texts ----------------------------------------------------------------------------------------------------


def read_similar(path: Path) -> list[SimilarTexts]:
    """Tables and JSON lines with ``anchor`` (or ``query``, ``sentence1``, ``text``), ``positive`` (or ``sentence2``,
    ``pos``) and, if you have one, ``negative`` (or ``neg``).
    """
    return _examples(
        path,
        read_rows(path),
        lambda row: SimilarTexts(
            _text(row, ("anchor", "query", "sentence1", "text"), "anchor"),
            _text(row, ("positive", "sentence2", "pos"), "positive"),
            _text(row, ("negative", "neg"), "negative", required=False),
        ),
    )
