"""The command ``fastformer pretrain``: from its arguments to a trained model and an honest report."""

from __future__ import annotations

import json
import logging
import shutil
import time
import warnings
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, DefaultHelpFormatter, Namespace
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from fastformer.data import PretrainingDataModule
from fastformer.data.files import atomic_file
from fastformer.models import PRESETS
from fastformer.training.callbacks import (
    LossCurve,
    SavePretrained,
    StepSeed,
    StopAtLimit,
    Throughput,
    TrainingProgress,
)
from fastformer.training.checkpoints import AtomicCheckpointIO, StepCheckpoint, latest_checkpoint
from fastformer.training.pretraining import MaskedLanguageModeling

_DESCRIPTION = """\
Pretrain a BERT by masked language modelling and next-sentence prediction. Without any option: a small one, on the
English of Python's own documentation, in minutes on two CPU cores, into runs/pretrain.

examples:
  fastformer pretrain
  fastformer pretrain --data texts/ more.jsonl --preset bert-base --max_steps 100000 --precision bf16-mixed
  fastformer pretrain --devices 8 --strategy ddp --accumulate 4 --corpus.tokens_per_batch 65536
  fastformer pretrain --model.learning_rate 5e-4 --model.overrides.num_hidden_layers 6 --corpus.next_sentence false
  fastformer pretrain --print_config > run.yaml && fastformer pretrain --config run.yaml
  fastformer pretrain --resume                    # continue the run in runs/pretrain exactly where it stopped

what --output holds:
  config.yaml     every option of the run                  model/         Hugging Face format, for transformers
  checkpoints/    the two newest, for --resume             loss.png       loss in training and on held-out text
  logs/           CSV and TensorBoard                      metrics.json   what is printed at the end
"""

_CONFIG, _METRICS, _CURVE = "config.yaml", "metrics.json", "loss.png"
_CHECKPOINTS, _LOGS, _MODEL = "checkpoints", "logs", "model"

# What resume and report rely on, set by `_trainer`, and what has no meaning here.
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


_UNIMPORTANT_WARNINGS = (
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*LeafSpec.*deprecated.*",
    "Total length of `list` across ranks is zero.*",  # nothing held out, as was asked
)


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer pretrain``.

    Args:
        arguments: those of the command line after ``pretrain``.
        begin: `time.monotonic()` when the command started.

    Raises:
        ValueError, OSError: in what the user gave.
    """
    _quieten()
    parser = build_parser()
    options = parser.parse_args(arguments)
    output = Path(options.output)
    if options.resume:
        options = parser.parse_args(["--config", str(_saved_config(output)), *arguments])
    _prepare_output(output, options.resume, options.overwrite)
    seed_everything(options.seed, workers=True, verbose=False)
    try:
        _pretrain(parser, options, output, begin)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error


def build_parser() -> LightningArgumentParser:
    """The options of the command."""
    parser = LightningArgumentParser(
        prog="fastformer pretrain",
        usage="fastformer pretrain [options]",
        description=_DESCRIPTION,
        formatter_class=_HelpFormatter,
    )
    add = parser.add_argument
    add("--config", action=ActionConfigFile, help="YAML file of options; what follows it on the command line wins")
    add("--data", type=str, nargs="+", default=[], metavar="PATH", help=_DATA_HELP)
    add("--output", type=str, default="runs/pretrain", metavar="DIR", help="folder for all that the run writes")
    add("--resume", action="store_true", help="continue the run in --output, with its options where none are given")
    add("--overwrite", action="store_true", help="replace the run in --output")
    add("--preset", type=str, default=_DEFAULT_PRESET, help=f"size of the model: {', '.join(_SIZES)}")
    add("--max_steps", type=int, default=_DEFAULT_STEPS, metavar="N", help="optimizer steps")
    add("--max_minutes", type=float | None, metavar="M", help="stop training after this time, whatever --max_steps")
    add("--evaluate_every", type=int, default=_DEFAULT_INTERVAL, metavar="N", help=_EVALUATE_HELP)
    add("--accumulate", type=int, default=1, metavar="N", help="batches whose gradients make one optimizer step")
    add("--seed", type=int, default=0, help="of the weights, the masks, the order of the data and dropout")
    add("--accelerator", type=str, default="auto", help="cpu, gpu, ... or auto")
    add("--devices", type=str, default="auto", help="their number, or a list such as 0,2")
    add("--strategy", type=str, default="auto", help="ddp, fsdp, ... (Lightning's names)")
    add("--precision", choices=_PRECISIONS, default="32-true", help="of weights and of the computation")
    parser.add_class_arguments(MaskedLanguageModeling, "model")
    parser.add_class_arguments(PretrainingDataModule, "corpus")
    parser.add_class_arguments(
        Trainer, "trainer", fail_untyped=False, instantiate=False, skip=_TRAINER_ARGUMENTS_NOT_OFFERED
    )
    parser.set_defaults({"trainer.gradient_clip_val": 1.0, "trainer.log_every_n_steps": 10})
    for source, target in _LINKS.items():
        parser.link_arguments(source, target)
    parser.link_arguments("data", "corpus.data", compute_fn=lambda paths: paths or None)
    parser.link_arguments(
        ("evaluate_every", "accumulate"),
        "trainer.val_check_interval",
        compute_fn=lambda every, batches: every * batches,
    )
    return parser


_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
_DEFAULT_PRESET = "bert-tiny"
_SIZES = [name for name, known in PRESETS.items() if known.model == "FastformerForPreTraining"]
_DEFAULT_STEPS = 1000
_DEFAULT_INTERVAL = 200
_DATA_HELP = (
    "instead of the default corpus: text files, JSON lines, parquet, folders of these, folders of datasets.save_to_disk"
)
_EVALUATE_HELP = "measure the loss on held-out text, and save a checkpoint, each this many optimizer steps"
_LINKS = {
    "seed": "corpus.seed",
    "preset": "model.preset",
    "max_steps": "trainer.max_steps",
    "accumulate": "trainer.accumulate_grad_batches",
    "accelerator": "trainer.accelerator",
    "devices": "trainer.devices",
    "strategy": "trainer.strategy",
    "precision": "trainer.precision",
}


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """jsonargparse's help, with the lines of the description kept."""


