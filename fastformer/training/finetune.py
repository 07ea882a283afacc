"""The command ``fastformer finetune TASK``: data, output layer, training and evaluation, and a report of it."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from jsonargparse import Namespace
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import AutoConfig

from fastformer.console import json_text, printable_line
from fastformer.data.examples import Examples, Splits, place_of
from fastformer.data.files import atomic_file
from fastformer.data.readers import find_splits
from fastformer.data.sets import DEFAULT_SETS, SETS, load_set
from fastformer.data.shapes import FewShapes
from fastformer.data.splitting import split_examples
from fastformer.data.tokenizer import load_tokenizer, text_fingerprint, train_tokenizer
from fastformer.extras import require
from fastformer.models import PRESETS, FastformerConfig
from fastformer.training.adversarial import Adversary
from fastformer.training.batches import FineTuningData
from fastformer.training.callbacks import (
    CompileModel,
    EarlyStopping,
    LossCurve,
    SavePretrained,
    StepSeed,
    StopAtLimit,
    Throughput,
    TrainingProgress,
)
from fastformer.training.checkpoints import ValidationCheckpoint, latest_checkpoint
from fastformer.training.cuda_graphs import RecordSteps
from fastformer.training.finetuning import Classification, FineTuning
from fastformer.training.finite import FiniteLosses
from fastformer.training.folder import RunFolder
from fastformer.training.interruption import StopOnSignal
from fastformer.training.lora import Lora
from fastformer.training.memory import PeakMemory
from fastformer.training.optimization import Optimization
from fastformer.training.prediction import Predictor, position_limit, recipe_for, room
from fastformer.training.privacy import Privacy
from fastformer.training.recipes import RECIPES, Recipe, Rewrite, TextOptions, balanced_class_weights
from fastformer.training.report import FineTuningReport
from fastformer.training.run import (
    SaveOptions,
    add_trainer_arguments,
    build_trainer,
    classes_allowed,
    command_parser,
    parse,
    quieten,
    resumable,
    summary,
    summary_text,
)
from fastformer.training.starting_point import CLASSES, StartingPoint, Task, from_scratch, pretrained, untrained

PRETRAINED = Path("runs/pretrain/model")
"""What fine-tuning starts from where nothing else is said, if it is there and fits the task."""

_DESCRIPTION = """\
Fine-tune a model on a task: {tasks}.
Without any option: on data that needs no download, from runs/pretrain/model if it is there and fits, otherwise from
scratch by --preset; in minutes on two CPU cores, into runs/{task}.

examples:
  fastformer finetune {task}
  fastformer finetune {task} --data folder/ --model folder/of/a/hugging-face/model --epochs 5 --patience 3
  fastformer finetune {task} --lora --adapter.rank 16 --optimizer.learning_rate 1e-3
  fastformer finetune {task} --adversarial fgm --optimizer.layer_decay 0.9
  fastformer finetune {task} --devices 8 --strategy fsdp2 --precision bf16-mixed --accumulate 4     # or ddp
  fastformer finetune {task} --precision bf16-mixed --cuda_graphs                                   # on one GPU
  fastformer finetune {task} --resume              # continue the run in runs/{task} exactly where it stopped

what --output holds:
  config.yaml     every option of the run          model/              Hugging Face format, or PEFT's adapter
  checkpoints/    the two newest, for --resume     loss.png            loss in training and on held-out examples
  logs/           CSV and TensorBoard              metrics.json        what is printed at the end
  report.md       all of this to read              predictions.jsonl   for the test examples
  manifest.json   what of all this is the run's
