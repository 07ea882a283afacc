"""Labelled sets without a download: made from Python's documentation and from the machine's gettext catalogues.

People wrote the texts; rules find the labels, questions and answers in them. The split depends on the text only: 80 %
for training, 10 % for validation, 10 % for testing. A docstring is never divided between splits, and no text is there
twice.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

from fastformer.data.labelled.catalogues import installed_catalogues, number_translations, read_catalogues
from fastformer.data.labelled.examples import (
    Answer,
    ClassifiedText,
    Conversation,
    Message,
    Question,
    SimilarTexts,
    SourceTarget,
    Splits,
    TaggedWords,
)
from fastformer.data.pretraining.corpus import split_sentences
from fastformer.data.pretraining.python_documentation import (
    TOPICS,
    Docstring,
    prose_paragraphs,
    python_docstrings,
    python_fingerprint,
)
from fastformer.data.pretraining.splitting import document_key
from fastformer.files import cache_folder, read_checked, remove, write_checked

CacheFolder = str | os.PathLike[str] | None
Example = TypeVar("Example", bound=tuple)

_FORMAT = 1
_PARTS = 10
_DAMAGED = "{path} is damaged ({error}) and is rebuilt"


def docstrings(cache_dir: CacheFolder = None) -> list[Docstring]:
    """Return all documentation of this Python, no text twice, kept in the cache; a damaged copy is rebuilt."""
    path = cache_folder(cache_dir) / f"python-docstrings-{python_fingerprint()}-v{_FORMAT}.jsonl"
    if path.exists():
        try:
            return [Docstring(*json.loads(line)) for line in read_checked(path).splitlines()]
        except (OSError, ValueError, TypeError, RecursionError) as error:
            warnings.warn(_DAMAGED.format(path=path, error=error), stacklevel=2)
            remove(path)
    found = _once(python_docstrings(), lambda docstring: docstring.text)
    write_checked(path, "".join(json.dumps(docstring) + "\n" for docstring in found).encode())
    return found


def _once(items: Iterable[Example], text: Callable[[Example], str]) -> list[Example]:
    """Keep only the first item of each text; white space is not compared."""
    first: dict[int, Example] = {}
    for item in items:
        first.setdefault(document_key(text(item)), item)
    return list(first.values())


def split_by(examples: Iterable[Example], document: Callable[[Example], str]) -> Splits[Example]:
    """Split examples by a hash of their document: 8 tenths for training, 1 for validation, 1 for testing."""
    parts: tuple[list[Example], list[Example], list[Example]] = ([], [], [])
    for example in examples:
        part = document_key(document(example)) % _PARTS
        parts[part - (_PARTS - 3) if part >= _PARTS - 2 else 0].append(example)
    return Splits(*parts)


# --- Summaries --------------------------------------------------------------------------------------------------------


def default_summaries(cache_dir: CacheFolder = None) -> Splits[SourceTarget]:
    """Return the prose of docstrings' bodies (the sources) and their first lines (the summaries)."""
    return split_by(_summaries(docstrings(cache_dir)), lambda pair: pair.source)


def _summaries(found: Sequence[Docstring]) -> list[SourceTarget]:
    pairs = [SourceTarget(body, line) for docstring in found for line, body in _line_and_body(docstring)]
    return _once(_once(pairs, lambda pair: pair.source), lambda pair: pair.target or "")


def _line_and_body(docstring: Docstring) -> Iterator[tuple[str, str]]:
    """Yield the first line of a docstring and the prose of the rest, if it has both."""
    first, _, rest = docstring.text.partition("\n\n")
    line = prose_paragraphs(first)
    body = " ".join(prose_paragraphs(rest))
    if docstring.module != TOPICS and "\n" not in first and line == [first.strip()] and len(body.split()) >= 8:
        yield line[0], body


# --- Classes ----------------------------------------------------------------------------------------------------------

