"""The recipe of each fine-tuning task: its data, its module, and the meaning of its outputs."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, Literal

from scipy.special import softmax
from transformers import PreTrainedTokenizerFast

from fastformer.arguments import check_text
from fastformer.data.labelled import readers
from fastformer.data.labelled.answers import best_answers
from fastformer.data.labelled.collation import collate, collate_pairs, collate_similar
from fastformer.data.labelled.examples import Examples, place_of
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
    without_hidden_labels,
    word_tags,
)
from fastformer.data.packing import IGNORE_INDEX
from fastformer.data.pretraining.tokenizer import Objective
from fastformer.evaluation import (
    answer_metrics,
    baselines,
    classification_metrics,
    corpus_perplexity,
    draw_confusion,
    regression_metrics,
    retrieval_metrics,
    summary_metrics,
    tagging_metrics,
    translation_metrics,
)
from fastformer.training.finetuning import (
    Batch,
    Classification,
    Embedding,
    FineTuning,
    Generation,
    QuestionAnswering,
    Tagging,
)


@dataclass(frozen=True)
class TextOptions:
    """Options for turning texts into tokens, and tokens into texts.

    Args:
        max_length: tokens of the longest sequence (for summarize and translate, of the longest source). Longer texts
            are cut, or for qa divided into windows. Unless given, it is reduced to the positions of the model.
        max_target_length: tokens of the longest target, and of generated text. Unless given, it is reduced to the
            positions of the model.
        stride: tokens that two windows of a context share (qa).
        prefix: text put before each source (T5's "summarize: ").
        languages: source and target language of translations, named as files in WMT's layout name them.
        no_answer: whether some questions have no answer in their context (SQuAD 2.0).
        beams: number of beams in beam search; 1 for greedy decoding.

    Raises:
        ValueError: the prefix is not UTF-8.
    """

    max_length: int = 128
    max_target_length: int = 64
    stride: int = 32
    prefix: str = ""
    languages: tuple[str, str] = ("en", "de")
    no_answer: bool = False
    beams: int = 1

    def __post_init__(self) -> None:
        check_text(self.prefix, "--text.prefix")


@dataclass(frozen=True)
class Recipe(ABC):
    """The parts of a fine-tuning run that depend on the task: reading, tokenizing, predicting and measuring.

    Args:
        options: the text options.
        tokenizer: the model's tokenizer.
        config: the model's configuration.
        form: the form of the model's batches.
        labels: the names of the classes or tags; None for tasks without labels, and for regression.
    """

    options: TextOptions
    tokenizer: PreTrainedTokenizerFast
    config: Any
    form: Literal["packed", "dense"]
    labels: Sequence[str] | None = None

    module: ClassVar[type[FineTuning]]
    tokenizer_objective: ClassVar[Objective] = "mlm"

    @staticmethod
    @abstractmethod
    def read(path: Path, options: TextOptions, targets: bool = False) -> Examples[Any]:
        """Read the examples of a file; with `targets`, each must have its label, answer or target."""

    @staticmethod
    def names(example: Any) -> Collection[str]:
        """Return the classes or tags of an example."""
        return ()

    @staticmethod
    @abstractmethod
    def input_of(example: Any) -> Hashable:
        """Return the input of an example; examples with the same input are never in different splits."""

    @staticmethod
    def label_names(examples: Sequence[Any]) -> list[str] | None:
        """Return the names of the classes or tags of training examples; None if the task has none."""
        return None

    @staticmethod
    def to_predict(examples: Examples[Any], labels: Sequence[str] | None) -> Examples[Any]:
        """Remove labels that only mark a hidden label from test examples; `labels` are those of training."""
        return examples

    def check(self, examples: Sequence[Any]) -> None:
        """Raise ValueError if examples cannot be predicted and measured."""
        self.features(examples)

    @staticmethod
    @abstractmethod
    def texts(example: Any) -> list[str]:
        """Return all texts of an example, to train a tokenizer on."""

    @abstractmethod
    def features(self, examples: Sequence[Any]) -> list[Any]:
        """Turn examples into features: tokens and labels."""

    def collate(self, features: Sequence[Any]) -> Batch:
        """Return a batch in the form that the model accepts."""
        return self._for_model(collate(features, self.form, self.tokenizer.pad_token_id))

    def length(self, feature: Any) -> int:
        """Return the number of tokens of a feature."""
        return len(feature.input_ids)

    @abstractmethod
    def predictions(
        self, outputs: Sequence[Any], examples: Sequence[Any], features: Sequence[Any]
    ) -> list[dict[str, Any]]:
        """Return the prediction for each example, as the content of a line of JSON."""

    @abstractmethod
    def reference(self, example: Any) -> dict[str, Any]:
        """Return the right prediction in the fields that `fastformer evaluate` expects; empty if it is unknown."""

    @abstractmethod
    def metrics(self, lines: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return the metrics by name, from lines that have a prediction and its reference."""

    @abstractmethod
    def baselines(self, known: Sequence[Any], examples: Sequence[Any]) -> dict[str, dict[str, float]]:
        """Return the metrics of each trivial baseline, by the baseline's name.

        Args:
            known: training examples, to count in.
            examples: examples to predict, with known answers.
        """

    def lines(self, predictions: Sequence[dict[str, Any]], examples: Sequence[Any]) -> list[dict[str, Any]]:
        """Return the predictions with their references, as they are written to a file."""
        return [
            {**prediction, **self.reference(example)} for prediction, example in zip(predictions, examples, strict=True)
        ]

    def _judged(self, predictions: Sequence[Any], examples: Sequence[Any]) -> dict[str, float]:
        """Return the metrics of a baseline's predictions."""
        return self.metrics(self.lines([{"prediction": prediction} for prediction in predictions], examples))

    def draw_confusion(self, lines: Sequence[dict[str, Any]], path: Path) -> bool:
        """Draw the confusion matrix into a PNG file; return False if there are no classes."""
        return False

    def shown(self, example: Any) -> str:
        """Return the input of an example, for a report."""
        return self.texts(example)[0]

    def _for_model(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Remove inputs that the model does not use: token types, if it has none."""
        if self.form == "packed" and not self.config.type_vocab_size:
            batch.pop("token_type_ids", None)
        return batch


class Classify(Recipe):
    """The recipe for texts or pairs of texts with a class, or a number."""

    module = Classification

    @staticmethod
    def read(path: Path, options: TextOptions, targets: bool = False) -> Examples[Any]:
        return readers.read_classification(path, targets=targets)

    @staticmethod
    def input_of(example: Any) -> Hashable:
        return example.text, example.second

    @staticmethod
    def names(example: Any) -> Collection[str]:
        return [example.label] if isinstance(example.label, str) else ()

    @staticmethod
    def label_names(examples: Sequence[Any]) -> list[str] | None:
        return label_names(examples)

    @staticmethod
    def to_predict(examples: Examples[Any], labels: Sequence[str] | None) -> Examples[Any]:
        return without_hidden_labels(examples, labels or ())

    @staticmethod
    def texts(example: Any) -> list[str]:
        return [example.text] if example.second is None else [example.text, example.second]

    def features(self, examples: Sequence[Any]) -> list[Any]:
        return classification_features(examples, self.tokenizer, self.options.max_length, self.labels)

    def predictions(
        self, outputs: Sequence[Any], examples: Sequence[Any], features: Sequence[Any]
    ) -> list[dict[str, Any]]:
        if self.labels is None:
            return [{"prediction": float(value[0])} for value in outputs]
        probabilities = [softmax(logits) for logits in outputs]
        return [
            {
                "prediction": self.labels[int(of_one.argmax())],
                "probabilities": dict(zip(self.labels, of_one.tolist(), strict=True)),
            }
            for of_one in probabilities
        ]

    def reference(self, example: Any) -> dict[str, Any]:
        return {} if example.label is None else {"reference": example.label}

    def metrics(self, lines: Sequence[dict[str, Any]]) -> dict[str, float]:
        predicted, expected = _columns(lines, "prediction", "reference")
        return (regression_metrics if self.labels is None else classification_metrics)(predicted, expected)

    def baselines(self, known: Sequence[Any], examples: Sequence[Any]) -> dict[str, dict[str, float]]:
        labels = [example.label for example in known]
        if self.labels is None:
            return {"the mean": self._judged([fmean(labels)] * len(examples), examples)}
        return {"the commonest class": self._judged([baselines.commonest(labels)] * len(examples), examples)}

    def draw_confusion(self, lines: Sequence[dict[str, Any]], path: Path) -> bool:
        if self.labels is None:
            return False
        predicted, expected = _columns(lines, "prediction", "reference")
        draw_confusion(predicted, expected, path)
        return True


class Tag(Recipe):
    """The recipe for words with tags."""

    module = Tagging

    @staticmethod
    def read(path: Path, options: TextOptions, targets: bool = False) -> Examples[Any]:
        return readers.read_tagging(path, targets=targets)

    @staticmethod
    def input_of(example: Any) -> Hashable:
        return example.words

    @staticmethod
    def names(example: Any) -> Collection[str]:
        return example.tags

    @staticmethod
    def label_names(examples: Sequence[Any]) -> list[str] | None:
        return tag_names(examples)

    @staticmethod
    def texts(example: Any) -> list[str]:
        return [" ".join(example.words)]

    def features(self, examples: Sequence[Any]) -> list[Any]:
        assert self.labels is not None
        return tagging_features(examples, self.tokenizer, self.options.max_length, self.labels)

    def predictions(
        self, outputs: Sequence[Any], examples: Sequence[Any], features: Sequence[Any]
    ) -> list[dict[str, Any]]:
        assert self.labels is not None
        return [
            {"prediction": word_tags(feature, logits.argmax(-1).tolist(), self.labels)}
            for feature, logits in zip(features, outputs, strict=True)
        ]

    def reference(self, example: Any) -> dict[str, Any]:
        return {} if example.tags is None else {"reference": list(example.tags)}

    def metrics(self, lines: Sequence[dict[str, Any]]) -> dict[str, float]:
        return tagging_metrics(*_columns(lines, "prediction", "reference"))

    def baselines(self, known: Sequence[Any], examples: Sequence[Any]) -> dict[str, dict[str, float]]:
        words, tags = [example.words for example in known], [example.tags for example in known]
        predicted = baselines.commonest_tags(words, tags, [example.words for example in examples])
        return {"each word's commonest tag": self._judged(predicted, examples)}


class AnswerQuestions(Recipe):
    """The recipe for questions whose answers are spans of a context."""

    module = QuestionAnswering

    @staticmethod
    def read(path: Path, options: TextOptions, targets: bool = False) -> Examples[Any]:
        return readers.read_questions(path, targets=targets)

    @staticmethod
    def input_of(example: Any) -> Hashable:
        return example.context

    @staticmethod
    def texts(example: Any) -> list[str]:
        return [example.question, example.context]

    def features(self, examples: Sequence[Any]) -> list[Any]:
        tells_matches = self.form == "packed" and self.config.type_vocab_size > MATCH_TYPE
        return question_features(
            examples, self.tokenizer, self.options.max_length, self.options.stride, mark_matches=tells_matches
        )

    def predictions(
        self, outputs: Sequence[Any], examples: Sequence[Any], features: Sequence[Any]
    ) -> list[dict[str, Any]]:
        starts, ends = ([logits[:, side] for logits in outputs] for side in (0, 1))
        ranked = best_answers(examples, features, starts, ends, no_answer=self.options.no_answer)
        return [
            {"id": example.id, "prediction": best[0].text, "score": best[0].score}
            for example, best in zip(examples, ranked, strict=True)
        ]

    def reference(self, example: Any) -> dict[str, Any]:
        return {} if example.answers is None else {"references": [answer.text for answer in example.answers]}

    def metrics(self, lines: Sequence[dict[str, Any]]) -> dict[str, float]:
        return answer_metrics(*_columns(lines, "prediction", "references"))

    def baselines(self, known: Sequence[Any], examples: Sequence[Any]) -> dict[str, dict[str, float]]:
        sentences = [baselines.sentence_asked_about(example.question, example.context) for example in examples]
        return {"the sentence with most words of the question": self._judged(sentences, examples)}


class Rewrite(Recipe):
    """The recipe for sources and targets, such as summaries."""

    module = Generation
    tokenizer_objective: ClassVar[Objective] = "span-corruption"

    @staticmethod
    def read(path: Path, options: TextOptions, targets: bool = False) -> Examples[Any]:
        return readers.read_summaries(path, targets=targets)

    @staticmethod
    def input_of(example: Any) -> Hashable:
        return example.source

    @staticmethod
    def texts(example: Any) -> list[str]:
        return [text for text in (example.source, example.target) if text is not None]

    def features(self, examples: Sequence[Any]) -> list[Any]:
        options = self.options
        return pair_features(
            examples, self.tokenizer, options.max_length, options.max_target_length, prefix=options.prefix
        )

    def collate(self, features: Sequence[Any]) -> Batch:
        batch = collate_pairs(features, self.form, self.tokenizer.pad_token_id, self.config.decoder_start_token_id)
        batch.pop("position_ids", None)  # they follow from the packing
        return batch

    def length(self, feature: Any) -> int:
        return len(feature.source) + len(feature.target or ())

    def check(self, examples: Sequence[Any]) -> None:
        self.prompts(examples)

    def prompts(self, examples: Sequence[Any]) -> list[list[int]]:
        """Return the tokens from which each example's text is generated."""
        sources = [example._replace(target=None) for example in examples]
        return [feature.source for feature in self.features(sources)]

    def predictions(
        self, outputs: Sequence[Any], examples: Sequence[Any], features: Sequence[Any]
    ) -> list[dict[str, Any]]:
        texts = self.tokenizer.batch_decode(list(outputs), skip_special_tokens=True)
        return [{"prediction": text.strip()} for text in texts]

    def reference(self, example: Any) -> dict[str, Any]:
        return {} if example.target is None else {"reference": example.target}

    def metrics(self, lines: Sequence[dict[str, Any]]) -> dict[str, float]:
        return summary_metrics(*_columns(lines, "prediction", "reference"))

    def baselines(self, known: Sequence[Any], examples: Sequence[Any]) -> dict[str, dict[str, float]]:
        typical = baselines.typical_text([example.target for example in known])
        return {
            "the first sentence": self._judged([baselines.first_sentence(each.source) for each in examples], examples),
            "the most typical summary": self._judged([typical] * len(examples), examples),
        }


class Translate(Rewrite):
    """The recipe for sentences and their translations."""

    @staticmethod
    def read(path: Path, options: TextOptions, targets: bool = False) -> Examples[Any]:
        return readers.read_translations(path, *options.languages, targets=targets)

    def metrics(self, lines: Sequence[dict[str, Any]]) -> dict[str, float]:
        predicted, expected = _columns(lines, "prediction", "reference")
        return translation_metrics(predicted, expected, self.options.languages[1])

    def baselines(self, known: Sequence[Any], examples: Sequence[Any]) -> dict[str, dict[str, float]]:
        commonest = baselines.commonest(example.target for example in known)
        return {
            "the source as it is": self._judged([example.source for example in examples], examples),
            "the commonest translation": self._judged([commonest] * len(examples), examples),
        }


class Converse(Rewrite):
    """The recipe for conversations: it learns the assistant's messages, and predicts the last one."""

    tokenizer_objective = "clm"

    @staticmethod
    def read(path: Path, options: TextOptions, targets: bool = False) -> Examples[Any]:
        return readers.read_conversations(path)

    @staticmethod
    def input_of(example: Any) -> Hashable:
        return _before_the_answer(example).messages

    @staticmethod
    def texts(example: Any) -> list[str]:
        return [message.content for message in example.messages]

    def features(self, examples: Sequence[Any]) -> list[Any]:
        return conversation_features(examples, self.tokenizer, self.options.max_length)

    def collate(self, features: Sequence[Any]) -> Batch:
        return Recipe.collate(self, features)

    def length(self, feature: Any) -> int:
        return len(feature.input_ids)

    def check(self, examples: Sequence[Any]) -> None:
        super().check(examples)
        self.features(examples)

    def prompts(self, examples: Sequence[Any]) -> list[list[int]]:
        return [
            prompt_ids(_before_the_answer(example), self.tokenizer, place_of(examples, number))
            for number, example in enumerate(examples)
        ]

    def shown(self, example: Any) -> str:
        return "\n".join(f"{message.role}: {message.content}" for message in _before_the_answer(example).messages)

    def reference(self, example: Any) -> dict[str, Any]:
        last = example.messages[-1]
        return {"reference": last.content} if last.role == "assistant" else {}

    def metrics(self, lines: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return ROUGE of the generated text, and the perplexity of answers that begin within the longest sequence."""
        known = [line for line in lines if "log_likelihood" in line]
        perplexity = corpus_perplexity(*_columns(known, "log_likelihood", "tokens"))
        return {"perplexity": perplexity, **super().metrics(lines)}

    def baselines(self, known: Sequence[Any], examples: Sequence[Any]) -> dict[str, dict[str, float]]:
        answered, tokens = (list(self._answer_tokens(part)) for part in (known, examples))
        perplexity = baselines.unigram_perplexity(answered, tokens, len(self.tokenizer))
        answers = [reference["reference"] for example in known if (reference := self.reference(example))]
        typical = baselines.typical_text(answers)
        written = [{"prediction": typical} for _ in examples]
        return {
            "each token's frequency": {"perplexity": perplexity},
            "the most typical answer": super().metrics(self.lines(written, examples)),
        }

    def _answer_tokens(self, examples: Sequence[Any]) -> Iterator[int]:
        """Yield the labelled tokens of conversations, one conversation after another."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about cut texts: the warning came before training
            features = self.features(examples)
        return (label for feature in features for label in feature.labels if label != IGNORE_INDEX)


class Embed(Recipe):
    """The recipe for pairs of texts that mean about the same."""

    module = Embedding

    @staticmethod
    def read(path: Path, options: TextOptions, targets: bool = False) -> Examples[Any]:
        return readers.read_similar(path)

    @staticmethod
    def input_of(example: Any) -> Hashable:
        return example.anchor

    @staticmethod
    def texts(example: Any) -> list[str]:
        return [text for text in example if text is not None]

    def features(self, examples: Sequence[Any]) -> list[Any]:
        return similarity_features(examples, self.tokenizer, self.options.max_length)

    def collate(self, features: Sequence[Any]) -> Batch:
        batches = collate_similar(features, self.form, self.tokenizer.pad_token_id)
        return {side: self._for_model(batch) for side, batch in batches.items()}

    def length(self, feature: Any) -> int:
        sides = (feature.anchor, feature.positive, feature.negative)
        return sum(len(side.input_ids) for side in sides if side is not None)

    def predictions(
        self, outputs: Sequence[Any], examples: Sequence[Any], features: Sequence[Any]
    ) -> list[dict[str, Any]]:
        return [
            {"similarity": float(anchor @ positive), "embedding": anchor.tolist(), "positive": positive.tolist()}
            for anchor, positive in outputs
        ]

    def reference(self, example: Any) -> dict[str, Any]:
        return {"reference": example.positive}

    def metrics(self, lines: Sequence[dict[str, Any]]) -> dict[str, float]:
        return retrieval_metrics(*_columns(lines, "embedding", "positive"))

    def baselines(self, known: Sequence[Any], examples: Sequence[Any]) -> dict[str, dict[str, float]]:
        texts = [text for example in known for text in self.texts(example)]
        sides = [[example.anchor for example in examples], [example.positive for example in examples]]
        vectors = [baselines.word_vectors(texts, side) for side in sides]
        return {"tf-idf of words": retrieval_metrics(*vectors)}


RECIPES: dict[str, type[Recipe]] = {
    "classify": Classify,
    "tag": Tag,
    "qa": AnswerQuestions,
    "summarize": Rewrite,
    "translate": Translate,
    "generate": Converse,
    "embed": Embed,
}


def balanced_class_weights(recipe: Recipe, features: Sequence[Any]) -> list[float]:
    """Return for each class n / (classes · n of the class), so that every class has the same total weight.

    Raises:
        ValueError: the task has no classes, or a class has no target.
    """
    if recipe.labels is None:
        raise ValueError("--class_weights is for classes, but this task has none")
    counts: Counter[int] = Counter()
    for feature in features:
        of_one = feature.labels if isinstance(feature.labels, list) else [feature.labels]
        counts.update(label for label in of_one if label >= 0)
    if missing := [name for label, name in enumerate(recipe.labels) if not counts[label]]:
        raise ValueError(f"--class_weights balanced: no training example has {', '.join(missing)}")
    return [counts.total() / (len(recipe.labels) * counts[label]) for label in range(len(recipe.labels))]


def _columns(lines: Sequence[dict[str, Any]], *names: str) -> list[list[Any]]:
    return [[line[name] for line in lines] for name in names]


def _before_the_answer(example: Any) -> Any:
    """Return a conversation without its last message, if that is the assistant's."""
    messages = example.messages
    return example._replace(messages=messages[:-1] if messages[-1].role == "assistant" else messages)