def _pretrain(parser: LightningArgumentParser, options: Namespace, output: Path, begin: float) -> None:
    checkpoint = latest_checkpoint(output / _CHECKPOINTS) if options.resume else None
    objects = parser.instantiate(options)
    throughput, curve = Throughput(), LossCurve(output / _CURVE)
    trainer = _trainer(
        objects.trainer,
        output,
        [
            _SaveOptions(output / _CONFIG, _as_yaml(parser, options)),
            StepSeed(options.seed),
            StopAtLimit(options.max_minutes),
            throughput,
            TrainingProgress(),
            curve,
            StepCheckpoint(output / _CHECKPOINTS, every=options.evaluate_every),
            SavePretrained(output / _MODEL),
        ],
    )
    module, data = objects.model, objects.corpus
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    if curve.validation and curve.validation[-1]["step"] != trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        summary = _summary(trainer, module, throughput, curve, output, time.monotonic() - begin)
        with atomic_file(output / _METRICS) as file:
            file.write(json.dumps(summary, indent=2).encode() + b"\n")
        _report(summary, data.tokenizer.mask_token)


def _trainer(arguments: Namespace, output: Path, callbacks: list[Callback]) -> Trainer:
    given = arguments.as_dict()
    logs = output / _LOGS
    given["callbacks"] = callbacks + _as_list(given["callbacks"])
    given["plugins"] = [AtomicCheckpointIO(), *_as_list(given["plugins"])]
    given["logger"] = given["logger"] or [CSVLogger(logs, name="csv"), TensorBoardLogger(logs, name="tensorboard")]
    try:
        return Trainer(
            **given,
            default_root_dir=output,
            check_val_every_n_epoch=None,
            enable_model_summary=False,
            num_sanity_val_steps=-1,  # all of the held-out text: the loss before the first step
        )
    except TypeError as error:
        raise ValueError(str(error)) from error


def _as_list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]


# --- The output folder ------------------------------------------------------------------------------------------------


def _saved_config(output: Path) -> Path:
    path = output / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume in {output}: it has no {_CONFIG}")
    return path


