"""The options that ``fastformer pretrain`` and ``fastformer finetune`` share, and the code that reads them."""

from __future__ import annotations

import os
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, DefaultHelpFormatter, Namespace, set_parsing_settings
from jsonargparse._common import parsing_settings
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.cli import LightningArgumentParser

from fastformer.arguments import PRECISIONS
from fastformer.console import printable
from fastformer.models import PRESETS
from fastformer.training.folder import RunFolder
from fastformer.training.optimization import Optimization
from fastformer.training.option_files import check_spelling, given_options, read_options
from fastformer.training.ranges import check_ranges
from fastformer.training.unused import check_used

STRATEGIES = ("auto", "ddp", "fsdp2")

# Set by `build_trainer` because resuming and reports rely on them, or without meaning here.
_TRAINER_ARGUMENTS_NOT_OFFERED = {
    "barebones",
    "check_val_every_n_epoch",
    "default_root_dir",
    "enable_autolog_hparams",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "fast_dev_run",
    "limit_predict_batches",
    "limit_test_batches",
    "max_time",
    "model_registry",
    "num_sanity_val_steps",
    "overfit_batches",
    "reload_dataloaders_every_n_epochs",
    "sync_batchnorm",
    "use_distributed_sampler",
}

_PRESET_HELP = f"architecture and size of a new model: {', '.join(PRESETS)}; default: one that learns in minutes"
_OVERRIDES_HELP = "fields of a new model's configuration to change, such as --overrides.num_hidden_layers 6"
_VOCABULARY_HELP = "size of the vocabulary of a new model's tokenizer, which is trained on the data"
_LENGTH_HELP = (
    "tokens of the longest sequence, with special tokens; if there are targets, of the longest source. finetune cuts "
    "longer texts (qa divides them into windows); unless given, it is reduced to the positions of the model"
)
_BATCH_HELP = "the most tokens in a batch of one device, sources and targets together; at least its longest sequence"
_STEPS_HELP = "optimizer steps, -1 for no limit; default: enough for the objective, or as many as --epochs has"
_EVALUATE_HELP = "evaluate on held-out data and save a checkpoint after every N optimizer steps"
_ACTIVATION_HELP = "keep only each block's input, and compute the rest again in the backward: less memory, more time"
_WORKERS_HELP = "processes that prepare batches; 0 prepares them in the training process"
_CACHE_HELP = "for data, tokenizers and tokenized text; default: $FASTFORMER_CACHE or ~/.cache/fastformer"
_GRAPHS_HELP = (
    "record the kernels of a batch's forward and backward, and launch them together: for models so small that a GPU "
    "waits for Python. On one GPU; batches are padded to few shapes"
)

# Lightning's callbacks that write no file and call none of their arguments: a file may name them without --trust.
_HARMLESS: tuple[type[Callback], ...] = (
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    TQDMProgressBar,
)
_WRITERS = re.compile(r"(lightning|pytorch_lightning|fastformer)\.")  # their classes may write files, unless harmless
_TRUST_HELP = (
    "let --config, and the options of a resumed run, name any class; making an object of it runs its code. Otherwise "
    f"only Lightning's classes that write no file are accepted: {', '.join(kind.__name__ for kind in _HARMLESS[1:])}"
)
_OVERWRITE_HELP = (
    "replace the run in --output, after everything else is checked; never a run of another kind, or one that contains "
    "files to be read"
)
_SKIP_HELP = "skip steps whose loss or gradient is infinite or NaN, instead of ending training with an error"
_DEVICES = re.compile(r"auto|-1|[1-9]\d*|\d+,|\d+(,\d+)+")
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")


class _Parser(LightningArgumentParser):
    """Lightning's parser, with each error on one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # within the options of a class
            super().error(message, ex)
        text = " ".join(message.split())
        if "import path denylist" in text:
            text = _refused_class(text)
        print(f"{self.prog}: error: {printable(_shortened(text))}", file=sys.stderr)
        raise SystemExit(2)


def _refused_class(text: str) -> str:
    """Return the error for a class that options may not name, given jsonargparse's error."""
    found = re.search(r"Importing '([^']*)'", text)
    named = found[1] if found else "a class"
    if named.endswith((".yaml", ".yml", ".json")):
        return f"{named} is taken for a class: write ./{named} for a file of options"
    if _WRITERS.match(named):
        return (
            f"{named} may write files outside the run, or call its arguments: give --trust if you trust the file or "
            "option that names it"
        )
    return (
        f"a file names {named}, which is neither Lightning's nor Fastformer's. Making an object of it runs its code: "
        "give --trust if you trust the file"
    )