Only what the manifest lists is ever replaced, and one process at a time writes. Ctrl-C, SIGTERM and SIGUSR1 save a
checkpoint after the step at hand, and say how to go on. A run resumes with the same examples and tokenizer alone.
"""

_BEST, _PREDICTIONS, _REPORT, _CONFUSION = "best.pt", "predictions.jsonl", "report.md", "confusion.png"


def main(arguments: list[str], begin: float) -> None:
    """Run ``fastformer finetune``.

    Args:
        arguments: those of the command line after ``finetune``.
        begin: `time.monotonic()` when the command started.

    Raises:
        ValueError, OSError: in what the user gave.
    """
    tasks = ", ".join(RECIPES)
    if arguments[:1] in (["--help"], ["-h"]):
        arguments = ["classify", *arguments]
    if not arguments or arguments[0] not in RECIPES:
        raise ValueError(f"name a task first: {tasks}; got {arguments[0] if arguments else 'nothing'}")
    task = cast(Task, arguments[0])
    quieten()
    parser = build_parser(task)
    with classes_allowed(arguments):
        options = parse(parser, arguments[1:])
        for wanted, package in ((options.lora, "peft"), (options.privacy_epsilon, "opacus")):
            if wanted:
                require(package)
        folder = run_folder(Path(options.output))
        inputs = {"--model": options.model, "--data": None if options.data in SETS else options.data}
        paths = {option: [Path(given)] for option, given in inputs.items() if given is not None}
        try:
            with resumable(f"finetune {task}", folder, options, paths) as stop:
                seed_everything(options.seed, workers=True, verbose=False)
                _finetune(task, parser, options, arguments, folder, stop, begin)
        except MisconfigurationException as error:
            raise ValueError(str(error)) from error


class _Usual(NamedTuple):
    """What options are unless given: with it a task's own set is learnt in minutes on two CPU cores."""

    epochs: int = 3
    vocab_size: int = 8192
    tokens_per_batch: int = 4096


_USUAL: dict[Task, _Usual] = {
    "tag": _Usual(epochs=10, vocab_size=4096, tokens_per_batch=1024),
    "qa": _Usual(epochs=2, vocab_size=4096, tokens_per_batch=2048),
    "summarize": _Usual(epochs=12, vocab_size=2048, tokens_per_batch=2048),
    "translate": _Usual(epochs=10, vocab_size=4096, tokens_per_batch=2048),
    "embed": _Usual(epochs=10),
}


def run_folder(path: Path) -> RunFolder:
    """Where a fine-tuning run keeps what."""
    return RunFolder(path, "fine-tuning", (_BEST, _PREDICTIONS, _REPORT, _CONFUSION))


def build_parser(task: Task) -> LightningArgumentParser:
    """The options of the command for a task."""
    description = _DESCRIPTION.format(task=task, tasks=", ".join(RECIPES))
    parser = command_parser(f"finetune {task}", description, f"runs/{task}")
    usual = _USUAL.get(task, _Usual())
    add = parser.add_argument
    add("--task", choices=(task,), default=task, help="the task; to recognise a run by")
    add(
        "--data",
        type=str,
        default=DEFAULT_SETS[task],
        metavar="SET|PATH",
        help=_DATA_HELP.format(", ".join(_sets(task))),
    )
    add("--model", type=str | None, metavar="DIR", help=_MODEL_HELP)
    add("--from_scratch", action="store_true", help=_SCRATCH_HELP)
    add("--preset", type=str, default="bert-tiny", help=f"size of a model from scratch: {', '.join(PRESETS)}")
    add("--overrides", type=dict[str, Any], default={}, help="fields of a model from scratch that differ from --preset")
    add("--vocab_size", type=int, default=usual.vocab_size, help="of the tokenizer trained for a model from scratch")
    add("--max_train_examples", type=int | None, metavar="N", help=_EXAMPLES_HELP)
    add("--epochs", type=int, default=usual.epochs, metavar="N", help="passes over the examples")
    add("--max_steps", type=int, default=-1, metavar="N", help="optimizer steps, if fewer than --epochs has")
    add(
        "--tokens_per_batch",
        type=int,
        default=usual.tokens_per_batch,
        help="the most tokens in a batch of one device",
    )
    add("--evaluate_every", type=int, default=100, metavar="N", help=_EVALUATE_HELP)
    add("--patience", type=int | None, metavar="N", help="stop after so many evaluations without a better one")
    add("--monitor", type=str, default="loss", help="the metric that --patience looks at")
    add("--class_weights", type=str | list[float] | None, help=_WEIGHTS_HELP)
    add("--lora", action="store_true", help="train small matrices beside the frozen weights, by PEFT; see --adapter")
    add("--adversarial", choices=("fgm", "pgd"), help="train on moved word embeddings too; see --adversary")
    add("--privacy_epsilon", "--privacy-epsilon", type=float | None, help="train privately, by Opacus; see --privacy")
    add("--activation_checkpointing", action="store_true", help="compute blocks twice to spare memory")
    add("--seed", type=int, default=0, help="of new weights, the order of the data, dropout and noise")
    add("--num_workers", type=int, default=0, help="processes that prepare batches")
    add("--cache_dir", type=str | None, help="for data; default: $FASTFORMER_CACHE or ~/.cache/fastformer")
    parser.add_class_arguments(TextOptions, "text", instantiate=False)
    parser.add_argument("--optimizer.learning_rate", type=float | None, help=_RATE_HELP)
    parser.add_class_arguments(Optimization, "optimizer", instantiate=False, skip={"learning_rate"})
    parser.add_class_arguments(Lora, "adapter", instantiate=False)
    parser.add_class_arguments(Adversary, "adversary", instantiate=False, skip={"method"})
    parser.add_class_arguments(Privacy, "privacy", instantiate=False, skip={"epsilon"})
    add_trainer_arguments(parser)
    parser.link_arguments("epochs", "trainer.max_epochs")
    return parser


