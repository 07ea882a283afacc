"""Run pretraining: from checked options to a trained model and its report."""

from __future__ import annotations

import time
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from fastformer.console import printable
from fastformer.training.callbacks import SavePretrained
from fastformer.training.checkpoints import StepCheckpoint, latest_checkpoint
from fastformer.training.finite import FiniteLosses
from fastformer.training.folder import RunFolder
from fastformer.training.interruption import StopOnSignal
from fastformer.training.loading.pretraining import PretrainingDataModule
from fastformer.training.optimization import Optimization
from fastformer.training.pretraining import MODULES, PretrainingModule
from fastformer.training.pretraining_report import PretrainingReport
from fastformer.training.progress import LossCurve, Throughput
from fastformer.training.run import SaveOptions, Watch, build_trainer, callbacks, summary, summary_text
from fastformer.training.samples import sample
from fastformer.training.sharding import FullyShardedStrategy

DATA_OPTIONS = ("objective", "vocab_size", "max_length", "tokens_per_batch", "num_workers", "seed", "cache_dir")
"""Options of the command that are arguments of `PretrainingDataModule` too, in addition to those in ``--corpus``."""


def run_pretraining(
    parser: LightningArgumentParser, options: Namespace, folder: RunFolder, stop: StopOnSignal, begin: float
) -> None:
    """Train a model on raw text, from the checked options to the saved model and the report.

    Args:
        parser: the command's parser, for Lightning's own options.
        options: the command's options.
        folder: the run's output folder, locked by this process.
        stop: ends the run after the step at hand if a signal asks for it.
        begin: `time.monotonic()` when the command started.

    Raises:
        ValueError: options that do not fit together, or text that they cannot be used with.
    """
    checkpoint, checked = None, _module(options)
    if options.resume:
        checkpoint = latest_checkpoint(folder.checkpoints, checked.weights_for, folder.run)
    trainer_arguments = parser.instantiate(options).trainer
    if options.tensor_parallel != 1:
        if options.strategy != "fsdp2":
            raise ValueError(f"--tensor_parallel is for --strategy fsdp2; got --strategy {options.strategy}")
        trainer_arguments.strategy = FullyShardedStrategy(options.tensor_parallel)
    module, data = _module(options), _data(options)
    module.continued = checked.continued
    curve = LossCurve(folder.curve, module.losses[0], module.loss_label)
    watch = Watch(Throughput(), curve, FiniteLosses(folder.checkpoints, options.skip_nonfinite))
    stop.saves = StepCheckpoint(folder.checkpoints, every=options.evaluate_every)
    save_options = SaveOptions(folder, parser, options)
    save_model = SavePretrained(folder.model, claim=folder.claim_model)
    in_order = callbacks(options, watch, save_options, stop.saves, stop, save_model)
    trainer = build_trainer(trainer_arguments, folder, in_order)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    if curve.validation and curve.validation[-1]["step"] != trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        metrics = summary(trainer, module, watch, folder, time.monotonic() - begin)
        _report(options.objective, {**metrics, "sample": sample(options.objective, folder.model)._asdict()}, folder)


def _module(options: Namespace) -> PretrainingModule:
    return MODULES[options.objective](
        options.preset,
        options.overrides,
        Optimization(**options.optimizer.as_dict()),
        options.activation_checkpointing,
    )


def _data(options: Namespace) -> PretrainingDataModule:
    shared = {name: options[name] for name in DATA_OPTIONS}
    return PretrainingDataModule(
        options.data or None, few_shapes=options.cuda_graphs, **shared, **options.corpus.as_dict()
    )


def _report(objective: str, metrics: dict[str, Any], folder: RunFolder) -> None:
    """Write the metrics to metrics.json, report.md and the terminal."""
    folder.write_metrics(metrics)
    report = PretrainingReport(objective, metrics)
    report.write(folder.report, folder.curve)
    if (table := report.table()) is not None:
        print(table)
    print(summary_text(metrics))
    print(printable("{given}  ->  {answer}".format(**metrics["sample"])))
