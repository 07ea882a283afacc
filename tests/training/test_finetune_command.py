"""Tests of ``fastformer finetune`` and ``fastformer predict``: tasks, reports, options, killed and resumed runs."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training.tasks import ANIMALS, MAKERS, TINY, command, scratch
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForTokenClassification,
)

from fastformer import cli
from fastformer.data.labelled.examples import ClassifiedText, Examples
from fastformer.data.pretraining.tokenizer import train_tokenizer
from fastformer.training.finetuning_examples import drawn_examples
from fastformer.training.prediction import Predictor, recipe_for
from fastformer.training.starting_point import from_scratch
from fastformer.training.tasks import RECIPES, TextOptions

TESTS = Path(__file__).parent.parent
METRICS = {
    "classify": {"accuracy", "precision", "recall", "f1", "mcc", "baseline"},
    "tag": {"f1"},
    "qa": {"exact_match", "f1"},
    "summarize": {"rouge1"},
    "translate": {"bleu", "chrf"},
    "generate": {"perplexity"},
    "embed": {"recall_at_1", "mean_reciprocal_rank"},
}


def metrics(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the output folder of an uninterrupted run of each task."""
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
        "manifest.json",
        ".lock",
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
    columns = set(log.read_text().splitlines()[0].split(","))
    assert {"train/loss", "val/loss", "train/tokens_per_second", "train/peak_memory"} <= columns


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


@pytest.mark.parametrize("model", ["ours", "bert"])
def test_from_scratch_takes_of_a_folder_the_tokenizer_and_the_shape(
    model: str, data: Path, base: dict[str, Path], tmp_path: Path
) -> None:
    options = ["--model", str(base[model]), "--max_steps", "1", "--optimizer.learning_rate=1e-9"]
    for name, more in (("pretrained", []), ("scratch", ["--from_scratch", "--seed", "1"])):
        assert cli.main([*command("classify", data, tmp_path / name), *options, *more]) == 0
    trained, scratch, pretrained = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "pretrained" / "model", tmp_path / "scratch" / "model", base[model])
    )
    assert {name: weight.shape for name, weight in trained.items()} == {
        name: weight.shape for name, weight in scratch.items()
    }
    word = next(name for name in pretrained if "embeddings.word" in name)
    torch.testing.assert_close(trained[word], pretrained[word])
    assert not torch.allclose(scratch[word], pretrained[word], atol=1e-3)
    assert (tmp_path / "scratch/model/tokenizer.json").read_text() == (
        tmp_path / "pretrained/model/tokenizer.json"
    ).read_text()
    assert metrics(tmp_path / "scratch")["started_from"] == f"scratch, in the shape of {base[model]}"


@pytest.mark.parametrize("types", [0, 2])
def test_segments_are_for_models_that_know_them(types: int) -> None:
    texts = [f"text {number}" for number in range(40)]
    tokenizer = train_tokenizer(texts, 300)
    start = from_scratch("bert-tiny", "classify", tokenizer, 64, ["a", "b"], **{**TINY, "type_vocab_size": types})
    recipe = recipe_for("classify", start, TextOptions(), tokenizer)
    batch = recipe.collate(
        recipe.features([ClassifiedText(texts[0], texts[1], "a"), ClassifiedText(texts[2], texts[3], "b")])
    )
    assert ("token_type_ids" in batch) == bool(types)
    assert torch.isfinite(start.model(**batch).loss)


def test_train_examples_are_drawn_with_the_seed(data: Path, tmp_path: Path) -> None:
    found = {}
    for name, seed in (("first", "0"), ("again", "0"), ("other", "1")):
        options = ["--max_train_examples", "5", "--max_steps", "1", "--seed", seed]
        assert cli.main([*command("classify", data, tmp_path / name), *scratch(*options)]) == 0
        assert metrics(tmp_path / name)["examples"] == {"train": 5, "validation": 16, "test": 12}
        found[name] = metrics(tmp_path / name)["tokens"], metrics(tmp_path / name)["test"]
    assert found["first"] == found["again"]
    examples = Examples((f"line {number}", (number,)) for number in range(9))
    everything = drawn_examples(examples, 100, seed=3)
    assert sorted(everything) == examples
    assert all(place == f"line {number}" for place, (number,) in zip(everything.places, everything, strict=True))
    assert drawn_examples(examples, 4, seed=0) != drawn_examples(examples, 4, seed=1)
    with pytest.raises(ValueError, match="--max_train_examples must be at least 1; got 0"):
        drawn_examples(examples, 0, seed=0)


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
    # The saved model is the one that was validated in training.
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
    for task in ("translate", "qa"):  # translate needs another stack, qa other positions
        assert cli.main([*command(task, data, tmp_path / task), *scratch("--max_steps", "2")]) == 0
        assert metrics(tmp_path / task)["started_from"] == "scratch, bert-tiny"


