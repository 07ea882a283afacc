"""Every command that loads a model says in one line which folder has a damaged file."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from training.tasks import TINY

from fastformer import cli
from fastformer.data.pretraining.tokenizer import train_tokenizer
from fastformer.training.starting_point import Task, from_scratch

DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "random bytes": lambda path: path.write_bytes(random.Random(0).randbytes(200)),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a list": lambda path: path.write_text("[1]"),
    "deep": lambda path: path.write_text('{"x":' + "[" * 100_000),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "missing": lambda path: path.unlink(),
}
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
OPTIONAL = {("tokenizer_config.json", "a folder"), ("tokenizer_config.json", "missing")}
"""Faults that are no error, because transformers treats such a file as absent."""


def save(folder: Path, task: Task) -> None:
    tokenizer = train_tokenizer(["some words"], 300, "clm" if task == "generate" else "mlm")
    labels = ["a", "b"] if task == "classify" else None
    shape = TINY | {"num_hidden_layers": 2}
    from_scratch("bert-tiny", task, tokenizer, 64, labels, **shape).model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"task": "classify", "max_length": 128, "text": {}, "trainer": {}})
    )
    (folder / "data.jsonl").write_text('{"text": "some"}\n')


COMMANDS: dict[str, tuple[Task, Callable[[Path], list[Any]]]] = {
    "generate": ("generate", lambda run: [run / "model", "--prompt", "some", "--max_new_tokens", "1"]),
    "predict": ("classify", lambda run: [run, "--data", run / "data.jsonl", "--out", run / "out.jsonl"]),
    "explain": ("classify", lambda run: [run / "model", "--text", "some", "--out", run / "out"]),
    "convert": ("generate", lambda run: [run / "model", run / "out", "--to", "gpt2"]),
    "verify": ("generate", lambda run: [run / "model"]),
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


CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a layer without weights": ({"num_hidden_layers": 3}, r"layers\.2\."),
    "fewer layers": ({"num_hidden_layers": 1}, "model.layers."),
    "a smaller vocabulary": ({"vocab_size": 10}, "vocab_size|embeddings.word.weight"),
    "a word for a number": ({"hidden_size": "x"}, "hidden_size"),
    "an unknown type": ({"dtype": "foo"}, "foo"),
    "a number for a type": ({"dtype": 3}, "dtype"),
    "no head": ({"num_attention_heads": 0}, "num_attention_heads"),
    "a number for a list": ({"layer_types": 3}, "layer_types"),
    "a number for names": ({"architectures": 3}, "architectures"),
}
LOADING: dict[str, tuple[Task, Callable[[Path], list[Any]]]] = {
    **COMMANDS,
    "finetune": (
        "classify",
        lambda run: ["classify", "--model", run / "model", "--data", run, "--output", run / "out"],
    ),
}


@pytest.mark.parametrize("kind", CONFIGURATIONS)
@pytest.mark.parametrize("command", LOADING)
def test_configurations_of_other_weights_are_refused(
    command: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    task, arguments = LOADING[command]
    fields, named = CONFIGURATIONS[kind]
    save(tmp_path, task)
    for split in ("train", "validation", "test"):
        rows = "".join(f'{{"text": "{split} {n}", "label": "{"ab"[n % 2]}"}}\n' for n in range(4))
        (tmp_path / f"{split}.jsonl").write_text(rows)
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    capsys.readouterr()
    assert cli.main([command, *map(str, arguments(tmp_path))]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1 and str(tmp_path / "model") in error[0], error
    assert re.search(named, error[0]), error


NUMBERS = ("-1", "0", "nan", "inf", "1e30", "100000000000000000000000", "1.5", "a")
OPTIONS: dict[str, dict[str, str]] = {  # the numbers that each option accepts
    "generate": {
        "--max_new_tokens": "",
        "--top_k": "",
        "--seed": "0",
        "--slots": "",
        "--page_size": "",
        "--pages": "",
        "--draft_tokens": "",
        "--temperature": "0 1e30 100000000000000000000000 1.5",
        "--top_p": "",
        "--min_p": "0",
        "--repetition_penalty": "1e30 100000000000000000000000 1.5",
        "--device": "",
    },
    "predict": {"--beams": "", "--tokens_per_batch": "", "--device": ""},
    "explain": {"--steps": ""},
    "verify": {"--device": ""},
}


@pytest.mark.parametrize("command", OPTIONS)
def test_numbers_that_mean_nothing_are_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    task, arguments = COMMANDS[command]
    save(tmp_path, task)
    for option, accepted in OPTIONS[command].items():
        for number in set(NUMBERS) - set(accepted.split()):
            capsys.readouterr()
            try:
                status = cli.main([command, *map(str, arguments(tmp_path)), f"{option}={number}"])
            except SystemExit as exit:
                status = exit.code
            error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
            assert status == 2 and len(error) == 1, (option, number, error)
            assert (option.strip("-") in error[0] and "must be" in error[0]) or "invalid" in error[0], error
            assert number in error[0] or str(float(number)) in error[0], error
