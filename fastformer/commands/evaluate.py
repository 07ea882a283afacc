"""The command ``fastformer evaluate``: compute the metrics of predictions in a file of JSON lines."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastformer.arguments import CommandParser
from fastformer.console import Table
from fastformer.data.labelled.readers import Row, read_rows
from fastformer.evaluation.classification import classification_metrics, draw_confusion, regression_metrics
from fastformer.evaluation.embedding import retrieval_metrics
from fastformer.evaluation.perplexity import corpus_perplexity
from fastformer.evaluation.question_answering import answer_metrics
from fastformer.evaluation.summarization import summary_metrics
from fastformer.evaluation.tagging import tagging_metrics
from fastformer.evaluation.translation import translation_metrics
from fastformer.files import OVERWRITE_HELP, atomic_file, check_out

Metrics = dict[str, float]

_BOTH = ("prediction", "reference")
_METRICS, _CONFUSION = "metrics.json", "confusion.png"

_EPILOG = """\
fields that each line of PREDICTIONS.jsonl needs; other fields are ignored:
  classify              prediction, reference: names of classes, or numbers for regression
  tag                   prediction, reference: lists of tags, one for each word
  qa                    prediction: text, "" for no answer; references: list of texts, empty for no answer
  summarize, translate  prediction, reference: texts
  generate              log_likelihood: of the answer, in nats; tokens: number of tokens of the answer; optionally, for
                        ROUGE, prediction and reference: texts
  embed                 embedding, positive: vectors of the two texts, lists of equally many numbers

examples:
  fastformer evaluate runs/classify/predictions.jsonl --task classify --output runs/classify/evaluation
  fastformer evaluate predictions.jsonl --task translate --language ja --json
"""


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer evaluate``.

    Args:
        arguments: the command line after ``evaluate``.
        begin: `time.monotonic()` when the command started.

    Raises:
        ValueError, OSError: the user's input is wrong.
    """
    options = _parser().parse_args(arguments)
    if options.language is not None and options.task != "translate":
        raise ValueError(f"--language is for --task translate, not {options.task}")
    if options.output is not None:
        written = [Path(options.output) / name for name in (_METRICS, _CONFUSION)[: 1 + (options.task == "classify")]]
        check_out(written, options.overwrite, {"PREDICTIONS.jsonl": [Path(options.predictions)]}, "--output")
    rows = list(read_rows(Path(options.predictions)))
    if not rows:
        raise ValueError(f"{options.predictions} holds no predictions")
    metrics = _TASKS[options.task](rows, options)
    report = {"task": options.task, "examples": len(rows), **metrics}
    if options.output is not None:
        with atomic_file(Path(options.output) / _METRICS) as file:
            file.write(json.dumps(report, indent=2).encode() + b"\n")
    if options.json:
        print(json.dumps(report))
    else:
        _print(report, options.output)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="fastformer evaluate",
        description="Compute the metrics of predictions compared with their references.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("predictions", metavar="PREDICTIONS.jsonl", help="the file that `fastformer predict` writes")
    parser.add_argument("--task", choices=tuple(_TASKS), required=True)
    parser.add_argument("--language", help="target language of translations: zh, ja and ko are compared by characters")
    parser.add_argument("--output", metavar="DIR", help="write metrics.json here, and for classes confusion.png")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _field(row: Row, name: str, kind: type | tuple[type, ...], what: str) -> Any:
    """Return a field of a row after checking its type, and that a number is finite."""
    value = row.values.get(name)
    if not isinstance(value, kind) or isinstance(value, bool) or not _is_finite(value):
        found = f"found {value!r:.60}" if name in row.values else f"found fields {', '.join(row.values)}"
        raise ValueError(f"{row.where}: {name} must be {what}; {found}")
    return value


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, (int, float)) or math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False


def _list(row: Row, name: str, what: str) -> list[str]:
    """Return a field that is a list of texts."""
    values: list[str] = _field(row, name, list, what)
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{row.where}: {name} must be {what}; found {value!r:.60} in it")
    return values


