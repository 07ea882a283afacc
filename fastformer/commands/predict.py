"""The command ``fastformer predict``: predict with a fine-tuned model, and write JSON lines."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from fastformer.arguments import CommandParser, chosen_device, whole_number
from fastformer.console import printable
from fastformer.files import OVERWRITE_HELP, check_out
from fastformer.training.finetuning_run import run_folder, write_predictions
from fastformer.training.folder import RunFolder
from fastformer.training.option_files import read_options
from fastformer.training.prediction import Predictor
from fastformer.training.run import quieten
from fastformer.training.starting_point import Task
from fastformer.training.tasks import RECIPES, TextOptions
from fastformer.training.unused import WRITING

_DESCRIPTION = """\
Predict with a model that `fastformer finetune` has trained: one JSON object per line, in the order of the examples.
Examples have the same layouts as for fine-tuning; the field to be predicted may be left out.

examples:
  fastformer predict runs/classify --data reviews.jsonl --out predictions.jsonl
  fastformer predict runs/summarize --data articles.source --beams 4 --out summaries.jsonl
"""


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer predict``.

    Args:
        arguments: the command line after ``predict``.
        begin: `time.monotonic()` when the command started.

    Raises:
        ValueError, OSError: the user's input is wrong.
    """
    quieten()
    options = _parser().parse_args(arguments)
    run = run_folder(Path(options.run))
    task, texts = _of_run(run)
    device = chosen_device(options.device)
    inputs = {"--data": _files_of(Path(options.data), texts), "DIR": [run.config, run.model]}
    check_out([Path(options.out)], options.overwrite, inputs)
    if options.beams is not None:
        if task not in WRITING:
            raise ValueError(f"--beams is for {', '.join(WRITING)}; {run.path} is a run of {task}")
        texts = replace(texts, beams=options.beams)
    examples = RECIPES[task].read(Path(options.data), texts)  # before the model, because they may be refused
    predictor = Predictor.load(
        run.model,
        task,
        texts,
        device,
        options.tokens_per_batch,
    )
    examples = predictor.recipe.to_predict(examples, predictor.recipe.labels)
    write_predictions(Path(options.out), predictor.recipe.lines(predictor(examples), examples))
    print(printable(f"{len(examples):,} predictions in {options.out}"), file=sys.stderr)


def _files_of(data: Path, texts: TextOptions) -> list[Path]:
    """Return the file to read and its possible companions: ``NAME.target``, or one for each language."""
    return [data, *(data.with_name(f"{data.stem}.{suffix}") for suffix in ("target", *texts.languages))]


def _of_run(run: RunFolder) -> tuple[Task, TextOptions]:
    """Return the task of a run, and its text options.

    Raises:
        FileNotFoundError, ValueError: the folder is not a finished fine-tuning run, or its options are incomplete.
    """
    if not run.config.is_file():
        raise FileNotFoundError(f"{run.path} is not a fine-tuning run: it has no {run.config.name}")
    options = read_options(run.config)
    task = options.get("task")
    if task not in list(RECIPES):  # a list, because the task may be unhashable
        raise ValueError(f"{run.path} is not a fine-tuning run: {run.config} names no task")
    texts = _texts(run.config, options)
    if not run.model.is_dir():
        raise FileNotFoundError(f"{run.path} has no {run.model.name}: the run is not finished")
    return task, texts


def _texts(config: Path, options: dict[str, Any]) -> TextOptions:
    """Return the text options in a file after checking their names and types."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--max_length", type=int)
    parser.add_class_arguments(TextOptions, "text", instantiate=False, skip={"max_length"})
    last = options.get("trainer")  # of what a run writes
    if "max_length" not in options or not isinstance(last, dict) or not config.read_bytes().endswith(b"\n"):
        raise ValueError(f"{config} is incomplete: it must have all options of the run, as the run wrote them")
    if not isinstance(options.get("text"), dict):
        raise ValueError(f"{config} must have text, the options of texts; got {options.get('text')!r}")
    try:
        found = parser.parse_object({name: options[name] for name in ("max_length", "text")})
    except ArgumentError as error:
        raise ValueError(f"{config}: {error}") from error
    return TextOptions(max_length=found.max_length, **found.text.as_dict())


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="fastformer predict", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="DIR", help="the output folder of a fine-tuning run")
    parser.add_argument("--data", required=True, metavar="FILE", help="examples")
    parser.add_argument("--out", required=True, metavar="FILE", help="file for the predictions; never left incomplete")
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE_HELP)
    parser.add_argument(
        "--beams", type=whole_number(1, 2**16), metavar="N", help="number of beams, if text is generated"
    )
    parser.add_argument("--device", help="cpu, cuda, ...; default: cuda if there is one")
    parser.add_argument(
        "--tokens_per_batch", type=whole_number(1), default=4096, metavar="N", help="the most tokens in a batch"
    )
    return parser