_DATA_HELP = (
    "a set ({}), a folder with train, validation and test files in the layouts of GLUE, SQuAD, CoNLL, XSum or WMT, "
    "tables or JSON lines, or one such file, of which a tenth each is held out for validation and for the test; all "
    "questions about a context stay together"
)
_MODEL_HELP = (
    f"what to start from: a folder of a Hugging Face model, ours or any other. Default: {PRETRAINED} if it fits the "
    "task, else none"
)
_WEIGHTS_HELP = "balanced, or a number for each class: in order of value where they are numbers, else of letters"
_SCRATCH_HELP = (
    "of --model, take the tokenizer and the architecture, with new weights: what its pretraining is worth; without "
    "--model, train a tokenizer and take --preset"
)
_EXAMPLES_HELP = "train on no more examples than this, drawn at random with --seed"
_EVALUATE_HELP = "measure on held-out examples, and save a checkpoint, each this many optimizer steps"
_RATE_HELP = "the peak. Default: 0.0384 / hidden size, 5e-5 for bert-base; ten times that from scratch or with --lora"


def _sets(task: Task) -> list[str]:
    return [name for name, labelled in SETS.items() if labelled.task == task]


# --- The four steps ---------------------------------------------------------------------------------------------------


class _Prepared(NamedTuple):
    examples: Splits[Any]
    start: StartingPoint
    recipe: Recipe
    train: list[Any]  # features
    validation: list[Any]
    source: str  # what was started from, in words


