"""Tests of ``fastformer evaluate``: a file of predictions becomes a table, JSON and a picture."""

from __future__ import annotations

import json

import pytest

from fastformer import cli
from fastformer.extras import require

ROWS = {
    "classify": [{"prediction": "a", "reference": "a"}, {"prediction": 1, "reference": "b"}],
    "tag": [{"prediction": ["B-X", "O"], "reference": ["B-X", "O"]}],
    "qa": [{"prediction": "", "references": []}, {"prediction": "dog", "references": ["a dog"]}],
    "summarize": [{"prediction": "a cat", "reference": "a cat"}],
    "translate": [{"prediction": "この値は整数です", "reference": "この値は整数です"}],
    "generate": [{"log_likelihood": -2.0, "tokens": 2, "id": 3}],
    "embed": [{"embedding": [1, 0.0], "positive": [2.0, 0.1]}, {"embedding": [0, 1.0], "positive": [1.0, 0.9]}],
}
PACKAGES = {"tag": "seqeval", "summarize": "rouge_score"}
BEST = {
    "classify": ("accuracy", 0.5),
    "tag": ("f1", 1),
    "qa": ("f1", 100),
    "summarize": ("rouge1", 100),
    "translate": ("bleu", 100),
    "generate": ("perplexity", 2.718281828),
    "embed": ("recall_at_1", 1),
}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


@pytest.mark.quick
@pytest.mark.parametrize("task", ROWS)
def test_every_task(tmp_path, capsys, task):
    if task in PACKAGES:
        require(PACKAGES[task])
    predictions = write(tmp_path / "predictions.jsonl", ROWS[task])
    more = ["--language", "ja"] if task == "translate" else []
    output = tmp_path / "output"
    assert cli.main(["evaluate", predictions, "--task", task, "--output", str(output), "--json", *more]) == 0
    report = json.loads(capsys.readouterr().out)
    name, value = BEST[task]
    assert report["task"] == task
    assert report["examples"] == len(ROWS[task])
    assert report[name] == pytest.approx(value)
    assert json.loads((output / "metrics.json").read_text()) == report
    assert (output / "confusion.png").exists() == (task == "classify")
    assert cli.main(["evaluate", predictions, "--task", task, *more]) == 0
    assert name.replace("_", " ") in capsys.readouterr().out


SCORED = {"prediction": 0.5, "reference": 1}


@pytest.mark.parametrize("first", [SCORED, {"prediction": 1, "reference": 0.5}])
def test_whole_scores_among_others(first, tmp_path, capsys):
    rows = [{"prediction": 1, "reference": 1}, first, {"prediction": 3, "reference": 3}]
    assert cli.main(["evaluate", write(tmp_path / "p.jsonl", rows), "--task", "classify", "--json"]) == 0
    assert "pearson" in json.loads(capsys.readouterr().out)


def test_regression(tmp_path, capsys):
    predictions = write(tmp_path / "p.jsonl", [{"prediction": n, "reference": n + 0.5} for n in range(3)])
    assert cli.main(["evaluate", predictions, "--task", "classify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pearson"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("classify", [{"prediction": "a"}], "line 1: reference must be the name of a class; found fields prediction"),
        (
            "classify",
            [SCORED, {"prediction": "a", "reference": 1}],
            "line 2: prediction must be a number, because other lines have scores, as",
        ),
        (
            "classify",
            [{"prediction": 1, "reference": "1"}, SCORED],
            "line 1: reference must be a number, because other lines have scores",
        ),
        ("tag", [{"prediction": "O", "reference": ["O"]}], "line 1: prediction must be a list of tags; found 'O'"),
        ("qa", [{"prediction": None, "references": []}], 'prediction must be a text, "" for no answer; found None'),
        ("generate", [{"log_likelihood": 1, "tokens": True}], "tokens must be a whole number; found True"),
        ("summarize", [], "holds no predictions"),
    ],
)
def test_bad_predictions(tmp_path, capsys, task, rows, message):
    assert cli.main(["evaluate", write(tmp_path / "p.jsonl", rows), "--task", task]) == 2
    assert message in capsys.readouterr().err


def test_language_is_for_translations(tmp_path, capsys):
    predictions = write(tmp_path / "p.jsonl", ROWS["tag"])
    assert cli.main(["evaluate", predictions, "--task", "tag", "--language", "ja"]) == 2
    assert "--language is for --task translate, not tag" in capsys.readouterr().err