_TYPE_ERROR = re.compile(r'Parser key "([^"]*)": .*(?:Given value|Got value): (.*)$')
_EXPECTED = re.compile(r"Expected a <class '(\w+)'>")
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "tuple": "a list",
    "dict": "names with values",
    "NoneType": "null",
}


def _shortened(text: str) -> str:
    """Shorten jsonargparse's error about a value of a wrong type: leave out its list of attempts."""
    found, expected = _TYPE_ERROR.search(text), [*dict.fromkeys(_EXPECTED.findall(text))]
    if found is None or not expected or not set(expected) <= _KINDS.keys():
        return text
    if "float" in expected:
        expected = [kind for kind in expected if kind != "int"]
    return f"--{found[1]} must be {' or '.join(_KINDS[kind] for kind in expected)}; got {found[2]}"


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help formatter, which keeps the lines of the description."""


def command_parser(command: str, description: str, defaults: Mapping[str, Any]) -> LightningArgumentParser:
    """Return a parser with the options of every training command.

    Args:
        command: the words of the command after ``fastformer``.
        description: the description; its lines are kept.
        defaults: defaults that differ between commands, among them that of ``--output``.
    """
    parser = _Parser(
        prog=f"fastformer {command}",
        usage=f"fastformer {command} [options]",
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", action=ActionConfigFile, help="YAML file of options; later options on the command line win")
    add("--output", type=str, metavar="DIR", help="folder for all files of the run")
    add("--resume", action="store_true", help="continue the run in --output, with its options unless others are given")
    add("--elastic", action="store_true", help="continue the run in --output if there is one: for jobs that restart")
    add("--overwrite", action="store_true", help=_OVERWRITE_HELP)
    add("--trust", action="store_true", help=_TRUST_HELP)
    add("--max_minutes", type=float | None, metavar="M", help="stop training after M minutes at the latest")
    add("--accumulate", type=int, default=1, metavar="N", help="number of batches in one optimizer step")
    add("--skip_nonfinite", action="store_true", help=_SKIP_HELP)
    add("--accelerator", type=str, default="auto", help="cpu, gpu, ... or auto")
    add("--devices", type=str, default="auto", help="number of devices, or a list such as 0,2")
    add("--strategy", choices=STRATEGIES, default="auto", help="for several devices; auto is ddp")
    add("--compile", action="store_true", help="compile the model with torch.compile: slow start, faster steps")
    add("--cuda_graphs", action="store_true", help=_GRAPHS_HELP)
    add("--precision", choices=PRECISIONS, default="32-true", help="precision of weights and computation")
    add("--activation_checkpointing", action="store_true", help=_ACTIVATION_HELP)
    add("--preset", type=str | None, default=None, metavar="NAME", help=_PRESET_HELP)
    add("--overrides", type=dict[str, Any], default={}, metavar="FIELDS", help=_OVERRIDES_HELP)
    add("--vocab_size", type=int, default=8192, metavar="N", help=_VOCABULARY_HELP)
    add("--max_length", type=int, default=128, metavar="N", help=_LENGTH_HELP)
    add("--tokens_per_batch", type=int, default=4096, metavar="N", help=_BATCH_HELP)
    add("--epochs", type=int, default=-1, metavar="N", help="passes over the data, -1 for no limit")
    add("--max_steps", type=int | None, default=None, metavar="N", help=_STEPS_HELP)
    add("--evaluate_every", type=int, default=100, metavar="N", help=_EVALUATE_HELP)
    add("--seed", type=int, default=0, help="seed of new weights, data order, masks, dropout and noise")
    add("--num_workers", type=int, default=0, metavar="N", help=_WORKERS_HELP)
    add("--cache_dir", type=str | None, default=None, metavar="DIR", help=_CACHE_HELP)
    parser.add_class_arguments(Optimization, "optimizer", instantiate=False)
    parser.set_defaults(dict(defaults))
    return parser


def add_trainer_arguments(parser: LightningArgumentParser) -> None:
    """Add Lightning's own options as ``--trainer.NAME``, and link those of `command_parser` to them."""
    parser.add_class_arguments(
        Trainer, "trainer", fail_untyped=False, instantiate=False, skip=_TRAINER_ARGUMENTS_NOT_OFFERED
    )
    parser.set_defaults({"trainer.gradient_clip_val": 1.0, "trainer.log_every_n_steps": 10})
    for name in ("accelerator", "devices", "strategy", "precision"):
        parser.link_arguments(name, f"trainer.{name}")
    parser.link_arguments("max_steps", "trainer.max_steps", compute_fn=lambda steps: -1 if steps is None else steps)
    parser.link_arguments("epochs", "trainer.max_epochs")
    parser.link_arguments("accumulate", "trainer.accumulate_grad_batches")
    parser.link_arguments(
        ("evaluate_every", "accumulate"),
        "trainer.val_check_interval",
        compute_fn=lambda every, batches: every * batches,
    )


