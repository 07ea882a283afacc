"""The command ``fastformer evaluate``: compute the metrics of predictions in a file of JSON lines."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastformer.arguments import CommandParser
from fastformer.console import Table
from fastformer.evaluation.prediction_file import TASKS, evaluate_file
from fastformer.files import OVERWRITE_HELP, atomic_file, check_out

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
    predictions, confusion = Path(options.predictions), None
    if options.output is not None:
        written = [Path(options.output) / _METRICS]
        if options.task == "classify":
            confusion = Path(options.output) / _CONFUSION
            written.append(confusion)
        check_out(written, options.overwrite, {"PREDICTIONS.jsonl": [predictions]}, "--output")
    report = evaluate_file(predictions, options.task, language=options.language, confusion=confusion)
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
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--language", help="target language of translations: zh, ja and ko are compared by characters")
    parser.add_argument("--output", metavar="DIR", help="write metrics.json here, and for classes confusion.png")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


def _print(report: dict[str, Any], output: str | None) -> None:
    rows = [
        (name.replace("_", " "), f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
        for name, value in report.items()
        if name not in ("task", "examples")
    ]
    print(Table(("metric", "value"), rows, "lr", title=f"{report['task']}, {report['examples']:,} examples"))
    if output is not None:
        print(f"written to {output}")