@rank_zero_only
def _prepare_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something else than this run, and remove what killed processes left behind.

    A run that failed before its first step has left logs at most; they are no reason to refuse.
    """
    if resume and overwrite:
        raise ValueError("give --resume or --overwrite, not both")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is not a folder")
    entries = {path.name for path in output.iterdir()} if output.exists() else set()
    ours = {_CONFIG, _METRICS, _CURVE, _CHECKPOINTS, _LOGS, _MODEL}
    if foreign := sorted(name for name in entries - ours if not name.endswith(".tmp")):
        raise ValueError(
            f"--output {output} holds what is no pretraining run: {', '.join(foreign[:3])}; give another folder"
        )
    if _CONFIG in entries and not (resume or overwrite):
        state = "a finished" if _METRICS in entries else "an unfinished"
        raise ValueError(
            f"--output {output} holds {state} run: continue it with --resume, replace it with --overwrite, or give "
            "another folder"
        )
    if resume:
        for path in [*output.glob(".*.tmp"), *(output / _CHECKPOINTS).glob(".*.tmp")]:
            _remove(path)
    else:
        for name in entries:
            _remove(output / name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


class _SaveOptions(Callback):
    """Writes the options when training starts: from then on there is a run to resume."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.text = text

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            with atomic_file(self.path) as file:
                file.write(self.text.encode())


def _as_yaml(parser: LightningArgumentParser, options: Namespace) -> str:
    kept = options.clone()
    kept.resume = kept.overwrite = False
    return parser.dump(kept)


# --- The report -------------------------------------------------------------------------------------------------------


def _summary(
    trainer: Trainer, module: LightningModule, throughput: Throughput, curve: LossCurve, output: Path, wall: float
) -> dict[str, Any]:
    return {
        "start": curve.validation[0] if curve.validation else None,
        "end": curve.validation[-1] if curve.validation else None,
        "steps": trainer.global_step,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "tokens": throughput.tokens,
        "training_seconds": throughput.seconds,
        "tokens_per_second": throughput.tokens_per_second,
        "wall_seconds": wall,
        "device": str(trainer.strategy.root_device),
        "devices": trainer.world_size,
        "precision": trainer.precision,
        "model": str(output / _MODEL),
        "curve": str(output / _CURVE),
    }


def _report(summary: dict[str, Any], mask_token: str) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if summary["end"] is not None:
        console.print(_table(summary["start"], summary["end"]))
    minutes, seconds = divmod(round(summary["wall_seconds"]), 60)
    console.print(
        f"{summary['steps']:,} steps, {summary['tokens'] / 1e6:.2f} M tokens at {summary['tokens_per_second']:,.0f} "
        f"tokens/s on {summary['devices']} x {summary['device']}; {minutes} min {seconds} s in all\n"
        f"model: {summary['model']} ({summary['parameters'] / 1e6:.2f} M parameters)   loss curve: {summary['curve']}"
    )
    text = f"This method returns a {mask_token} object."
    console.print(f"{text}  ->  {', '.join(_fill_mask(summary['model'], text))}", markup=False)


def _table(start: dict[str, float], end: dict[str, float]) -> Table:
    table = Table(
        title=f"{end['masked_tokens']:,.0f} masked tokens and {end['sentence_pairs']:,.0f} pairs of held-out text"
    )
    table.add_column("on held-out text")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    table.add_row("masked-LM loss (nats)", *(f"{at['mlm_loss']:.3f}" for at in (start, end)))
    table.add_row("  change", "", f"{end['mlm_loss'] - start['mlm_loss']:+.3f}")
    table.add_row("perplexity", *(f"{at['perplexity']:,.1f}" for at in (start, end)))
    if "nsp_accuracy" in end:
        accuracies = (f"{at['nsp_accuracy']:.1%} ± {at['nsp_standard_error']:.1%}" for at in (start, end))
        table.add_row("next-sentence accuracy ± standard error", *accuracies)
        table.add_row("  chance: always the commoner answer", *(f"{at['nsp_chance']:.1%}" for at in (start, end)))
    return table


def _fill_mask(model: str, text: str) -> list[str]:
    """The likeliest words for the mask in `text`, with their probabilities."""
    from transformers import pipeline

    return [f"{found['token_str'].strip()} {found['score']:.0%}" for found in pipeline("fill-mask", model)(text)]


def _quieten() -> None:
    """Leave the terminal to progress, warnings that matter and the report."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _UNIMPORTANT_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    transformers_logging.disable_progress_bar()