def _texts(rows: list[Row]) -> tuple[list[str], list[str]]:
    predictions, references = ([_field(row, n, str, "a text") for row in rows] for n in ("prediction", "reference"))
    return predictions, references


def _classify(rows: list[Row], options: argparse.Namespace) -> Metrics:
    score = next((row for row in rows for name in _BOTH if isinstance(row.values.get(name), float)), None)
    numeric = score is not None
    kind: tuple[type, ...] = (int, float) if numeric else (str, int)
    what = "the name of a class" if score is None else f"a number, because other lines have scores, as {score.where}"
    predictions, references = ([_field(row, n, kind, what) for row in rows] for n in _BOTH)
    if numeric:
        return regression_metrics(predictions, references)
    names = list(map(str, predictions)), list(map(str, references))
    if options.output is not None:
        draw_confusion(*names, Path(options.output) / _CONFUSION)
    return classification_metrics(*names)


def _tag(rows: list[Row], options: argparse.Namespace) -> Metrics:
    predictions, references = (
        [_list(row, name, "a list of tags") for row in rows] for name in ("prediction", "reference")
    )
    for row, predicted, expected in zip(rows, predictions, references, strict=True):
        if not all(predicted) or not all(expected):
            raise ValueError(f"{row.where}: a tag is empty; accepted are B-X, I-X and O")
        if len(predicted) != len(expected):
            raise ValueError(
                f"{row.where}: found {len(predicted)} tags as prediction and {len(expected)} as reference; there must "
                "be one of each for each word"
            )
    return tagging_metrics(predictions, references)


def _answer(rows: list[Row], options: argparse.Namespace) -> Metrics:
    return answer_metrics(
        [_field(row, "prediction", str, 'a text, "" for no answer') for row in rows],
        [_list(row, "references", "a list of texts") for row in rows],
    )


def _generate(rows: list[Row], options: argparse.Namespace) -> Metrics:
    likelihoods = [_field(row, "log_likelihood", (int, float), "a number, in nats") for row in rows]
    tokens = [_field(row, "tokens", int, "a whole number") for row in rows]
    for row, count in zip(rows, tokens, strict=True):
        if count < 0:
            raise ValueError(f"{row.where}: tokens must be 0 or more; found {count}")
    metrics: Metrics = {"perplexity": corpus_perplexity(likelihoods, tokens), "tokens": sum(tokens)}
    if all("prediction" in row.values for row in rows):
        metrics |= summary_metrics(*_texts(rows))
    return metrics


def _embed(rows: list[Row], options: argparse.Namespace) -> Metrics:
    anchors, positives = ([_vector(row, name) for row in rows] for name in ("embedding", "positive"))
    size = len(anchors[0])
    for row, *vectors in zip(rows, anchors, positives, strict=True):
        for name, vector in zip(("embedding", "positive"), vectors, strict=True):
            if len(vector) != size:
                raise ValueError(
                    f"{row.where}: {name} must have {size} numbers, like the first line's; it has {len(vector)}"
                )
    return retrieval_metrics(anchors, positives)


def _vector(row: Row, name: str) -> list[float]:
    vector = _field(row, name, list, "a list of numbers")
    kinds = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in vector)
    if not vector or not kinds or not all(map(_is_finite, vector)):
        raise ValueError(f"{row.where}: {name} must be a list of finite numbers; found {vector!r:.60}")
    return vector


_TASKS: dict[str, Callable[[list[Row], argparse.Namespace], Metrics]] = {
    "classify": _classify,
    "tag": _tag,
    "qa": _answer,
    "summarize": lambda rows, options: summary_metrics(*_texts(rows)),
    "translate": lambda rows, options: translation_metrics(*_texts(rows), language=options.language),
    "generate": _generate,
    "embed": _embed,
}


def _print(report: dict[str, Any], output: str | None) -> None:
    rows = [
        (name.replace("_", " "), f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
        for name, value in report.items()
        if name not in ("task", "examples")
    ]
    print(Table(("metric", "value"), rows, "lr", title=f"{report['task']}, {report['examples']:,} examples"))
    if output is not None:
        print(f"written to {output}")