def _finetune(
    task: Task,
    parser: LightningArgumentParser,
    options: Namespace,
    arguments: Sequence[str],
    folder: RunFolder,
    stop: StopOnSignal,
    begin: float,
) -> None:
    prepared = _prepare(task, options, arguments)
    learnt_from = _fingerprints(prepared)
    if options.resume:
        folder.check_data(learnt_from)
    module = _module(prepared, options)
    checkpoint = None
    if options.resume:
        checkpoint = latest_checkpoint(folder.checkpoints, lambda content: module.state_dict(), folder.run)
    data = _data(prepared, module, options)
    throughput, curve = Throughput(), LossCurve(folder.curve)
    finite = FiniteLosses(folder.checkpoints, options.skip_nonfinite)
    stop.saves = ValidationCheckpoint(folder.checkpoints)
    stopping = []
    if options.patience is not None:
        mode = "min" if options.monitor in ("loss", "perplexity") else "max"
        stopping = [EarlyStopping(folder.path / _BEST, options.monitor, mode, options.patience, lambda: folder.run)]  # type: ignore[arg-type]
    trainer_arguments = parser.instantiate(options).trainer
    if options.privacy_epsilon is not None:
        trainer_arguments.gradient_clip_val = None  # clipping is the mechanism's, of each example's gradient
    trainer = build_trainer(
        trainer_arguments,
        folder,
        [
            SaveOptions(folder, parser, options, learnt_from),
            finite,
            StepSeed(options.seed),
            StopAtLimit(options.max_minutes),
            throughput,
            PeakMemory(),
            TrainingProgress(),
            *([CompileModel()] if options.compile else []),
            *([RecordSteps()] if options.cuda_graphs else []),
            curve,
            *stopping,
            stop.saves,
            stop,
            SavePretrained(folder.model, not options.adapter.merge, folder.claim_model),
        ],
    )
    _check_trainer(trainer, options)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    if stopping or (curve.validation and curve.validation[-1]["step"] != trainer.global_step):
        trainer.validate(module, datamodule=data, verbose=False)
    if trainer.is_global_zero:
        metrics = {
            "task": task,
            **summary(trainer, module, throughput, curve, finite, folder, time.monotonic() - begin),
            "trained_parameters": sum(weight.numel() for weight in module.parameters() if weight.requires_grad),
            "started_from": prepared.source,
            "attention": prepared.start.attention,
            "examples": {part: len(found) for part, found in prepared.examples._asdict().items()},
            **_privacy(module),
        }
        _evaluate(task, options, folder, prepared, trainer, metrics)


def _check_trainer(trainer: Trainer, options: Namespace) -> None:
    """Refuse what would not be what it says."""
    if options.privacy_epsilon is None:
        return
    if trainer.world_size > 1 or isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError(
            "--privacy_epsilon is for one device with whole weights, where the gradient of each example is clipped; "
            f"got --devices {options.devices} --strategy {options.strategy}"
        )
    if trainer.precision == "16-mixed":
        raise ValueError("--privacy_epsilon is not for --precision 16-mixed, whose scaler clips anew")


def _prepare(task: Task, options: Namespace, arguments: Sequence[str]) -> _Prepared:
    """Data and output layer. Lengths that were not given become the model's, if it has fewer positions."""
    texts = TextOptions(**options.text.as_dict())
    kind = RECIPES[task]
    examples = load_examples(task, options.data, texts, options.cache_dir)
    labels = kind.label_names(examples.train)
    if options.max_train_examples is not None:
        drawn = _drawn(cast(Examples[Any], examples.train), options.max_train_examples, options.seed)
        examples = examples._replace(train=drawn)
    if task == "classify" and labels is None:
        labels = ["value"]  # one output is a regression's
    model_folder = _model_folder(task, options)
    if model_folder is not None:
        start = (untrained if options.from_scratch else pretrained)(model_folder, task, labels)
        tokenizer = load_tokenizer(model_folder)
        source = f"scratch, in the shape of {model_folder}" if options.from_scratch else str(model_folder)
    else:
        corpus = (text for example in examples.train for text in kind.texts(example))
        tokenizer = train_tokenizer(corpus, options.vocab_size, kind.tokenizer_objective)
        longest = max(texts.max_length, texts.max_target_length)
        if kind.tokenizer_objective == "clm":
            longest += texts.max_target_length  # what is generated follows the prompt
        start = from_scratch(options.preset, task, tokenizer, longest, labels, **options.overrides)
        source = f"scratch, {options.preset}"
    if options.activation_checkpointing:
        start.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    texts = _fitting("max_length", position_limit(start.model), options, arguments)
    recipe = recipe_for(task, start, texts, tokenizer)
    if isinstance(recipe, Rewrite):
        left = room(start.model, recipe.prompts(examples.test))
        recipe = replace(recipe, options=_fitting("max_target_length", left, options, arguments))
    train, validation = recipe.features(examples.train), recipe.features(examples.validation)
    _check_test(recipe, examples.test)
    return _Prepared(examples, start, recipe, train, validation, source)


