"""Tests of ``fastformer pretrain`` for objectives other than BERT's; BERT's own is in test_cli.py."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from fastformer import cli
from fastformer.training.loading.pretraining import PretrainingDataModule
from fastformer.training.pretraining import MaskedLanguageModeling

AUTO_CLASSES = {
    "clm": AutoModelForCausalLM,
    "span-corruption": AutoModelForSeq2SeqLM,
    "denoising": AutoModelForSeq2SeqLM,
}


@pytest.fixture(scope="module", params=list(AUTO_CLASSES))
def objective(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def output(objective: str, tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "output"
    options = [*tiny_run, "--objective", objective, "--max_steps", "10", "--evaluate_every", "5"]
    assert cli.main([*options, "--activation_checkpointing", "--output", str(folder)]) == 0
    return folder


def metrics(output: Path) -> dict:
    return json.loads((output / "metrics.json").read_text())


def test_learns_and_says_how_much(output: Path) -> None:
    found = metrics(output)
    assert found["end"]["loss"] < found["start"]["loss"] - 0.5
    assert found["start"]["tokens"] == found["end"]["tokens"] > 0
    assert found["peak_memory"] > 1e8
    report = (output / "report.md").read_text()
    assert f"| perplexity | {found['start']['perplexity']:,.1f} | {found['end']['perplexity']:,.1f} |" in report
    assert "](loss.png)" in report
    assert found["sample"]["given"] in report
    (log,) = output.glob("logs/csv/*/metrics.csv")
    columns = set(log.read_text().splitlines()[0].split(","))
    assert {"train/loss", "train/tokens_per_second", "train/peak_memory", "val/loss", "val/perplexity"} <= columns


@pytest.mark.slow
def test_compiled_run_has_the_same_losses(tiny_run: list[str], tmp_path: Path) -> None:
    # A compiled model would draw other dropout.
    tiny_run = [*tiny_run, "--overrides.hidden_dropout_prob", "0"]
    for options in ([], ["--compile"]):
        output = tmp_path / f"output{len(options)}"
        assert cli.main([*tiny_run, "--objective", "clm", "--max_steps", "3", *options, "--output", str(output)]) == 0
    plain, compiled = (metrics(tmp_path / f"output{number}") for number in (0, 1))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert compiled["end"]["loss"] == pytest.approx(plain["end"]["loss"], rel=1e-4)


def test_saved_model_has_the_loss_that_was_reported(objective: str, output: Path, tiny_run: list[str]) -> None:
    """The saved model has the loss that was reported.

    It is measured here from the folder alone, with logits of all tokens.
    """
    given = dict(zip(tiny_run[1::2], tiny_run[2::2], strict=True))
    data = PretrainingDataModule(
        data=[given["--data"]],
        objective=objective,
        vocab_size=400,
        max_length=64,
        tokens_per_batch=256,
        cache_dir=given["--cache_dir"],
    )
    data.setup()
    model = AUTO_CLASSES[objective].from_pretrained(output / "model").eval()
    losses = []
    for batch in data.val_dataloader():
        labels = batch.pop("labels")
        logits = model(**batch).logits.detach()
        if objective == "clm":  # a sequence's first label is ignored, so the shift may cross its end
            logits, labels = logits[:-1], labels[1:]
        losses.append(F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")[labels != -100])
    end = metrics(output)["end"]
    assert end["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert end["tokens"] == len(torch.cat(losses))


def test_sample_is_what_the_saved_model_says(objective: str, output: Path) -> None:
    sample, folder = metrics(output)["sample"], output / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AUTO_CLASSES[objective].from_pretrained(folder)
    prompt = tokenizer(sample["given"], return_tensors="pt")
    said = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    if objective == "clm":
        said = said[prompt["input_ids"].shape[1] :]
    else:
        said = said[~torch.isin(said, torch.tensor([tokenizer.pad_token_id, tokenizer.eos_token_id]))]
        if tokenizer.bos_token_id is not None:
            said = said[said != tokenizer.bos_token_id]
    assert tokenizer.decode(said, skip_special_tokens=objective == "clm").strip() == sample["answer"]
    assert model.config.vocab_size == len(tokenizer)


def test_run_without_heldout_text_reports_what_it_has(tiny_run: list[str], tmp_path: Path) -> None:
    options = ["--objective", "clm", "--max_steps", "2", "--corpus.heldout_fraction", "0", "--output", str(tmp_path)]
    assert cli.main([*tiny_run, *options]) == 0
    assert metrics(tmp_path)["end"] is None
    report = (tmp_path / "report.md").read_text()
    assert "perplexity" not in report
    assert "steps" in report


def test_elastic_starts_a_run_and_goes_on_with_it(tiny_run: list[str], tmp_path: Path) -> None:
    command = [*tiny_run, "--objective", "clm", "--max_steps", "4", "--elastic", "--output", str(tmp_path / "output")]
    assert cli.main([*command, "--max_minutes", "1e-9"]) == 0
    assert metrics(tmp_path / "output")["steps"] == 1
    assert cli.main([*command, "--max_minutes", "null"]) == 0
    assert metrics(tmp_path / "output")["steps"] == 4
    assert len(list(tmp_path.glob("output/logs/csv/*"))) == 2


def test_epochs_take_as_many_steps_as_they_have(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of given epochs takes as many steps as the epochs have.

    The objective's default, fewer steps, does not count.
    """
    monkeypatch.setattr(MaskedLanguageModeling, "default_steps", 2)
    for options, enough in (([], False), (["--epochs", "1"], True)):
        output = tmp_path / f"output{len(options)}"
        assert cli.main([*tiny_run, *options, "--evaluate_every", "100", "--output", str(output)]) == 0
        assert (metrics(output)["steps"] > 2) == enough