@contextmanager
def classes_allowed(arguments: Sequence[str]) -> Iterator[None]:
    """Return a context in which options may name Lightning's harmless callbacks, and classes from the command line.

    With ``--trust`` among the arguments, options may name any class.
    """
    if "--trust" in arguments:
        yield
        return
    before = dict(parsing_settings)
    named = [path for _, text in _trainer_options(arguments) for path in _IMPORT_PATH.findall(text)]
    own = [path for path in named if not _WRITERS.match(path)]
    harmless = [f"{kind.__module__}.{kind.__name__}" for kind in _HARMLESS]  # under any name of their import
    shorter = [f"lightning.pytorch.callbacks.{kind.__name__}" for kind in _HARMLESS]
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*harmless, *shorter, *own])
    try:
        yield
    finally:
        parsing_settings.update(before)


def _trainer_options(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Return the NAME of each option ``--trainer.NAME`` of the command line, with its value."""
    options = given_options(arguments)
    return [(name.removeprefix("trainer."), value) for name, value in options if name.startswith("trainer.")]


def parse(parser: LightningArgumentParser, arguments: list[str]) -> Namespace:
    """Parse the options; a resumed run uses its own options unless others are given.

    Raises:
        FileNotFoundError: there is no run to resume.
        ValueError: an option is wrong, or the file with the run's options is incomplete.
    """
    check_spelling(arguments)
    arguments = _with_paths(arguments, parser.groups or ())
    options = parser.parse_args(arguments)
    config = RunFolder(Path(options.output), "").config
    if options.resume and not config.is_file():
        raise FileNotFoundError(f"nothing to resume in {options.output}: it has no {config.name}")
    if options.resume or (options.elastic and config.is_file()):
        if options.overwrite:
            raise ValueError("give --resume or --overwrite, not both")
        options = parser.parse_args(["--config", _kept_options(config, arguments, parser.dump(options)), *arguments])
        options.resume = True
    if options.trust and "--trust" not in arguments:
        raise ValueError("a file may not set trust: give --trust on the command line")
    if not _DEVICES.fullmatch(options.devices):
        raise ValueError(f"--devices must be auto, a number, -1 for all, or a list such as 0,2; got {options.devices}")
    check_ranges(options)
    check_used(options, parser.get_defaults())
    return options


def _with_paths(arguments: Sequence[str], groups: Container[str]) -> list[str]:
    """Return the arguments with each group's file as ./FILE, since a name with dots alone could be that of a class."""
    changed = [*arguments]
    for place, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if name.removeprefix("--") not in groups:
            continue
        if given and Path(value).is_file():
            changed[place] = f"{name}={os.path.join('.', value)}"
        elif place + 1 < len(arguments) and Path(arguments[place + 1]).is_file():
            changed[place + 1] = os.path.join(".", arguments[place + 1])
    return changed


def _kept_options(config: Path, arguments: Sequence[str], usual: str) -> str:
    """Return the options of a run as YAML, without the trainer's options that the command line replaces.

    Args:
        config: the run's file of options.
        arguments: the command line.
        usual: YAML of all existing options.

    Raises:
        ValueError: the file is incomplete.
    """
    options = read_options(config)
    trainer = options.get("trainer")
    *_, last = yaml.safe_load(usual)["trainer"]
    if not isinstance(trainer, dict) or last not in trainer or not config.read_bytes().endswith(b"\n"):
        raise ValueError(f"{config} is incomplete: it must have all options of the run, as the run wrote them")
    for name, _ in _trainer_options(arguments):
        trainer.pop(name.partition(".")[0], None)
    return yaml.safe_dump(options, sort_keys=False)