def _fitting(name: str, limit: int | None, options: Namespace, arguments: Sequence[str]) -> TextOptions:
    """The options of texts, of which the one of this name is no longer than the model has positions for.

    Raises:
        ValueError: it is, and was given.
    """
    length = options.text[name]
    if limit is not None and length > limit:
        named = any(argument.partition("=")[0] == f"--text.{name}" for argument in arguments)
        if named or length != getattr(TextOptions(), name):
            raise ValueError(
                f"--text.{name} must be at most {limit}, the positions that the model has for it; got {length}"
            )
        warnings.warn(f"--text.{name} is {limit}, not {length}: the model has no more positions", stacklevel=2)
        options.text[name] = limit
    return TextOptions(**options.text.as_dict())


def _fingerprints(prepared: _Prepared) -> dict[str, str]:
    """Of the examples, the names of their classes or tags, and the tokenizer: a run goes on with the same alone."""
    recipe = prepared.recipe
    parts: dict[str, Iterable[Any]] = {f"{part} examples": found for part, found in prepared.examples._asdict().items()}
    parts["label names"] = recipe.labels or ()
    texts = {name: map(repr, values) for name, values in parts.items()}
    tokenizer = text_fingerprint([recipe.tokenizer.backend_tokenizer.to_str()])
    return {**{name: text_fingerprint(values) for name, values in texts.items()}, "the tokenizer's tokens": tokenizer}


def _check_test(recipe: Recipe, test: Sequence[Any]) -> None:
    """What would be found after training is found before it."""
    recipe.check(test)
    known = [bool(recipe.reference(example)) for example in test]
    if not any(known):
        warnings.warn("no test example says what is right: all are predicted, and nothing is measured", stacklevel=2)
    elif not all(known):
        without, told = known.index(False), known.index(True)
        raise ValueError(
            f"{place_of(test, without)}: this test example does not say what is right, where {place_of(test, told)} "
            "does; give it for all or for none"
        )


def _data(prepared: _Prepared, module: FineTuning, options: Namespace) -> FineTuningData:
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


def load_examples(task: Task, data: str, options: TextOptions, cache_dir: str | None = None) -> Splits[Any]:
    """The examples of a set or of files; without validation or test files a tenth of the training examples each.

    Args:
        task: that they are for.
        data: name of a set, a file, or a folder with files for each split.
        options: of its texts.
        cache_dir: where sets are.

    Raises:
        FileNotFoundError: there is no such set or path.
        ValueError: the set is for another task, or a file cannot be read.
    """
    if data in SETS:
        if SETS[data].task != task:
            raise ValueError(f"--data {data} is for {SETS[data].task}, not for {task}; there are {_sets(task)}")
        return Splits(*(_of_set(data, part) for part in load_set(data, cache_dir, options.languages[1])))
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(f"--data {data} is neither a set ({', '.join(_sets(task))}) nor a file or folder")
    files = find_splits(path) if path.is_dir() else {"train": [path]}
    read = {split: _read(task, found, options, targets=split != "test") for split, found in files.items()}
    kind = RECIPES[task]
    if "test" in read:
        read["test"] = kind.to_predict(read["test"], kind.label_names(read["train"]))
    if "validation" in read and "test" in read:
        return Splits(read["train"], read["validation"], read["test"])
    try:
        drawn = split_examples(read["train"], kind.names, kind.given)
    except ValueError as error:
        raise ValueError(f"--data {data}: {error}") from error
    if "validation" not in read and "test" not in read:
        return drawn
    kept = _joined([drawn.train, drawn.test if "test" in read else drawn.validation])
    return Splits(kept, read.get("validation", drawn.validation), read.get("test", drawn.test))


def _of_set(name: str, part: Sequence[Any]) -> Examples[Any]:
    return Examples((f"{name}, example {number}", example) for number, example in enumerate(part, 1))


