"""Faults in the examples of a fine-tuning run are found before it trains, with the file and the line."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from training.tasks import MAKERS, command, scratch

from fastformer import cli


def write(folder: Path, **splits: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(task: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [MAKERS[task](draw) for _ in range(count)]


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*arguments: Any, **named: Any) -> None:
        raise AssertionError("it trains")

    monkeypatch.setattr("lightning.pytorch.Trainer.fit", fit)


LABELLED, UNLABELLED = {"text": "A bird.", "label": "positive"}, {"text": "A bird."}
UNKNOWN = {"text": "A bird.", "label": "neither"}
LONG = {"id": "1", "question": "Which colour? " * 30, "context": "Red.", "answers": {"text": [], "answer_start": []}}
OTHER_TAG = {"tokens": ["a", "b"], "tags": ["O", "B-OTHER"]}


@pytest.mark.parametrize(
    ("task", "split", "bad", "message"),
    [
        ("classify", "test", [LABELLED, UNKNOWN], "line 2: label 'neither' is not among .* accepted are the classes"),
        ("classify", "validation", [LABELLED, UNKNOWN], "line 2: label 'neither' is not among"),
        ("classify", "test", [LABELLED, {"text": "A bird.", "label": -1}], "line 2: this test example has no"),
        ("classify", "test", [LABELLED, UNLABELLED], "line 2: this test example has no known answer, but .*1"),
        ("classify", "test", [{"text": "A bird.", "score": 0.5}], "line 1: label 0.5 is not among"),
        (
            "classify",
            "test",
            [LABELLED, {**LABELLED, "text_pair": "A."}],
            "line 2: found a second text, but .*line 1",
        ),
        ("classify", "validation", [LABELLED, UNLABELLED], "line 2: no label or score; found text; accepted are"),
        ("classify", "train", [LABELLED, UNLABELLED], "line 2: no label or score; found text; accepted are"),
        (
            "classify",
            "train",
            [LABELLED, {"text": "A bird.", "score": 1}],
            "line 2: found a score, 1.0, but .*line 1",
        ),
        ("tag", "validation", [OTHER_TAG], "line 1: tags B-OTHER are not among"),
        ("tag", "test", [OTHER_TAG], "line 1: tags B-OTHER are not among"),
        ("qa", "test", [LONG], "line 1: question '1' has .* leaves no room"),
        ("summarize", "validation", [{"document": "A."}], "line 1: no summary; found document"),
        ("translate", "train", [{"en": "one", "fr": "un"}], "line 1: no text in 'de'; found en, fr"),
    ],
)
def test_refused_before_training(
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    no_training: None,
    task: str,
    split: str,
    bad: list[dict[str, Any]],
    message: str,
) -> None:
    splits = {"train": rows(task, 40), "validation": rows(task, 8, 1), "test": rows(task, 8, 2)}
    write(tmp_path / task, **{**splits, split: bad})
    assert cli.main([*command(task, tmp_path, tmp_path / "run"), *scratch()]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert re.search(rf"{split}\.jsonl, {message}", line), line


@pytest.mark.parametrize("task", MAKERS)
def test_three_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    """Few examples are refused before training, or are enough for all that follows it."""
    begun = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda *arguments, **named: (begun.append(1), fit(*arguments, **named)))
    for number in (1, 2, 3, 5):
        write(tmp_path / str(number) / task, train=rows(task, number))
        arguments = [*command(task, tmp_path / str(number), tmp_path / f"run {number}"), *scratch("--max_steps=1")]
        status = cli.main(arguments)
        assert status == (0 if begun else 2)
        assert number > 2 or (status == 2 and "different texts are too few" in capsys.readouterr().err)
        begun.clear()


def test_hidden_labels_are_predicted(tmp_path: Path) -> None:
    """Examples with hidden labels are predicted.

    GLUE's test examples from the library `datasets` have -1 for a hidden label.
    """
    hidden = [{**row, "label": -1} for row in rows("classify", 5, 2)]
    write(tmp_path / "classify", train=rows("classify", 40), validation=rows("classify", 8, 1), test=hidden)
    with pytest.warns(UserWarning, match="no test example has a known answer"):
        assert cli.main([*command("classify", tmp_path, tmp_path / "run"), *scratch("--max_steps=1")]) == 0
    assert json.loads((tmp_path / "run/metrics.json").read_text())["test"] == {}
    predictions = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    assert [set(line) for line in predictions] == [{"prediction", "probabilities"}] * 5
    arguments = ["--data", str(tmp_path / "classify/test.jsonl"), "--out", str(tmp_path / "again.jsonl")]
    assert cli.main(["predict", str(tmp_path / "run"), *arguments]) == 0
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "run/predictions.jsonl").read_text()


def test_classes_are_those_of_all_examples(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A run has the classes of all examples. The drawn examples may lack some; the others are judged all the same."""
    examples = [{"text": f"number {number}", "label": number % 12} for number in range(120)]
    write(tmp_path / "classify", train=examples, validation=examples[:24], test=examples[:24])
    few = scratch("--max_train_examples=3", "--max_steps=1")
    assert cli.main([*command("classify", tmp_path, tmp_path / "run"), *few]) == 0
    classes = json.loads((tmp_path / "run/model/config.json").read_text())["id2label"]
    assert list(classes.values()) == [str(number) for number in range(12)]
    assert cli.main([*command("classify", tmp_path, tmp_path / "other"), *few, "--class_weights", "balanced"]) == 2
    assert "--class_weights balanced: no training example has" in capsys.readouterr().err


SYSTEM_REFUSED = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
)


def test_conversations(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    """A conversation may begin with the assistant. The error says what a template refuses."""
    first = {"messages": [{"role": role, "content": "red"} for role in ("assistant", "user", "assistant")]}
    splits = {"train": [*rows("generate", 40), first], "validation": rows("generate", 8, 1), "test": [first]}
    write(tmp_path / "generate", **splits)
    run = tmp_path / "run"
    assert cli.main([*command("generate", tmp_path, run), *scratch("--max_steps=1")]) == 0
    settings = json.loads((run / "model/tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (run / "model/chat_template.jinja").write_text(SYSTEM_REFUSED)
    (run / "model/tokenizer_config.json").write_text(json.dumps(settings))
    system = {"messages": [{"role": role, "content": "red"} for role in ("system", "user", "assistant")]}
    for split in splits:
        write(tmp_path / split / "generate", **{**splits, split: [splits[split][0], system]})
        arguments = [*command("generate", tmp_path / split, tmp_path / "other"), "--model", str(run / "model")]
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"{split}.jsonl, line 2: the tokenizer's chat template does not accept it: no system role" in error
    out = ["--out", str(tmp_path / "out.jsonl")]
    assert cli.main(["predict", str(run), "--data", str(tmp_path / "test/generate/test.jsonl"), *out]) == 2
    assert "test.jsonl, line 2: the tokenizer's chat template does not accept it" in capsys.readouterr().err
