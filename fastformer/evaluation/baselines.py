"""What a task's metrics have to be compared with: predictions that counting or copying makes, without any training.

They are of the kind that a model predicts, so that the same metrics judge both. What is counted is counted in the
training examples alone.
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
    """The value there is most of: a majority class, the most frequent translation. Of several the first."""
    counts = Counter(values)
    if not counts:
        raise ValueError("values are empty: there is no commonest one")
    return counts.most_common(1)[0][0]


def commonest_tags(
    words: Sequence[Sequence[str]], tags: Sequence[Sequence[str]], new: Sequence[Sequence[str]]
) -> list[list[str]]:
    """Of each word of the `new` sentences the tag that it most often has; "O" for a word that is in none of `words`."""
    counts: dict[str, Counter[str]] = {}
    for sentence, of_sentence in zip(words, tags, strict=True):
        for word, tag in zip(sentence, of_sentence, strict=True):
            counts.setdefault(word, Counter())[tag] += 1
    likeliest = {word: commonest(of_word.elements()) for word, of_word in counts.items()}
    return [[likeliest.get(word, "O") for word in sentence] for sentence in new]


def sentence_asked_about(question: str, context: str) -> str:
    """The sentence of the context that has most words of the question; of several the first."""
    asked = _words(question)
    sentences = [sentence for line in context.splitlines() for sentence in split_sentences(line)]
    return max(sentences, key=lambda sentence: len(asked & _words(sentence)), default="")


def first_sentence(text: str) -> str:
    """How a text begins: a summary of what leads with the main thing."""
    return next(iter(split_sentences(text)), "")


def typical_text(texts: Sequence[str]) -> str:
    """The text that, as a bag of words, is nearest to the mean of all: what to say where nothing is known."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.preprocessing import normalize

    if not any(map(_words, texts)):
        return commonest(texts)
    rows = normalize(CountVectorizer(token_pattern=_WORD.pattern, max_features=_MOST_WORDS).fit_transform(texts))
    return texts[int((rows @ np.asarray(rows.mean(axis=0)).ravel()).argmax())]


def word_vectors(known: Sequence[str], texts: Sequence[str]) -> NDArray[np.float64]:
    """(texts, words) tf-idf of the commonest 4,096 words of the `known` texts."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(map(_words, known)):
        return np.zeros((len(texts), 1))
    counted = TfidfVectorizer(token_pattern=_WORD.pattern, max_features=_MOST_WORDS, sublinear_tf=True).fit(known)
    return np.asarray(counted.transform(texts).toarray())


def unigram_perplexity(known: Iterable[int], tokens: Sequence[int], vocab_size: int) -> float:
    """Of tokens, each by itself, by how often it is among the `known` ones, where each of the vocabulary counts one
    more (Laplace's rule)."""
    counts = np.ones(vocab_size)
    np.add.at(counts, np.fromiter(known, np.int64), 1)
    return corpus_perplexity([float(np.log(counts / counts.sum())[list(tokens)].sum())], [len(tokens)])


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
