"""Every command that loads a model says in one line which folder has a damaged file."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training.tasks import TINY

from fastformer import cli
from fastformer.data.tokenizer import train_tokenizer
from fastformer.training.starting_point import Task, from_scratch

DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "random bytes": lambda path: path.write_bytes(random.Random(0).randbytes(200)),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a list": lambda path: path.write_text("[1]"),
    "deep": lambda path: path.write_text('{"x":' + "[" * 100_000),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
OPTIONAL = {("tokenizer_config.json", "a folder")}
"""Taken by transformers as if it were not there."""


def save(folder: Path, task: Task) -> None:
    tokenizer = train_tokenizer(["some words"], 300, "clm" if task == "generate" else "mlm")
    labels = ["a", "b"] if task == "classify" else None
    from_scratch("bert-tiny", task, tokenizer, 64, labels, **TINY).model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(yaml.safe_dump({"task": "classify", "text": {}}))
    (folder / "data.jsonl").write_text('{"text": "some"}\n')


COMMANDS: dict[str, tuple[Task, Callable[[Path], list[Any]]]] = {
    "generate": ("generate", lambda run: [run / "model", "--prompt", "some", "--max_new_tokens", "1"]),
    "predict": ("classify", lambda run: [run, "--data", run / "data.jsonl", "--out", run / "out.jsonl"]),
    "explain": ("classify", lambda run: [run / "model", "--text", "some", "--out", run / "out"]),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("file", FILES)
def test_damaged_models_are_refused(command: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    task, arguments = COMMANDS[command]
    for kind, damage in DAMAGES.items():
        if (file, kind) in OPTIONAL:
            continue
        run = tmp_path / kind
        save(run, task)
        damage(run / "model" / file)
        capsys.readouterr()
        assert cli.main([command, *map(str, arguments(run))]) == 2, kind
        error = [line for line in capsys.readouterr().err.splitlines() if "Warning" not in line]
        assert len(error) == 1 and str(run / "model") in error[0], (kind, error)