@pytest.mark.parametrize("model", ["ours", "bert", "scratch"])
def test_numbers_are_learnt_by_regression(model: str, base: dict[str, Path], tmp_path: Path) -> None:
    draw = random.Random(0)
    for split, count in (("train", 96), ("test", 12)):
        scores = [draw.choice([0.0, 1.0, 2.0]) for _ in range(count)]
        # The texts differ, because equal texts stay together when a validation split is made.
        rows = [{"text": f"A {ANIMALS[int(score)]} of {n} years.", "score": score} for n, score in enumerate(scores)]
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
    options = ["--privacy_epsilon", "8", "--privacy.batch_size", "16"]
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
        (["finetune", "classify", "--model", "there"], "--overrides is for a new model; --model there has"),
        (["finetune", "classify", "--lora"], "--lora adapts a pretrained model"),
        (["finetune", "qa", "--class_weights", "balanced"], "--class_weights are for classify and tag"),
        (["finetune", "classify", "--class_weights", "[1.0]"], "class_weights must be 2 numbers"),
        (["finetune", "classify", "--privacy_epsilon", "1", "--adversarial", "fgm"], "cannot be combined"),
        (["finetune", "embed", "--privacy_epsilon", "1"], "in-batch negatives"),
        (["finetune", "classify", "--privacy_epsilon", "1", "--accumulate", "2"], "accumulate"),
        (["finetune", "classify", "--privacy_epsilon", "1", "--devices", "2"], "is for one device .* got --devices 2"),
        (["finetune", "classify", "--privacy_epsilon", "1", "--strategy", "fsdp2"], "unsharded .* --strategy fsdp2"),
        (["finetune", "tag", "--patience", "0"], "--patience must be at least 1; got 0"),
        (["predict", "absent", "--data", "x", "--out", "y"], "absent is not a fine-tuning run"),
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


# --- Resuming over other data -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an unfinished run and the examples from which it learns."""
    folder = tmp_path_factory.mktemp("unfinished")
    shutil.copytree(data / "classify", folder / "classify")
    assert cli.main([*command("classify", folder, folder / "run"), *scratch("--max_steps", "4")]) == 0
    return folder


def _swapped(text: str) -> str:
    return text.replace("positive", "?").replace("negative", "positive").replace("?", "negative")