# fmt: off
_FAMILIES = {
    "language": (
        TOPICS, "_ast", "ast", "builtins", "codeop", "keyword", "symtable", "token", "tokenize", "types", "typing",
    ),
    "concurrency": (
        "_asyncio", "_queue", "_thread", "asyncio", "concurrent", "contextvars", "multiprocessing", "queue", "sched",
        "selectors", "subprocess", "threading",
    ),
    "networking": (
        "_socket", "_ssl", "ftplib", "http", "imaplib", "ipaddress", "nntplib", "poplib", "smtplib", "socket",
        "socketserver", "ssl", "telnetlib", "urllib", "wsgiref", "xmlrpc",
    ),
    "text": (
        "configparser", "csv", "difflib", "email", "encodings", "gettext", "html", "json", "mailbox", "plistlib", "re",
        "string", "textwrap", "tomllib", "unicodedata", "xml",
    ),
    "numbers": (
        "_decimal", "_pydecimal", "_random", "cmath", "decimal", "fractions", "math", "numbers", "random", "statistics",
    ),
    "files": (
        "_io", "_pyio", "fileinput", "genericpath", "glob", "gzip", "lzma", "ntpath", "os", "pathlib", "posix",
        "posixpath", "shutil", "tarfile", "tempfile", "zipfile",
    ),
    "interface": ("cmd", "curses", "idlelib", "tkinter", "turtle", "turtledemo"),
    "development": (
        "bdb", "cProfile", "dis", "distutils", "doctest", "importlib", "inspect", "pdb", "pkgutil", "profile", "pydoc",
        "pstats", "trace", "traceback", "unittest", "venv",
    ),
}
# fmt: on
_FAMILY_OF = {module: family for family, modules in _FAMILIES.items() for module in modules}


def default_classes(cache_dir: CacheFolder = None) -> Splits[ClassifiedText]:
    """Return paragraphs of documentation; the class is the part of Python they are about, one of eight."""
    found = [
        (docstring.text, ClassifiedText(paragraph, None, _FAMILY_OF[family]))
        for docstring in docstrings(cache_dir)
        if (family := docstring.module.split(".")[0]) in _FAMILY_OF
        for paragraph in prose_paragraphs(docstring.text)
        if len(paragraph.split()) >= 6
    ]
    once = _once(found, lambda pair: pair[1].text)
    return split_by(once, lambda pair: pair[0]).map(lambda pair: pair[1])


# --- Questions --------------------------------------------------------------------------------------------------------

_NEIGHBOURS = 4
_ASKED = tuple(
    (re.compile(pattern), question)
    for pattern, question in (
        (r"\bReturns? (?P<answer>[^.;]{8,120}?)(?=\.(?:\s|$))", "What does {name} return?"),
        (
            r"\b[Rr]aises? (?:an? )?`*(?P<exception>\w+(?:Error|Exception|Exit|Interrupt|Warning))`* (?:exception )?"
            r"(?:if|when|unless) (?P<answer>[^.;]{8,120}?)(?=\.)",
            "When does {name} raise {exception}?",
        ),
        (
            r"\b(?P<subject>[a-z]\w+) defaults to (?P<answer>[^.,;()]{1,60}?)(?=[.,;)])",
            "What is the default of {subject} in {name}?",
        ),
    )
)


def default_questions(cache_dir: CacheFolder = None) -> Splits[Question]:
    """Return questions on what functions return, when they raise and what their arguments default to.

    The answer is a part of the context. A context documents four neighbouring objects of a module, and the question
    names one of them. Two objects with the same documentation (a module in C and its twin in Python) are there once,
    and so are two questions with the same words and the same answer.
    """
    found = [d for d in docstrings(cache_dir) if d.name and d.module != TOPICS]
    found = _once(found, _prose)
    contexts = (
        list(context)
        for _, members in groupby(found, lambda docstring: docstring.module)
        for context in _groups(list(members), _NEIGHBOURS)
    )
    asked = [question for context in contexts for question in _questions(context)]
    once = _once(asked, lambda question: question.question + question.answers[0].text)  # type: ignore[index]
    return split_by(once, lambda question: question.context)


def _prose(docstring: Docstring) -> str:
    return " ".join(prose_paragraphs(docstring.text))


