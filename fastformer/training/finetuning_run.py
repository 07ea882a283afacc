"""Run fine-tuning: from checked options to a trained model, its predictions and its report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import ModelParallelStrategy

from fastformer.console import json_text, printable_line
from fastformer.data.shapes import FewShapes
from fastformer.files import atomic_file
from fastformer.training.adversarial import Adversary
from fastformer.training.callbacks import SavePretrained
from fastformer.training.checkpoints import ValidationCheckpoint, latest_checkpoint
from fastformer.training.early_stopping import EarlyStopping
from fastformer.training.finetuning import Classification, FineTuning
from fastformer.training.finetuning_preparation import Prepared, fingerprints, prepare
from fastformer.training.finetuning_report import FineTuningReport
from fastformer.training.finite import FiniteLosses
from fastformer.training.folder import RunFolder
from fastformer.training.interruption import StopOnSignal
from fastformer.training.loading.finetuning import FineTuningData
from fastformer.training.lora import Lora
from fastformer.training.optimization import Optimization
from fastformer.training.prediction import Predictor
from fastformer.training.privacy import Privacy
from fastformer.training.progress import LossCurve, Throughput
from fastformer.training.run import SaveOptions, Watch, build_trainer, callbacks, summary, summary_text
from fastformer.training.starting_point import StartingPoint, Task
from fastformer.training.tasks import Recipe, Rewrite, balanced_class_weights
from fastformer.training.unused import changed

_OF_NEW_MODEL = ("preset", "vocab_size", "overrides")
_BEST, _PREDICTIONS, _REPORT, _CONFUSION = "best.pt", "predictions.jsonl", "report.md", "confusion.png"


def run_folder(path: Path) -> RunFolder:
    """Return the output folder of a fine-tuning run."""
    return RunFolder(path, "fine-tuning", (_BEST, _PREDICTIONS, _REPORT, _CONFUSION))


def run_finetuning(
    task: Task,
    parser: LightningArgumentParser,
    options: Namespace,
    arguments: Sequence[str],
    folder: RunFolder,
    stop: StopOnSignal,
    begin: float,
) -> None:
    """Fine-tune a model on labelled examples, from the checked options to predictions and the report.

    Args:
        task: the task.
        parser: the command's parser, for Lightning's own options.
        options: the command's options.
        arguments: the command line, which says which options were given.
        folder: the run's output folder, locked by this process.
        stop: ends the run after the step at hand if a signal asks for it.
        begin: `time.monotonic()` when the command started.

    Raises:
        ValueError: options that do not fit together, or examples that they cannot be used with.
    """
    given = changed(options, parser.get_defaults())
    prepared = prepare(task, options, arguments, [name for name in given if name in _OF_NEW_MODEL])
    learnt_from = fingerprints(prepared)
    if options.resume:
        folder.check_data(learnt_from)
    module = _module(prepared, options)
    checkpoint = None
    if options.resume:
        checkpoint = latest_checkpoint(folder.checkpoints, lambda content: module.state_dict(), folder.run)
    data = _data(prepared, module, options)
    curve = LossCurve(folder.curve)
    watch = Watch(Throughput(), curve, FiniteLosses(folder.checkpoints, options.skip_nonfinite))
    stop.saves = ValidationCheckpoint(folder.checkpoints)
    stopping = []
    if options.patience is not None:
        mode = "min" if options.monitor in ("loss", "perplexity") else "max"
        stopping = [EarlyStopping(folder.path / _BEST, options.monitor, mode, options.patience, lambda: folder.run)]  # type: ignore[arg-type]
    trainer_arguments = parser.instantiate(options).trainer
    if options.privacy_epsilon is not None:
        trainer_arguments.gradient_clip_val = None  # the privacy mechanism clips each example's gradient itself
    save_options = SaveOptions(folder, parser, options, learnt_from)
    save_model = SavePretrained(folder.model, not options.adapter.merge, folder.claim_model)
    in_order = callbacks(options, watch, save_options, stop.saves, stop, save_model, stopping)
    trainer = build_trainer(trainer_arguments, folder, in_order)
    _check_trainer(trainer, options)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    if stopping or (curve.validation and curve.validation[-1]["step"] != trainer.global_step):
        trainer.validate(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        metrics = {
            "task": task,
            **summary(trainer, module, watch, folder, time.monotonic() - begin),
            "trained_parameters": sum(weight.numel() for weight in module.parameters() if weight.requires_grad),
            "started_from": prepared.source,
            "attention": prepared.start.attention,
            "examples": {part: len(found) for part, found in prepared.examples._asdict().items()},
            **_privacy(module),
        }
        _evaluate(task, options, folder, prepared, trainer, metrics)


def _check_trainer(trainer: Trainer, options: Namespace) -> None:
    """Refuse combinations of options that would not give the promised privacy."""
    if options.privacy_epsilon is None:
        return
    if trainer.world_size > 1 or isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError(
            "--privacy_epsilon is for one device with unsharded weights, because the gradient of each example is "
            f"clipped; got --devices {options.devices} --strategy {options.strategy}"
        )
    if trainer.precision == "16-mixed":
        raise ValueError("--privacy_epsilon is not for --precision 16-mixed, whose scaler would clip a second time")


def _data(prepared: Prepared, module: FineTuning, options: Namespace) -> FineTuningData:
    recipe = prepared.recipe
    limit = getattr(prepared.start.model.config, "position_limit", None)
    return FineTuningData(
        recipe.tokenizer,
        prepared.train,
        prepared.validation,
        recipe.collate,
        recipe.length,
        module.targets,
        options.tokens_per_batch,
        options.seed,
        options.num_workers,
        module.privacy,
        FewShapes(recipe.collate, options.tokens_per_batch, limit) if options.cuda_graphs else None,
    )


def _module(prepared: Prepared, options: Namespace) -> FineTuning:
    start, recipe = prepared.start, prepared.recipe
    model: Any = start.model
    if options.lora:
        if start.new_layers is None:
            raise ValueError("--lora adapts a pretrained model; give one with --model")
        model = Lora(**options.adapter.as_dict()).adapt(model, start.new_layers)
    arguments: dict[str, Any] = {
        "optimization": _optimization(options, start),
        "adversary": None,
        "privacy": _privacy_of(options),
        "examples": len(prepared.train),
    }
    if options.adversarial is not None:
        arguments["adversary"] = Adversary(options.adversarial, **options.adversary.as_dict())
    if options.class_weights is not None:
        if not issubclass(recipe.module, Classification):
            raise ValueError("--class_weights are for classify and tag")
        balanced = options.class_weights == "balanced"
        arguments["class_weights"] = (
            balanced_class_weights(recipe, prepared.train) if balanced else options.class_weights
        )
    module = recipe.module(model, **arguments)
    if not isinstance(recipe, Rewrite):
        module.judge = _Judge(recipe, prepared.examples.validation, prepared.validation)
    return module


def _optimization(options: Namespace, start: StartingPoint) -> Optimization:
    pretrained = start.new_layers is not None and not options.lora
    return Optimization(**options.optimizer.as_dict()).for_width(start.model.config.hidden_size, pretrained)


def _privacy_of(options: Namespace) -> Privacy | None:
    if options.privacy_epsilon is None:
        return None
    return Privacy(options.privacy_epsilon, **options.privacy.as_dict())


def _privacy(module: FineTuning) -> dict[str, Any]:
    """Return the privacy spent, for the report."""
    if module.privacy is None or module.noise_multiplier is None:
        return {}
    assert module.examples is not None
    steps = module.trainer.global_step
    return {
        "privacy": {
            "epsilon": module.privacy.spent(module.noise_multiplier, module.examples, steps),
            "delta": module.privacy.delta_for(module.examples),
            "noise_multiplier": module.noise_multiplier,
        }
    }


class _Judge:
    """Computes the metrics of held-out examples from a module's outputs."""

    def __init__(self, recipe: Recipe, examples: Sequence[Any], features: Sequence[Any]) -> None:
        self.recipe = recipe
        self.examples = examples
        self.features = features

    def __call__(self, outputs: list[Any]) -> dict[str, float]:
        predictions = self.recipe.predictions(outputs[: len(self.features)], self.examples, self.features)
        return self.recipe.metrics(self.recipe.lines(predictions, self.examples))


