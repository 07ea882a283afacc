"""``fastformer finetune`` and ``fastformer predict``: each task from files to a report, options, killed and resumed."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from fastformer import cli
from fastformer.data.tokenizer import train_tokenizer
from fastformer.models import FastformerConfig, FastformerForPreTraining
from fastformer.training.prediction import Predictor, recipe_for
from fastformer.training.recipes import RECIPES, TextOptions
from fastformer.training.starting_point import from_scratch

TESTS = Path(__file__).parent.parent
ANIMALS, GOOD, BAD = ("cat", "dog", "bird", "fish"), ("lovely", "great"), ("awful", "bad")
COLOURS = ("red", "blue", "green", "grey")


def classified(draw: random.Random) -> dict[str, Any]:
    label = draw.choice(["positive", "negative"])
    return {"text": f"A {draw.choice(GOOD if label == 'positive' else BAD)} {draw.choice(ANIMALS)}.", "label": label}


def tagged(draw: random.Random) -> dict[str, Any]:
    animal, colour = draw.choice(ANIMALS), draw.choice(COLOURS)
    return {"tokens": ["the", colour, animal, "runs"], "tags": ["O", "B-COLOUR", "B-ANIMAL", "O"]}


def asked(draw: random.Random) -> dict[str, Any]:
    colour = draw.choice(COLOURS)
    context = f"The {draw.choice(ANIMALS)} is {colour} today."
    answers = {"text": [colour], "answer_start": [context.index(colour)]}
    return {"id": str(draw.random()), "question": "Which colour?", "context": context, "answers": answers}


def summarized(draw: random.Random) -> dict[str, Any]:
    animal = draw.choice(ANIMALS)
    return {"document": f"Today the {animal} runs. It runs far.", "summary": animal}


def translated(draw: random.Random) -> dict[str, Any]:
    colour = draw.choice(COLOURS)
    return {"translation": {"en": f"the {colour} one", "de": colour}}


def conversed(draw: random.Random) -> dict[str, Any]:
    colour = draw.choice(COLOURS)
    return {"prompt": f"Say {colour}.", "completion": colour}


def alike(draw: random.Random) -> dict[str, Any]:
    animal, colour = draw.choice(ANIMALS), draw.choice(COLOURS)
    return {"anchor": f"{animal} {colour} {draw.randint(0, 99)}", "positive": f"{colour} {animal}"}


MAKERS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "classify": classified,
    "tag": tagged,
    "qa": asked,
    "summarize": summarized,
    "translate": translated,
    "generate": conversed,
    "embed": alike,
}
METRICS = {
    "classify": {"accuracy", "precision", "recall", "f1", "mcc", "baseline"},
    "tag": {"f1"},
    "qa": {"exact_match", "f1"},
    "summarize": {"rouge1"},
    "translate": {"bleu", "chrf"},
    "generate": {"perplexity"},
    "embed": {"recall_at_1", "mean_reciprocal_rank"},
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of labelled files for each task."""
    folder = tmp_path_factory.mktemp("labelled")
    for task, make in MAKERS.items():
        for split, count in (("train", 96), ("validation", 16), ("test", 12)):
            draw = random.Random(f"{task} {split}")
            lines = [json.dumps(make(draw)) for _ in range(count)]
            (folder / task).mkdir(exist_ok=True)
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a model to start from: ours, and a BERT of Hugging Face's, with the same tokenizer."""
    texts = [
        text
        for task in ("classify", "tag")
        for line in (data / task / "train.jsonl").read_text().splitlines()
        for text in [json.loads(line).get("text") or " ".join(json.loads(line).get("tokens"))]
    ]
    tokenizer = train_tokenizer(texts, 300)
    torch.manual_seed(0)
    models = {
        "ours": FastformerForPreTraining(
            FastformerConfig(vocab_size=len(tokenizer), max_position_embeddings=48, **TINY)
        ),
        "bert": BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=48, **TINY)),
    }
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp("base") / name
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


