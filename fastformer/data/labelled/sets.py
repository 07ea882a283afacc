"""All labelled sets by name: some need no download, others are fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastformer.data.labelled import defaults
from fastformer.data.labelled.examples import ClassifiedText, SourceTarget, Splits
from fastformer.data.labelled.fetch import PACKAGES, files_of, read_records, set_folder

Task = Literal["classify", "tag", "qa", "summarize", "translate", "generate", "embed"]

SENTIMENT_DOMAINS = ("film", "product", "editorial", "tweets")
_NEUTRAL_BELOW = 0.5


@dataclass(frozen=True)
class LabelledSet:
    """A labelled set and the task it is made for.

    Attributes:
        task: the task.
        description: the set in one line.
        licence: licence of its texts.
        load: reads the set, given the cache folder and the language (only translations use the language).
    """

    task: Task
    description: str
    licence: str
    load: Callable[[str | None, str], Splits[Any]]


def sentiment(
    cache_dir: str | None = None, domains: Sequence[str] = SENTIMENT_DOMAINS, classes: Literal[2, 3] = 3
) -> Splits[ClassifiedText]:
    """Return sentences rated by people as negative, neutral or positive; a review is never divided between splits.

    A mean rating, from -4 to 4, counts as neutral if it is nearer to 0 than 0.5. Each text is there once.

    Args:
        cache_dir: see `fastformer.files.cache_folder`.
        domains: some of film, product, editorial and tweets.
        classes: 2 leaves neutral sentences out.

    Raises:
        FileNotFoundError: the set was not fetched.
    """
    rows = [
        {**row, "document": f"{domain} {row['document']}"}
        for domain in domains
        for row in read_records("vader-sentiment", domain, cache_dir)
    ]
    texts: dict[str, dict[str, Any]] = {}
    for row in rows:
        texts.setdefault(" ".join(row["text"].split()), row)
    found = [
        (row["document"], ClassifiedText(text, None, label))
        for text, row in texts.items()
        if (label := _sentiment_label(row["rating"])) != "neutral" or classes == 3
    ]
    return defaults.split_by(found, lambda pair: pair[0]).map(lambda pair: pair[1])


def _sentiment_label(rating: float) -> str:
    if abs(rating) < _NEUTRAL_BELOW:
        return "neutral"
    return "positive" if rating > 0 else "negative"


def messages(name: str, language: str, cache_dir: str | None = None) -> Splits[SourceTarget]:
    """Return a fetched set's messages in English and another language; a message has the same split in every language.

    Raises:
        FileNotFoundError: the set was not fetched, or has no such language.
    """
    pairs = [SourceTarget(**row) for row in read_records(name, language, cache_dir)]
    return defaults.split_messages(pairs)


_PYTHON = "PSF-2.0"

SETS: dict[str, LabelledSet] = {
    "python-classes": LabelledSet(
        "classify",
        "paragraphs of Python's documentation; the class is one of eight parts of Python",
        _PYTHON,
        lambda cache, _: defaults.default_classes(cache),
    ),
    "vader-sentiment": LabelledSet(
        "classify",
        "sentences about films and products, from editorials and tweets; rated negative, neutral or positive by people",
        PACKAGES["vader-sentiment"].licence,
        lambda cache, _: sentiment(cache),
    ),
    "python-tags": LabelledSet(
        "tag",
        "sentences of Python's documentation; the tags mark words that are code",
        _PYTHON,
        lambda cache, _: defaults.default_tags(cache),
    ),
    "python-questions": LabelledSet(
        "qa",
        "what functions return, when they raise, what arguments default to; answers are spans of the documentation",
        _PYTHON,
        lambda cache, _: defaults.default_questions(cache),
    ),
    "python-summaries": LabelledSet(
        "summarize",
        "bodies of docstrings and their first lines",
        _PYTHON,
        lambda cache, _: defaults.default_summaries(cache),
    ),
    "messages": LabelledSet(
        "translate",
        "messages of this machine's programs in another language; numbers in German words if there are no messages",
        "those of the programs",
        lambda _, language: defaults.default_translations(language),
    ),
    "django-messages": LabelledSet(
        "translate",
        "messages of Django in a hundred languages",
        PACKAGES["django-messages"].licence,
        lambda cache, language: messages("django-messages", language, cache),
    ),
    "sphinx-messages": LabelledSet(
        "translate",
        "messages of Sphinx in sixty languages",
        PACKAGES["sphinx-messages"].licence,
        lambda cache, language: messages("sphinx-messages", language, cache),
    ),
    "python-conversations": LabelledSet(
        "generate",
        "questions about the standard library, answered by its documentation",
        _PYTHON,
        lambda cache, _: defaults.default_conversations(cache),
    ),
    "python-similar": LabelledSet(
        "embed",
        "first lines of docstrings and their bodies, which are about the same",
        _PYTHON,
        lambda cache, _: defaults.default_similar(cache),
    ),
}

DEFAULT_SETS: dict[Task, str] = {
    "classify": "python-classes",
    "tag": "python-tags",
    "qa": "python-questions",
    "summarize": "python-summaries",
    "translate": "messages",
    "generate": "python-conversations",
    "embed": "python-similar",
}
"""The default set of each task; none needs a download."""


def load_set(name: str, cache_dir: str | None = None, language: str = "de") -> Splits[Any]:
    """Load a set by name.

    Args:
        name: one of `SETS`.
        cache_dir: see `fastformer.files.cache_folder`.
        language: for translations, the language to translate into.

    Raises:
        ValueError: there is no such set.
        FileNotFoundError: the set was not fetched, or has no such language.
    """
    return named_set(name).load(cache_dir, language)


def named_set(name: str) -> LabelledSet:
    """Return the set of this name; raise ValueError if there is none."""
    if name not in SETS:
        raise ValueError(f"there is no set {name!r}; there are {', '.join(SETS)}")
    return SETS[name]


def languages(name: str, cache_dir: str | None = None) -> list[str]:
    """Return the languages of a fetched set of translations."""
    return files_of(name, cache_dir)


def is_here(name: str, cache_dir: str | None = None) -> bool:
    """Whether a set can be loaded without being fetched first."""
    return name not in PACKAGES or set_folder(name, cache_dir).exists()