@pytest.mark.parametrize("change", ["more words", "fewer words", "--overrides.intermediate_size=48"])
def test_what_does_not_fit_the_checkpoint_is_not_resumed(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture, tiny_run: list[str]
) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "output"
    words = [f"{first}{second}" for first in "abcdefghijklmnop" for second in "aeiouy"]
    text.write_text("\n\n".join(" ".join(words[number:] + words[:number]) for number in range(90)))
    given = [*tiny_run, "--data", str(text), "--output", str(output), "--corpus.next_sentence", "false"]
    assert cli.main([*given, "--max_steps", "2"]) == 0
    if change == "more words":
        text.write_text(text.read_text() + "\n\n" + " ".join(f"{word}{word}{word}" for word in words) * 3)
    elif change == "fewer words":
        text.write_text("\n\n".join(" ".join(["one"] * number) for number in range(1, 90)))
    capsys.readouterr()
    options = [change] if change.startswith("--") else []
    assert cli.main(["pretrain", "--resume", "--output", str(output), "--max_steps", "4", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "error: the checkpoint cannot be continued with other data or another model: its model." in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--objective", "clm", "--preset", "bert-tiny"), "needs a configuration with stack='decoder'; got 'encoder'"),
        (("--objective", "clm", "--corpus.whole_word", "true"), "whole_word is for objective mlm, not clm"),
        (("--tensor_parallel", "2"), "--tensor_parallel is for --strategy fsdp2; got --strategy auto"),
        (("--strategy", "fsdp2", "--tensor_parallel", "2"), "--tensor_parallel 2 must divide the 1 devices"),
        (("--elastic", "--overwrite"), None),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: tuple[str, ...], message: str | None, tiny_run: list[str], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    if message is None:  # there is a run to continue
        output.mkdir()
        (output / "config.yaml").write_text("max_steps: 1\n")
        message = "give --resume or --overwrite, not both"
    assert cli.main([*tiny_run, "--output", str(output), *arguments]) == 2
    assert re.search(re.escape(message), capsys.readouterr().err)


@pytest.mark.parametrize("strategy", ["fsdp", "ddp_spawn"])
def test_strategies_that_are_not_tested_are_not_offered(strategy: str, tiny_run: list[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([*tiny_run, "--strategy", strategy])
    assert exit.value.code == 2
