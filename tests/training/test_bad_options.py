"""Bad options, files that hold no options, and simple terminals: each error is one line, with status 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from training.tasks import TINY, command, scratch
from transformers import BertConfig, BertForSequenceClassification

from fastformer import cli
from fastformer.data.pretraining.tokenizer import train_tokenizer
from fastformer.extras import require
from fastformer.training.loading.resuming import check_workers


@pytest.fixture(params=["pretrain", "classify"])
def options(request: pytest.FixtureRequest, tiny_run: list[str], data: Path) -> list[str]:
    if request.param == "pretrain":
        return [*tiny_run, "--max_steps", "4"]
    return [*command("classify", data, Path("absent")), *scratch(), "--max_steps", "4"]


def fails(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Return the one line of error with which a command line ends, with status 2."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as exit:
        status = exit.code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    return line


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--seed=1.5", "seed"),
        ("--seed=-1", "--seed must be from 0 to 4,294,967,295; got -1"),
        ("--seed=99999999999999999999", "--seed must be from 0 to"),
        ("--accumulate=0", "--accumulate must be at least 1; got 0"),
        ("--accumulate=1.5", "accumulate"),
        ("--evaluate_every=0", "--evaluate_every must be at least 1; got 0"),
        ("--max_steps=0", "--max_steps must be at least 1"),
        ("--max_steps=-7", "--max_steps must be at least 1"),
        ("--trainer.limit_train_batches=0", "--trainer.limit_train_batches must be above 0"),
        ("--max_minutes=nan", "max_minutes"),
        ("--output=/dev/null/run", "/dev/null/run"),
        ("--config=absent.yaml", "absent.yaml"),
        ("--devices=0", "--devices must be auto, a number, -1 for all, or a list such as 0,2; got 0"),
        ("--devices=1.5", "--devices must be"),
        ("--devices=nan", "--devices must be"),
        ("--trainer.max_steps=-5", "max_steps"),
        ("--precision=8", "'8' (choose from"),
        ("--accelerator=tpu", "error: Requirement 'torch_xla"),
    ],
)
def test_numbers_that_mean_nothing(
    given: str, said: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    line = fails(capsys, *options, "--output", str(tmp_path / "run"), given)
    assert said in line
    assert not (tmp_path / "run").exists()


def test_a_prefix_that_is_not_utf8(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = [*command("summarize", data, tmp_path / "run"), *scratch(), "--text.prefix", "a \udcff"]
    assert "error: --text.prefix is not UTF-8: 'a \\udcff'" in fails(capsys, *given)
    assert not (tmp_path / "run").exists()


LAUGHS = "\n".join(
    ["a0: &a0 [x, x]", *(f"a{level}: &a{level} [*a{level - 1}, *a{level - 1}]" for level in range(1, 41))]
)
MERGES = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{level}: &a{level} {{<<: [*a{level - 1}, *a{level - 1}]}}" for level in range(1, 41))]
)


@pytest.mark.parametrize("way", ["--config", "--resume"])
@pytest.mark.parametrize("text", [LAUGHS, MERGES, "a: &a [*a]", "a: &a {b: *a}"])
def test_few_bytes_that_stand_for_many_values(
    text: str, way: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_text(f"{text}\n")
    given = {
        "--config": ("--config", str(tmp_path / "config.yaml")),
        "--resume": ("--resume", "--output", str(tmp_path)),
    }
    line = fails(capsys, "pretrain", *given[way])
    assert f"{tmp_path / 'config.yaml'} cannot be read as YAML: its aliases stand for more than 10,000 values" in line


def test_some_aliases_are_welcome(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run.yaml").write_text(
        "optimizer: &optimizer {learning_rate: 0.5}\nevaluate_every: &n 7\nmax_steps: *n\n"
    )
    with pytest.raises(SystemExit) as exit:
        cli.main(["pretrain", "--config", str(tmp_path / "run.yaml"), "--print_config"])
    assert exit.value.code == 0
    written = yaml.safe_load(capsys.readouterr().out)
    assert (written["evaluate_every"], written["max_steps"]) == (7, 7)


BAD_NUMBERS = ("-1", "0", "nan", ".nan", ".inf", "1e30", "100000000000000000000000", "1.5")
ACCEPTED = {
    "0": "seed num_workers stride weight_decay warmup_steps dropout heldout_fraction min_epochs min_steps "
    "log_every_n_steps gradient_clip_val limit_val_batches",
    "-1": "max_steps epochs",
    "1.5": "max_minutes privacy_epsilon learning_rate weight_decay eps alpha epsilon step_size weight max_grad_norm "
    "gradient_clip_val",
}
ACCEPTED["1e30"] = f"{ACCEPTED['1.5']} warmup_steps"  # too many warm-up steps are refused later
ACCEPTED["100000000000000000000000"] = ACCEPTED["1e30"].replace("gradient_clip_val", "")
NOT_OPTIONS = (" --> ", ".help", "plugins", "callbacks", "logger", "devices", "overrides", "class_weights", "betas")


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_every_number_that_means_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option that takes numbers refuses a bad number, by name and value, before anything else is done."""
    require("jsonargparse")
    from fastformer.commands import finetune, pretrain

    parser, words = {
        "pretrain": (pretrain.build_parser(), ["pretrain"]),
        "finetune": (finetune.build_parser("classify"), ["finetune", "classify"]),
    }[name]
    monkeypatch.setattr(f"fastformer.commands.{name}.build_parser", lambda *_: parser)
    monkeypatch.setattr(f"fastformer.commands.{name}.resumable", lambda *_: begun.append(1) or pytest.fail("begun"))
    begun: list[int] = []
    numeric = [
        action.option_strings[0]
        for action in parser._actions
        if action.option_strings
        and any(kind in str(getattr(action, "_typehint", None) or action.type) for kind in ("int", "float"))
        and not any(part in action.option_strings[-1] for part in NOT_OPTIONS)
    ]
    assert len(numeric) > 20
    for option in numeric:
        for number in BAD_NUMBERS:
            if option.rpartition(".")[2].removeprefix("--") in ACCEPTED.get(number, "").split():
                continue
            if option.endswith("num_workers"):  # refused only after the data is made
                continue
            line = fails(capsys, *words, "--output", str(tmp_path / "run"), f"{option}={number}")
            assert f"error: {option} must be " in line and len(line) < 200, line
            value = line.partition("; got ")[2]
            assert repr(float(value.lstrip("."))) == repr(float(number.lstrip("."))), line