CHANGES: dict[str, tuple[str, Callable[[str], str]]] = {
    "labels": ("train", _swapped),
    "label names": ("train", lambda text: text.replace("negative", "bad one")),
    "texts": ("train", lambda text: text.replace("lovely", "pretty")),
    "words enough for another tokenizer": ("train", lambda text: text.replace("lovely", "l o v e l y " * 9)),
    "fewer": ("train", lambda text: text.split("\n", 4)[-1]),
    "another order": ("train", lambda text: "\n".join(reversed(text.split("\n")))),
    "what is chosen by": ("validation", _swapped),
    "what is judged by": ("test", _swapped),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_data_is_not_gone_on_with(
    change: str, unfinished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(unfinished, tmp_path / "copy")
    changed, run = tmp_path / "copy" / "classify", tmp_path / "copy" / "run"
    split, edit = CHANGES[change]
    names = ("train", "validation", "test") if change == "label names" else (split,)
    for name in names:
        file = changed / f"{name}.jsonl"
        assert edit(file.read_text()) != file.read_text()
        file.write_text(edit(file.read_text()))
    before = (run / "metrics.json").read_bytes()
    capsys.readouterr()
    resume = ["finetune", "classify", "--resume", "--output", str(run), "--max_steps", "6"]
    assert cli.main([*resume, "--data", str(changed)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"error: the run in {run} cannot be continued with other data: {split} examples" in line
    assert (run / "metrics.json").read_bytes() == before
    assert cli.main([*resume, "--data", str(unfinished / "classify")]) == 0  # in any folder
    assert metrics(run)["steps"] == 6


def test_a_run_from_before_there_were_fingerprints_goes_on(unfinished: Path, tmp_path: Path) -> None:
    shutil.copytree(unfinished, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest.pop("data")
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(["finetune", "classify", "--resume", "--output", str(run), "--max_steps", "6"]) == 0


# --- Models of few positions ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def short(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return for each task the folder of a model of 40 positions: ours, and some of Hugging Face's, by class."""
    folders = {}
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    bart = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    foreign = {
        "classify": BertForSequenceClassification(BertConfig(vocab_size=400, **shape, max_position_embeddings=40)),
        "tag": RobertaForTokenClassification(
            RobertaConfig(vocab_size=400, **shape, max_position_embeddings=42, num_labels=3)
        ),
        "generate": GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=1, n_head=2, n_positions=40)),
        "summarize": BartForConditionalGeneration(
            BartConfig(vocab_size=400, **bart, **heads, max_position_embeddings=40, decoder_start_token_id=2)
        ),
    }
    for task, kind in RECIPES.items():
        examples = kind.read(data / task / "train.jsonl", TextOptions())
        texts = [text for example in examples for text in kind.texts(example)]
        tokenizer = train_tokenizer(texts, 400, kind.tokenizer_objective)
        labels = {"classify": ["negative", "positive"], "tag": ["B-ANIMAL", "B-COLOUR", "O"]}.get(task)
        own = from_scratch("bert-tiny", task, tokenizer, 40, labels, **TINY)
        for whose, model in (("ours", own.model), ("theirs", foreign.get(task))):
            if model is not None:
                folders[f"{task} {whose}"] = tmp_path_factory.mktemp("short")
                model.save_pretrained(folders[f"{task} {whose}"])
                tokenizer.save_pretrained(folders[f"{task} {whose}"])
    return folders


@pytest.mark.parametrize(
    "kind",
    [
        *(f"{task} ours" for task in RECIPES),
        *(f"{task} theirs" for task in ("classify", "tag", "generate", "summarize")),
    ],
)
def test_a_model_of_few_positions(
    kind: str, short: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A default length becomes the model's number of positions. A given length that is larger is refused."""
    task = kind.split()[0]
    draw = random.Random(0)
    for split, count in (("train", 12), ("validation", 4), ("test", 4)):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(_long(task, draw)) + "\n" for _ in range(count)))
    output = tmp_path / "run"
    given = ["finetune", task, "--data", str(tmp_path), "--model", str(short[kind]), "--output", str(output)]
    given += ["--max_steps", "1", "--tokens_per_batch", "512", "--accelerator", "cpu"]
    given += ["--text.stride", "4"] if task == "qa" else []
    assert cli.main([*given, "--max_length", "41"]) == 2
    said = capsys.readouterr().err
    assert "error: --max_length must be at most 40, the number of positions of the model; got 41" in said
    assert cli.main([*given, "--max_length", "128"]) == 2
    if task in ("summarize", "translate", "generate"):
        assert cli.main([*given, "--text.max_target_length", "41"]) == 2
        assert "error: --text.max_target_length must be at most" in capsys.readouterr().err
    assert not output.exists()
    with pytest.warns(UserWarning, match=r"--max_length is 40, not 128: the model has no more positions"):
        assert cli.main(given) == 0
    assert yaml.safe_load((output / "config.yaml").read_text())["max_length"] == 40
    out = tmp_path / "predictions.jsonl"
    assert cli.main(["predict", str(output), "--data", str(tmp_path / "test.jsonl"), "--out", str(out)]) == 0


def _long(task: str, draw: random.Random) -> dict[str, Any]:
    """Return an example whose texts, except for prompts, have more than 128 tokens."""
    example = MAKERS[task](draw)
    tail = " ".join(draw.choice(ANIMALS) for _ in range(200))
    if task == "tag":
        return {"tokens": example["tokens"] * 50, "tags": example["tags"] * 50}
    if task == "translate":
        return {"translation": {side: f"{text} {tail}" for side, text in example["translation"].items()}}
    name = {"classify": "text", "qa": "context", "summarize": "document", "generate": "completion", "embed": "anchor"}
    return {**example, name[task]: f"{example[name[task]]} {tail}"}
