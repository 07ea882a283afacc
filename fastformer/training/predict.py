"""The command ``fastformer predict``: what a fine-tuned model makes of examples, as JSON lines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from fastformer.console import printable
from fastformer.training.finetune import run_folder, write_predictions
from fastformer.training.prediction import Predictor
from fastformer.training.recipes import RECIPES, TextOptions
from fastformer.training.run import quieten

_DESCRIPTION = """\
The predictions of a model that `fastformer finetune` has trained, one JSON object a line, in the order of the examples.
Examples have the same layouts as for fine-tuning; what is to be predicted may be left out.

examples:
  fastformer predict runs/classify --data reviews.jsonl --out predictions.jsonl
  fastformer predict runs/summarize --data articles.source --beams 4 --out summaries.jsonl
"""


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer predict``.

    Args:
        arguments: those of the command line after ``predict``.
        begin: `time.monotonic()` when the command started.

    Raises:
        ValueError, OSError: in what the user gave.
    """
    quieten()
    options = _parser().parse_args(arguments)
    task, texts = _of_run(Path(options.run))
    if options.beams is not None:
        texts["beams"] = options.beams
    examples = RECIPES[task].read(Path(options.data), TextOptions(**texts))  # before the model: it may be refused
    predictor = Predictor.load(
        run_folder(Path(options.run)).model,
        task,
        TextOptions(**texts),
        options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        options.tokens_per_batch,
    )
    examples = predictor.recipe.to_predict(examples, predictor.recipe.labels)
    write_predictions(Path(options.out), predictor.recipe.lines(predictor(examples), examples))
    print(printable(f"{len(examples):,} predictions in {options.out}"), file=sys.stderr)


def _of_run(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The task of a run, and its options of texts.

    Raises:
        FileNotFoundError, ValueError: it is no finished fine-tuning run.
    """
    run = run_folder(folder)
    if not run.config.is_file():
        raise FileNotFoundError(f"{folder} is no fine-tuning run: it has no {run.config.name}")
    options = yaml.safe_load(run.config.read_text())
    if options.get("task") not in RECIPES:
        raise ValueError(f"{folder} is no fine-tuning run: its {run.config.name} names no task")
    if not run.model.is_dir():
        raise FileNotFoundError(f"{folder} has no {run.model.name}: the run is not finished")
    return options["task"], options["text"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastformer predict", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="DIR", help="the output folder of a fine-tuning run")
    parser.add_argument("--data", required=True, metavar="FILE", help="examples")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="for the predictions; replaced, whole or not at all"
    )
    parser.add_argument("--beams", type=int, metavar="N", help="of beam search, where text is generated")
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda if there is one")
    parser.add_argument("--tokens_per_batch", type=int, default=4096, metavar="N", help="the most tokens in a batch")
    return parser
