"""The command ``fastformer convert``: convert a checkpoint from one format into another."""

from __future__ import annotations

import contextlib
import json
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from dataclasses import asdict
from pathlib import Path

from transformers.utils import logging as transformers_logging

from fastformer.arguments import CommandParser
from fastformer.console import Progress
from fastformer.models.conversion.folders import FORMATS, Conversion, convert
from fastformer.models.conversion.models import ARCHITECTURES

_CLASSES = "\n".join(
    f"  {name}: {', '.join(head.theirs.__name__ for head in known.heads)}" for name, known in ARCHITECTURES.items()
)
_DESCRIPTION = f"""\
Convert the checkpoint in the folder SRC into the new folder DST: from Hugging Face's format, or BERT's TensorFlow
format, into Fastformer's, and back. The converted model computes the same. Tokenizers, image processors and generation
settings are copied, so that pipelines work. A damaged or incomplete checkpoint, or a setting that the other format
cannot express, is an error that names it; then DST is not written.

examples:
  fastformer convert bert-base-uncased/ bert/                           # from Hugging Face's format
  fastformer convert runs/bert/model bert-hf/ --to bert                 # to Hugging Face's
  fastformer convert uncased_L-12_H-768_A-12/ bert/                     # from TensorFlow's
  fastformer convert runs/bert/model bert-tf/ --to tensorflow-bert      # to TensorFlow's
  fastformer convert roberta-base/ roberta/ --drop 'roberta.pooler.*'   # without weights the class does not have
  fastformer convert old/ new/ --class BertForPreTraining               # if config.json does not name the class

TensorFlow's format needs TensorFlow: pip install fastformer[tensorflow].

formats: {", ".join(FORMATS)}
classes:
{_CLASSES}

Weights are never unpickled: SRC must hold safetensors. In training, dropout is placed as in Fastformer's models: no
dropout before DistilBERT's span head, after T5's last norm, or before the dense layer of RoBERTa's classifier.
"""


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer convert`` with the arguments that follow.

    Raises:
        ValueError, OSError: the user's input is wrong.
    """
    options = _parser().parse_args(arguments)
    transformers_logging.set_verbosity_error()
    with contextlib.ExitStack() as stack:
        done = convert(
            options.source,
            options.target,
            options.to,
            class_name=options.class_name,
            drop=options.drop,
            shard_bytes=int(options.shard_size * 1e9),
            progress=lambda total: stack.enter_context(Progress("tensors", total)).advance,
        )
    if options.json:
        print(json.dumps(asdict(done), indent=2))
    else:
        _report(done, options.target)


def _parser() -> ArgumentParser:
    parser = CommandParser(
        prog="fastformer convert",
        usage="fastformer convert SRC DST [options]",
        description=_DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="the folder of the checkpoint")
    add("target", type=Path, metavar="DST", help="the folder to write, which must not exist")
    add("--to", choices=FORMATS, metavar="FORMAT", help="the format to write (default: fastformer)")
    add("--class", dest="class_name", metavar="NAME", help="the class of the model in SRC (default: config.json's)")
    add("--drop", nargs="+", default=[], metavar="PATTERN", help="tensors to leave out, such as 'bert.pooler.*'")
    add("--shard_size", type=_positive, default=5.0, metavar="GB", help="largest size of a file (default: 5)")
    add("--json", action="store_true", help="print a summary as JSON")
    return parser


def _positive(text: str) -> float:
    if not (value := float(text)) > 0:
        raise ArgumentTypeError(f"must be above 0; got {text}")
    return value


def _report(done: Conversion, target: Path) -> None:
    companions = f", with {', '.join(done.companions)}" if done.companions else ""
    print(
        f"{done.source_format} {done.source_class} -> {done.target_format} {done.target_class}: "
        f"{done.tensors} tensors, {done.parameters / 1e6:.2f} M parameters"
    )
    print(f"{target}{companions}")