def _groups(items: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def _questions(members: Sequence[Docstring]) -> Iterator[Question]:
    context = ""
    places: list[tuple[str, int, int]] = []
    for member in members:
        if prose := _prose(member):
            context += f"{member.name}: "
            places.append((member.name, len(context), len(context) + len(prose)))
            context += f"{prose}\n"
    context = context.rstrip("\n")
    names = [name for name, _, _ in places]
    for name, begin, end in places:
        if names.count(name) > 1:  # it would not be clear which one is meant
            continue
        for pattern, question in _ASKED:
            matches = list(pattern.finditer(context, begin, end))
            if len(matches) == 1:
                match = matches[0]
                asked = question.format(name=name, **{**match.groupdict(), "answer": ""})
                identity = f"{document_key(context):016x}-{match.start('answer')}"
                yield Question(identity, asked, context, (Answer(match["answer"].rstrip(), match.start("answer")),))


# --- Tags -------------------------------------------------------------------------------------------------------------

_MARKED = re.compile(r"(?::\w+:)?(?:``|`)(?P<code>[^`\n]{1,60}?)(?:``|`)|\"(?P<quoted>[^\"\n]{1,60})\"")
_WORDS = re.compile(r"[\w.]*\w|[^\w\s]")


def default_tags(cache_dir: CacheFolder = None) -> Splits[TaggedWords]:
    """Return sentences of documentation; the tags say which words the authors marked as code.

    Tags are B-CODE, I-CODE and O. The marks themselves are removed from the text.
    """
    found = [
        (docstring.text, tagged)
        for docstring in docstrings(cache_dir)
        for paragraph in prose_paragraphs(docstring.text)
        for sentence in split_sentences(paragraph)
        if (tagged := _tagged(sentence, docstring.module == TOPICS)).tags is not None
    ]
    once = _once(found, lambda pair: " ".join(pair[1].words))
    return split_by(once, lambda pair: pair[0]).map(lambda pair: pair[1])


def _tagged(sentence: str, quotes_are_code: bool) -> TaggedWords:
    """Return the words of a sentence, with tags only if something in it is marked as code."""
    words: list[str] = []
    tags: list[str] = []

    def add(text: str, first: str, others: str) -> None:
        for number, word in enumerate(_WORDS.findall(text)):
            words.append(word)
            tags.append(others if number else first)

    place = 0
    for match in _MARKED.finditer(sentence):
        code = match["code"] or (match["quoted"] if quotes_are_code else None)
        if code is not None:
            add(sentence[place : match.start()], "O", "O")
            add(code, "B-CODE", "I-CODE")
            place = match.end()
    add(sentence[place:], "O", "O")
    is_marked = "B-CODE" in tags and "`" not in words  # a mark without a partner: unclear what it marks
    return TaggedWords(tuple(words), tuple(tags) if is_marked else None)


# --- Translations -----------------------------------------------------------------------------------------------------


def default_translations(language: str = "de") -> Splits[SourceTarget]:
    """Return English messages of this machine's programs and their translations (``de``, ``ja``, ``ar``, ``zh_CN``).

    Without a catalogue for German, the set has numbers in words instead.

    Raises:
        FileNotFoundError: there is no catalogue of the language, and the language is not German.
    """
    pairs = read_catalogues((str(path), path.read_bytes()) for path in installed_catalogues(language))
    if not pairs and language != "de":
        raise FileNotFoundError(
            f"this machine has no gettext catalogue of {language!r}; `fastformer data fetch django` has many languages"
        )
    return split_messages(pairs or number_translations())


def split_messages(pairs: Iterable[SourceTarget]) -> Splits[SourceTarget]:
    """Split translations; messages that differ only in case and punctuation share a split, in every language."""
    return split_by(pairs, lambda pair: "".join(re.findall(r"\w+", pair.source.casefold())))


# --- Conversations and similar texts ----------------------------------------------------------------------------------


def default_conversations(cache_dir: CacheFolder = None) -> Splits[Conversation]:
    """Return questions about the standard library, answered in the words of its documentation."""
    found = [
        Conversation((Message("user", _asks_for(docstring)), Message("assistant", paragraphs[0])))
        for docstring in docstrings(cache_dir)
        if (paragraphs := prose_paragraphs(docstring.text))
    ]
    once = _once(_once(found, lambda talk: talk.messages[0].content), lambda talk: talk.messages[1].content)
    return split_by(once, lambda talk: talk.messages[1].content)


def _asks_for(docstring: Docstring) -> str:
    if docstring.module == TOPICS:
        return f"What is said about {docstring.name!r} in Python's help?"
    if not docstring.name:
        return f"What is the module {docstring.module} for?"
    return f"What does {docstring.module}.{docstring.name} do?"


def default_similar(cache_dir: CacheFolder = None) -> Splits[SimilarTexts]:
    """Return the first lines of docstrings and the prose of their bodies, which mean about the same."""
    summaries = _summaries(docstrings(cache_dir))
    similar = [SimilarTexts(pair.target or "", pair.source, None) for pair in summaries]
    return split_by(similar, lambda pair: pair.positive)