def _read(task: Task, files: Sequence[Path], options: TextOptions, targets: bool) -> Examples[Any]:
    return _joined([RECIPES[task].read(file, options, targets) for file in files])


def _joined(parts: Sequence[Any]) -> Examples[Any]:
    return Examples(pair for part in parts for pair in zip(part.places, part, strict=True))


def _drawn(examples: Examples[Any], count: int, seed: int) -> Examples[Any]:
    """At most `count` examples, without repetition."""
    if count < 1:
        raise ValueError(f"--max_train_examples must be at least 1; got {count}")
    return examples.part(random.Random(seed).sample(range(len(examples)), min(count, len(examples))))


def _model_folder(task: Task, options: Namespace) -> Path | None:
    """What is given, or the folder of a pretraining run whose stack the task can use."""
    if options.model is not None:
        if options.overrides:
            raise ValueError(
                f"--overrides is for a model from scratch by --preset; --model {options.model} has its own"
            )
        return Path(options.model)
    if options.from_scratch or options.overrides or not (PRETRAINED / "config.json").is_file():
        return None
    config = AutoConfig.from_pretrained(PRETRAINED, trust_remote_code=False)
    fits = isinstance(config, FastformerConfig) and config.stack in CLASSES[task].ours._stacks
    if task == "qa" and fits:  # rotary positions, from scratch, need far fewer steps than learned ones
        fits = config.position_embedding in ("rotary", "relative")
    return PRETRAINED if fits else None


def _module(prepared: _Prepared, options: Namespace) -> FineTuning:
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
    given = options.optimizer.as_dict()
    if given["learning_rate"] is None:
        much = options.lora or start.new_layers is None
        given["learning_rate"] = (0.384 if much else 0.0384) / start.model.config.hidden_size
    return Optimization(**{**given, "betas": tuple(given["betas"])})


def _privacy_of(options: Namespace) -> Privacy | None:
    if options.privacy_epsilon is None:
        return None
    return Privacy(options.privacy_epsilon, **options.privacy.as_dict())


def _privacy(module: FineTuning) -> dict[str, Any]:
    """What was spent, for the report."""
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


# --- Evaluation and report --------------------------------------------------------------------------------------------


class _Judge:
    """The metrics of held-out examples, from a module's outputs."""

    def __init__(self, recipe: Recipe, examples: Sequence[Any], features: Sequence[Any]) -> None:
        self.recipe = recipe
        self.examples = examples
        self.features = features

    def __call__(self, outputs: list[Any]) -> dict[str, float]:
        predictions = self.recipe.predictions(outputs[: len(self.features)], self.examples, self.features)
        return self.recipe.metrics(self.recipe.lines(predictions, self.examples))


def _evaluate(
    task: Task, options: Namespace, folder: RunFolder, prepared: _Prepared, trainer: Trainer, metrics: dict[str, Any]
) -> None:
    """On the test examples, with the model as it was saved."""
    texts = prepared.recipe.options
    predictor = Predictor.load(folder.model, task, texts, trainer.strategy.root_device, options.tokens_per_batch)
    test = prepared.examples.test
    lines = predictor.recipe.lines(predictor(test), test)
    write_predictions(folder.path / _PREDICTIONS, lines)
    known = all(map(predictor.recipe.reference, test))  # GLUE's test examples, for one, are not
    metrics["test"] = predictor.recipe.metrics(lines) if known else {}
    metrics["baselines"] = predictor.recipe.baselines(prepared.examples.train, test) if known else {}
    folder.write_metrics(metrics)
    report = FineTuningReport(metrics, predictor.recipe, test, lines)
    report.write(folder.path / _REPORT, folder.curve, folder.path / _CONFUSION)
    print(report.table())
    print(summary_text(metrics))
    print(printable_line(f"report: {folder.path / _REPORT}   predictions: {folder.path / _PREDICTIONS}"))


def write_predictions(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """As JSON lines, whole or not at all."""
    with atomic_file(path) as file:
        for line in lines:
            file.write(json_text(line).encode() + b"\n")