@pytest.mark.parametrize("weights", ["[.nan,1]", "[1,.nan]", "[0,0]", "[1,.inf]", "[1,-1]", "[1]", "ab"])
def test_class_weights_that_mean_nothing(
    weights: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    line = fails(capsys, *command("classify", data, tmp_path / "run"), *scratch(), "--class_weights", weights)
    assert "class_weights must be 2 numbers of at least 0, one for each class, and not all 0; got" in line


@pytest.mark.parametrize("number", ["-1.0", ".nan", ".inf"])
@pytest.mark.parametrize(
    "field", ["hidden_dropout_prob", "classifier_dropout", "initializer_range", "layer_norm_eps", "embedding_scale"]
)
def test_numbers_of_a_model_that_mean_nothing(
    field: str, number: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if (field, number) != ("embedding_scale", "-1.0"):
        options = [*command("classify", data, tmp_path / "run"), *scratch(f"--overrides.{field}", number)]
        assert f"{field} must be" in fails(capsys, *options)


@pytest.mark.parametrize("number", ["-1", "100", "1000000"])
def test_processes_that_prepare_batches(
    number: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    line = fails(capsys, *options, "--output", str(tmp_path / "run"), "--num_workers", number)
    assert f"num_workers must be from 0 to 8 on this machine with 2 processors; got {number}" in line
    check_workers(8)


def test_more_tokens_than_the_model_knows(
    options: list[str], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = ["--output", str(tmp_path / "run")]
    if options[0] == "pretrain":
        line = fails(capsys, *options, *output, "--overrides.vocab_size", "100")
        assert "vocab_size must be at least the tokenizer's" in line
        return
    config = BertConfig(**TINY, vocab_size=280, max_position_embeddings=48)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    texts = [json.loads(line)["text"] for line in (data / "classify/train.jsonl").read_text().splitlines()]
    train_tokenizer(texts, 300).save_pretrained(tmp_path / "model")
    line = fails(capsys, *command("classify", data, tmp_path / "run"), "--model", str(tmp_path / "model"))
    assert "the tokenizer has " in line
    assert f"{tmp_path / 'model'} has embeddings for 280" in line


# --- Files of options -------------------------------------------------------------------------------------------------

FILES = {
    "cut within a list": b"trainer:\n  callbacks: [",
    "a list": b"- 1\n- 2\n",
    "empty": b"",
    "a word": b"word",
    "no text": b"\xff\xfe\x00",
    "zeros": bytes(99),
    "deep": b"[" * 20000,
    "tabs": b"trainer:\n\t- 1",
    "a tag": b"!!python/object/apply:os.system ['true']\n",
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_has_no_options(
    kind: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run.yaml").write_bytes(FILES[kind])
    line = fails(capsys, *options, "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "run"))
    assert str(tmp_path / "run.yaml") in line


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95, 0.999])
def test_half_of_a_runs_options(
    share: float, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A file of options that is cut is refused. It may still be YAML, and what it lacks would get its default."""
    output = tmp_path / "run"
    assert cli.main([*options, "--output", str(output)]) == 0
    resume = [*options[: 2 if options[0] == "finetune" else 1], "--resume", "--output", str(output)]
    whole = (output / "config.yaml").read_bytes()
    capsys.readouterr()
    cut = whole[: int(share * len(whole))]
    for content in {cut, cut[: cut.rfind(b"\n") + 1]}:
        (output / "config.yaml").write_bytes(content)
        assert str(output / "config.yaml") in fails(capsys, *resume)
    # The same options written by another program are accepted.
    (output / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(whole), sort_keys=False))
    assert cli.main(resume) == 0


# --- Terminals, paths and pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_knows_little(encoding: str, tiny_run: list[str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    output = tmp_path / "Läufe …"
    run = subprocess.run(
        [sys.executable, "-m", "fastformer.cli", *tiny_run, "--max_steps", "2", "--output", str(output)],
        capture_output=True,
        env=environment,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert (b"+/-" if encoding == "ascii" else "±".encode("latin-1")) in run.stdout


def test_foreign_text_acts_nowhere(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Classes, texts and the folder's name have no effect on terminals, Markdown, HTML and formulas."""
    require("jsonargparse")
    hostile = "\x1b[31m<script>alert(1)</script>|`[x](http://evil) $\\frac{ [red]"
    rows = [{"text": f"{hostile} {number}", "label": f"{hostile} {number % 2}"} for number in range(60)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "run \x1b[2J<b>`x`"
    arguments = command("classify", tmp_path, output)
    arguments[arguments.index("--data") + 1] = str(tmp_path / "train.jsonl")
    assert cli.main([*arguments, *scratch(), "--max_steps", "2"]) == 0
    shown, report = capsys.readouterr(), (output / "report.md").read_text()
    assert "\x1b" not in shown.out + shown.err + report
    assert "<script>" not in report
    assert "&lt;script&gt;" in report
    assert (output / "confusion.png").exists()
    assert "\x1b" not in fails(capsys, "predict", str(output / "absent\x1b[2J"), "--data", "x", "--out", "y")