def command(task: str, data: Path, output: Path) -> list[str]:
    return [
        *("finetune", task, "--data", str(data / task), "--output", str(output), "--accelerator", "cpu"),
        *("--max_steps", "12", "--evaluate_every", "4", "--tokens_per_batch", "256", "--text.max_length", "48"),
        *("--text.max_target_length", "8", "--text.stride", "8", "--trainer.log_every_n_steps", "2"),
    ]


def scratch(*more: str) -> list[str]:
    fields = {**TINY, "hidden_dropout_prob": 0.05}
    return [
        "--vocab_size",
        "400",
        "--optimizer.learning_rate=0.006",
        *(f"--overrides.{name}={value}" for name, value in fields.items()),
        *more,
    ]


def metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The output folder of an uninterrupted run of each task."""
    folders = {}
    for task in MAKERS:
        folders[task] = tmp_path_factory.mktemp("runs") / task
        assert cli.main([*command(task, data, folders[task]), *scratch()]) == 0
    return folders


@pytest.mark.parametrize("task", MAKERS)
def test_every_task_learns_and_leaves_what_it_promises(task: str, runs: dict[str, Path]) -> None:
    run = runs[task]
    found = metrics(run)
    assert found["end"]["loss"] < found["start"]["loss"]
    assert METRICS[task] <= set(found["test"])
    assert found["baselines"]
    assert set().union(*found["baselines"].values()) == set(found["test"])
    assert found["examples"] == {"train": 96, "validation": 16, "test": 12}
    expected = {
        "config.yaml",
        "checkpoints",
        "logs",
        "model",
        "loss.png",
        "metrics.json",
        "report.md",
        "predictions.jsonl",
    }
    assert {path.name for path in run.iterdir()} == expected | ({"confusion.png"} if task == "classify" else set())
    report = (run / "report.md").read_text()
    for picture in re.findall(r"!\[.*\]\((.*)\)", report):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    for name in METRICS[task]:
        assert f"| {name} |" in report
    for name in found["baselines"]:
        assert name in report
    assert len(lines(run / "predictions.jsonl")) == 12
    (log,) = run.glob("logs/csv/*/metrics.csv")
    assert {"train/loss", "val/loss", "train/tokens_per_second"} <= set(log.read_text().splitlines()[0].split(","))


@pytest.mark.parametrize("task", MAKERS)
def test_evaluate_reads_what_was_predicted(task: str, runs: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["evaluate", str(runs[task] / "predictions.jsonl"), "--task", task, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {name: again[name] for name in metrics(runs[task])["test"]} == pytest.approx(metrics(runs[task])["test"])


@pytest.mark.parametrize("task", MAKERS)
def test_predict_repeats_the_predictions_from_the_folder(
    task: str, runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "predictions.jsonl"
    assert cli.main(["predict", str(runs[task]), "--data", str(data / task / "test.jsonl"), "--out", str(out)]) == 0
    for again, before in zip(lines(out), lines(runs[task] / "predictions.jsonl"), strict=True):
        assert again.get("prediction") == before.get("prediction")


@pytest.mark.parametrize("task", ["summarize", "translate", "generate"])
def test_what_is_written_is_what_hugging_faces_generate_writes(task: str, data: Path) -> None:
    options = TextOptions(max_length=48, max_target_length=8)
    examples = RECIPES[task].read(data / task / "test.jsonl", options)
    texts = [text for example in examples for text in RECIPES[task].texts(example)]
    tokenizer = train_tokenizer(texts, 400, RECIPES[task].tokenizer_objective)
    torch.manual_seed(0)
    start = from_scratch("bert-tiny", task, tokenizer, 64, **TINY, tie_word_embeddings=False)
    recipe, model = recipe_for(task, start, options, tokenizer), start.model.eval()
    expected = []
    for prompt in recipe.prompts(examples):
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        (written,) = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, **ends)
        new = written if model.config.is_encoder_decoder else written[len(prompt) :]
        expected.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    assert [line["prediction"] for line in Predictor(model, recipe)(examples)] == expected
    assert len(set(expected)) > 1


def test_what_is_to_be_predicted_may_be_left_out(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "new.jsonl").write_text('{"text": "A lovely cat."}\n{"text": "A bad dog."}\n')
    arguments = ["--data", str(tmp_path / "new.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert cli.main(["predict", str(runs["classify"]), *arguments]) == 0
    found = lines(tmp_path / "out.jsonl")
    assert [set(line) for line in found] == [{"prediction", "probabilities"}] * 2
    assert all(sum(line["probabilities"].values()) == pytest.approx(1) for line in found)


# --- Resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "kill"), [("classify", {"step": 9}), ("classify", {"step": 8}), ("summarize", {"step": 6})]
)
def test_killed_run_resumes_to_identical_weights(
    task: str, kill: dict[str, int], data: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    callback = json.dumps([{"class_path": "training.killing.Kill", "init_args": kill}])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"}
    killed = subprocess.run(
        [
            sys.executable,
            "-m",
            "fastformer.cli",
            *command(task, data, output),
            *scratch("--trainer.callbacks", callback),
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert killed.returncode == -9, killed.stderr
    assert cli.main(["finetune", task, "--resume", "--output", str(output), "--trainer.callbacks", "null"]) == 0
    weights, expected = (load_file(folder / "model" / "model.safetensors") for folder in (output, runs[task]))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for name in ("start", "end", "steps", "tokens", "test"):
        assert metrics(output)[name] == metrics(runs[task])[name]


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["ours", "bert"])
@pytest.mark.parametrize("task", ["classify", "tag"])
def test_starts_from_a_folder(task: str, model: str, data: Path, base: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert cli.main([*command(task, data, output), "--model", str(base[model]), "--optimizer.learning_rate=0.005"]) == 0
    found = metrics(output)
    assert found["started_from"] == str(base[model])
    assert found["end"]["loss"] < found["start"]["loss"]
    assert AutoTokenizer.from_pretrained(output / "model").model_max_length == 48


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("model", ["ours", "bert"])
def test_lora_saves_a_whole_model_or_the_adapter(
    merge: bool, model: str, data: Path, base: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    options = ["--model", str(base[model]), "--lora", "--adapter.rank=4", f"--adapter.merge={merge}"]
    assert cli.main([*command("classify", data, output), *options, "--optimizer.learning_rate=0.02"]) == 0
    found = metrics(output)
    assert found["trained_parameters"] < found["parameters"] / 2
    assert found["end"]["loss"] < found["start"]["loss"]
    assert (output / "model" / "adapter_config.json").exists() == (not merge)
    assert (output / "model" / "model.safetensors").exists() == merge
    arguments = ["--data", str(data / "classify" / "test.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert cli.main(["predict", str(output), *arguments]) == 0
    assert lines(tmp_path / "out.jsonl") == lines(output / "predictions.jsonl")
    # What was validated in training is what was saved.
    out = ["--data", str(data / "classify" / "validation.jsonl"), "--out", str(tmp_path / "validation.jsonl")]
    assert cli.main(["predict", str(output), *out]) == 0
    right = [line["prediction"] == line["reference"] for line in lines(tmp_path / "validation.jsonl")]
    assert sum(right) / len(right) == pytest.approx(found["end"]["accuracy"])


@pytest.mark.parametrize(
    "options",
    [
        ["--adversarial", "pgd", "--adversary.steps", "2", "--adversary.epsilon", "0.05"],
        ["--class_weights", "balanced", "--optimizer.layer_decay", "0.8", "--activation_checkpointing"],
        ["--patience", "1", "--monitor", "accuracy", "--accumulate", "2", "--precision", "bf16-mixed"],
        ["--optimizer.schedule", "cosine", "--max_steps", "-1", "--epochs", "2"],
    ],
)
def test_options_run_to_their_end(options: list[str], data: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert cli.main([*command("classify", data, output), *scratch(), *options]) == 0
    assert metrics(output)["end"]["loss"] < metrics(output)["start"]["loss"]


def test_starts_from_the_pretraining_run_where_there_is_one(
    data: Path, base: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "pretrain").mkdir(parents=True)
    (tmp_path / "runs" / "pretrain" / "model").symlink_to(base["ours"])
    assert cli.main([*command("classify", data, tmp_path / "output"), "--max_steps", "2"]) == 0
    assert metrics(tmp_path / "output")["started_from"] == "runs/pretrain/model"
    for task in ("translate", "qa"):  # of another stack, and with positions that do not suit the task
        assert cli.main([*command(task, data, tmp_path / task), *scratch("--max_steps", "2")]) == 0
        assert metrics(tmp_path / task)["started_from"] == "scratch, bert-tiny"


@pytest.mark.parametrize("model", ["ours", "bert", "scratch"])
def test_numbers_are_learnt_by_regression(model: str, base: dict[str, Path], tmp_path: Path) -> None:
    draw = random.Random(0)
    for split, count in (("train", 96), ("test", 12)):
        scores = [draw.choice([0.0, 1.0, 2.0]) for _ in range(count)]
        rows = [{"text": f"A {ANIMALS[int(score)]}.", "score": score} for score in scores]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "output"
    start = scratch() if model == "scratch" else ["--model", str(base[model]), "--optimizer.learning_rate=0.005"]
    arguments = command("classify", tmp_path, output)
    arguments[arguments.index("--data") + 1] = str(tmp_path)
    assert cli.main([*arguments, *start]) == 0
    found = metrics(output)
    assert found["end"]["loss"] < found["start"]["loss"]
    assert {"pearson", "mean_squared_error"} <= set(found["test"])
    assert all(isinstance(line["prediction"], float) for line in lines(output / "predictions.jsonl"))


def test_private_run_says_what_it_spent(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    options = ["--privacy-epsilon", "8", "--privacy.batch_size", "16"]
    assert cli.main([*command("classify", data, output), *scratch(), *options]) == 0
    privacy = metrics(output)["privacy"]
    assert 7.9 < privacy["epsilon"] <= 8
    assert privacy["delta"] == pytest.approx(0.1 / 96)
    assert "- privacy: epsilon" in (output / "report.md").read_text()


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune"], "name a task first: classify, tag, qa, .*; got nothing"),
        (["finetune", "guess"], "name a task first: .*; got guess"),
        (["finetune", "classify", "--data", "python-tags"], "--data python-tags is for tag, not for classify"),
        (["finetune", "classify", "--data", "absent/"], "neither a set .* nor a file or folder"),
        (["finetune", "classify", "--model", "absent"], "no model in absent"),
        (["finetune", "classify", "--lora"], "--lora adapts a pretrained model"),
        (["finetune", "qa", "--class_weights", "balanced"], "--class_weights are for classify and tag"),
        (["finetune", "classify", "--class_weights", "[1.0]"], "class_weights must be 2 numbers"),
        (["finetune", "classify", "--privacy_epsilon", "1", "--adversarial", "fgm"], "do not go together"),
        (["finetune", "embed", "--privacy_epsilon", "1"], "in-batch negatives"),
        (["finetune", "classify", "--privacy_epsilon", "1", "--accumulate", "2"], "accumulate"),
        (["finetune", "classify", "--privacy_epsilon", "1", "--devices", "2"], "--privacy_epsilon is for one device"),
        (["finetune", "tag", "--patience", "0"], "patience must be 1 or more; got 0"),
        (["predict", "absent", "--data", "x", "--out", "y"], "absent is no fine-tuning run"),
    ],
)
def test_bad_values_end_in_one_clear_line(
    arguments: list[str],
    message: str,
    data: Path,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    task = arguments[1] if len(arguments) > 1 else ""
    if arguments[0] == "finetune" and task in MAKERS:
        arguments = [*command(task, data, tmp_path / "output"), *scratch(), *arguments[2:]]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"fastformer {arguments[0]}: error: ")
    assert re.search(message, error), error
