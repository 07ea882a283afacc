"""The metrics of fine-tuning with default options on test examples, compared with predictions without training."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastformer.benchmarking.measurement import OURS, TIME, Goal, Measurement, Metric
from fastformer.benchmarking.study import MeasuredStudy, Setting

COMMANDS = {
    "qa": "fastformer finetune qa",
    "summarize": "fastformer finetune summarize",
    "translate": "fastformer finetune translate --epochs 4 --overrides.hidden_dropout_prob 0",
    "tag": "fastformer finetune tag",
    "generate": "fastformer finetune generate",
    "embed": "fastformer finetune embed",
}
"""The commands as docs/training.md shows them."""

_METRICS = {
    "qa": {"exact_match": "exact match", "f1": "F1"},
    "summarize": {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L"},
    "translate": {"bleu": "BLEU", "chrf": "chrF"},
    "tag": {"f1": "entity F1"},
    "generate": {"perplexity": "perplexity"},
    "embed": {"recall_at_1": "recall at 1"},
}
_TINY = (
    "--max_steps 2 --vocab_size 400 --overrides.hidden_size 16 --overrides.intermediate_size 32 "
    "--text.max_target_length 4"
)


def measurements(setting: Setting) -> Iterator[Measurement]:
    """Run each command in a new process and folder, and yield the metrics of test examples from its metrics.json."""
    for task, command in list(COMMANDS.items())[: 1 if setting.quick else None]:
        begin = time.monotonic()
        found = _metrics(command, task, setting)
        seconds = time.monotonic() - begin
        yield Measurement("tasks", task, OURS, TIME, [seconds])
        for peer, values in {OURS: found["test"], **found["baselines"]}.items():
            for key, name in _METRICS[task].items():
                if key in values:  # not every baseline has a likelihood
                    metric = Metric(name, "", higher_is_better=name != "perplexity")
                    yield Measurement("tasks", task, peer, metric, [values[key]])


def _metrics(command: str, task: str, setting: Setting) -> dict[str, Any]:
    arguments = [*shlex.split(command)[1:], "--accelerator", "cpu" if setting.device.type == "cpu" else "auto"]
    if setting.quick:
        arguments += _TINY.split()
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-m", "fastformer.cli", *arguments]
        done = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{command} failed: {done.stderr.strip().splitlines()[-1]}")
        metrics: dict[str, Any] = json.loads((Path(folder) / "runs" / task / "metrics.json").read_text())
    return metrics


def _beats(task: str, metric: str, *peers: str) -> list[Goal]:
    return [Goal(task, peer, Metric(metric, "", higher_is_better=True), at_least=1.0) for peer in peers]


STUDY = MeasuredStudy(
    name="tasks",
    title="fine-tuning with default options, compared with predictions that need no training",
    measurements=measurements,
    goals=(
        *_beats("qa", "F1", "the sentence with most words of the question"),
        *_beats("summarize", "ROUGE-L", "the most typical summary"),
        *_beats("translate", "BLEU", "the source as it is", "the commonest translation"),
    ),
    note="Metrics are for test examples. Time is that of the whole command: data, training, evaluation and report.",
)
