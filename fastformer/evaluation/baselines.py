"""Baselines to compare a task's metrics with: predictions made by counting or copying, without any training.

They have the same form as a model's predictions, so the same metrics judge both. Counts come from the training examples
alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fastformer.data.pretraining.corpus import split_sentences
from fastformer.evaluation.perplexity import corpus_perplexity

Value = TypeVar("Value", str, int, float)

_WORD = re.compile(r"\w+")
_MOST_WORDS = 4096


def commonest(values: Iterable[Value]) -> Value:
    """The most frequent value, such as the majority class; the first one if several are equally frequent."""
    counts = Counter(values)
    if not counts:
        raise ValueError("values are empty: there is no commonest one")
    return counts.most_common(1)[0][0]


def commonest_tags(
    words: Sequence[Sequence[str]], tags: Sequence[Sequence[str]], new: Sequence[Sequence[str]]
) -> list[list[str]]:
    """Tag each word of the `new` sentences with its most frequent tag in `words`; "O" if it does not occur there."""
    counts: dict[str, Counter[str]] = {}
    for sentence, of_sentence in zip(words, tags, strict=True):
        for word, tag in zip(sentence, of_sentence, strict=True):
            counts.setdefault(word, Counter())[tag] += 1
    likeliest = {word: commonest(of_word.elements()) for word, of_word in counts.items()}
    return [[likeliest.get(word, "O") for word in sentence] for sentence in new]


def sentence_asked_about(question: str, context: str) -> str:
    """The sentence of the context that shares most words with the question; the first one if several are equal."""
    asked = _words(question)
    sentences = [sentence for line in context.splitlines() for sentence in split_sentences(line)]
    return max(sentences, key=lambda sentence: len(asked & _words(sentence)), default="")


def first_sentence(text: str) -> str:
    """The first sentence of a text: a simple summary of a text that begins with its main point."""
    return next(iter(split_sentences(text)), "")


def typical_text(texts: Sequence[str]) -> str:
    """The text that is nearest, as a bag of words, to the mean of all texts: a prediction that ignores the input."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.preprocessing import normalize

    if not any(map(_words, texts)):
        return commonest(texts)
    rows = normalize(CountVectorizer(token_pattern=_WORD.pattern, max_features=_MOST_WORDS).fit_transform(texts))
    return texts[int((rows @ np.asarray(rows.mean(axis=0)).ravel()).argmax())]


def word_vectors(known: Sequence[str], texts: Sequence[str]) -> NDArray[np.float64]:
    """The tf-idf vectors of `texts`, (texts, words), for the 4,096 most frequent words of the `known` texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(map(_words, known)):
        return np.zeros((len(texts), 1))
    counted = TfidfVectorizer(token_pattern=_WORD.pattern, max_features=_MOST_WORDS, sublinear_tf=True).fit(known)
    return np.asarray(counted.transform(texts).toarray())


def unigram_perplexity(known: Iterable[int], tokens: Sequence[int], vocab_size: int) -> float:
    """Perplexity of `tokens` when each is predicted by its frequency among the `known` tokens alone.

    Every token of the vocabulary counts once more than it occurs (Laplace's rule).
    """
    counts = np.ones(vocab_size)
    np.add.at(counts, np.fromiter(known, np.int64), 1)
    return corpus_perplexity([float(np.log(counts / counts.sum())[list(tokens)].sum())], [len(tokens)])


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