def _evaluate(
    task: Task, options: Namespace, folder: RunFolder, prepared: Prepared, trainer: Trainer, metrics: dict[str, Any]
) -> None:
    """Evaluate the saved model on the test examples; write and print the results."""
    texts = prepared.recipe.options
    predictor = Predictor.load(folder.model, task, texts, trainer.strategy.root_device, options.tokens_per_batch)
    test = prepared.examples.test
    lines = predictor.recipe.lines(predictor(test), test)
    write_predictions(folder.path / _PREDICTIONS, lines)
    known = all(map(predictor.recipe.reference, test))  # GLUE's test examples, for example, have no answers
    metrics["test"] = predictor.recipe.metrics(lines) if known else {}
    metrics["baselines"] = predictor.recipe.baselines(prepared.examples.train, test) if known else {}
    folder.write_metrics(metrics)
    report = FineTuningReport(metrics, predictor.recipe, test, lines)
    report.write(folder.path / _REPORT, folder.curve, folder.path / _CONFUSION)
    print(report.table())
    print(summary_text(metrics))
    print(printable_line(f"report: {folder.path / _REPORT}   predictions: {folder.path / _PREDICTIONS}"))


def write_predictions(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write predictions as JSON lines; no partial file is left on an error."""
    with atomic_file(path) as file:
        for line in lines:
            file.write(json_text(line).encode() + b"\n")
