"""The command ``fastformer pretrain``: from its arguments to a trained model and an honest report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table

from fastformer.data import PretrainingDataModule
from fastformer.models import PRESETS
from fastformer.training.callbacks import (
    LossCurve,
    SavePretrained,
    StepSeed,
    StopAtLimit,
    Throughput,
    TrainingProgress,
)
from fastformer.training.checkpoints import StepCheckpoint, latest_checkpoint
from fastformer.training.pretraining import MaskedLanguageModeling
from fastformer.training.run import (
    RunFolder,
    SaveOptions,
    add_trainer_arguments,
    build_trainer,
    command_parser,
    parse,
    quieten,
    summary,
    summary_text,
)

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


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer pretrain``.

    Args:
        arguments: those of the command line after ``pretrain``.
        begin: `time.monotonic()` when the command started.

    Raises:
        ValueError, OSError: in what the user gave.
    """
    quieten()
    parser = build_parser()
    options = parse(parser, arguments)
    folder = RunFolder(Path(options.output), "pretraining")
    folder.prepare(options.resume, options.overwrite)
    seed_everything(options.seed, workers=True, verbose=False)
    try:
        _pretrain(parser, options, folder, begin)
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error


def build_parser() -> LightningArgumentParser:
    """The options of the command."""
    parser = command_parser("pretrain", _DESCRIPTION, "runs/pretrain")
    add = parser.add_argument
    add("--data", type=str, nargs="+", default=[], metavar="PATH", help=_DATA_HELP)
    add("--preset", type=str, default=_DEFAULT_PRESET, help=f"size of the model: {', '.join(PRESETS)}")
    add("--max_steps", type=int, default=_DEFAULT_STEPS, metavar="N", help="optimizer steps")
    add("--evaluate_every", type=int, default=_DEFAULT_INTERVAL, metavar="N", help=_EVALUATE_HELP)
    add("--seed", type=int, default=0, help="of the weights, the masks, the order of the data and dropout")
    parser.add_class_arguments(MaskedLanguageModeling, "model")
    parser.add_class_arguments(PretrainingDataModule, "corpus")
    add_trainer_arguments(parser)
    parser.link_arguments("seed", "corpus.seed")
    parser.link_arguments("preset", "model.preset")
    parser.link_arguments("data", "corpus.data", compute_fn=lambda paths: paths or None)
    return parser


_DEFAULT_PRESET = "bert-tiny"
_DEFAULT_STEPS = 1000
_DEFAULT_INTERVAL = 200
_DATA_HELP = (
    "instead of the default corpus: text files, JSON lines, parquet, folders of these, folders of datasets.save_to_disk"
)
_EVALUATE_HELP = "measure the loss on held-out text, and save a checkpoint, each this many optimizer steps"


def _pretrain(parser: LightningArgumentParser, options: Namespace, folder: RunFolder, begin: float) -> None:
    checkpoint = latest_checkpoint(folder.checkpoints) if options.resume else None
    objects = parser.instantiate(options)
    throughput, curve = Throughput(), LossCurve(folder.curve, "mlm_loss", "masked-LM loss (nats per masked token)")
    trainer = build_trainer(
        objects.trainer,
        folder,
        [
            SaveOptions(folder.config, parser, options),
            StepSeed(options.seed),
            StopAtLimit(options.max_minutes),
            throughput,
            TrainingProgress(),
            curve,
            StepCheckpoint(folder.checkpoints, every=options.evaluate_every),
            SavePretrained(folder.model),
        ],
    )
    module, data = objects.model, objects.corpus
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    if curve.validation and curve.validation[-1]["step"] != trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        metrics = summary(trainer, module, throughput, curve, folder, time.monotonic() - begin)
        folder.write_metrics(metrics)
        _report(metrics, data.tokenizer.mask_token)


# --- The report -------------------------------------------------------------------------------------------------------


def _report(metrics: dict[str, Any], mask_token: str) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if metrics["end"] is not None:
        console.print(_table(metrics["start"], metrics["end"]))
    console.print(summary_text(metrics))
    text = f"This method returns a {mask_token} object."
    console.print(f"{text}  ->  {', '.join(_fill_mask(metrics['model'], text))}", markup=False)


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
