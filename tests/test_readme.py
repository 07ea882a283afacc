"""Every command and snippet of the README runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastformer.benchmarking.studies import sentiment

pytestmark = pytest.mark.cpu

pytest.importorskip("jsonargparse", reason="most commands run on the model that `fastformer pretrain` leaves")

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's main job has run: its command, cut to two steps."""
    folder = tmp_path_factory.mktemp("readme")
    install, _, command = blocks("bash")[0].strip().partition(" && ")
    assert install == 'pip install -e ".[train]"'
    arguments = [*command.split()[1:], "--max_steps", "2"]
    run = subprocess.run(
        [sys.executable, "-m", "fastformer.cli", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return folder


def test_main_job(trained: Path) -> None:
    assert (trained / "runs/pretrain/model/model.safetensors").exists()
    assert (trained / "runs/pretrain/loss.png").exists()


def test_test_command_is_what_ci_runs() -> None:
    ci = (Path(__file__).parent.parent / ".ci/run").read_text()
    assert blocks("bash")[1].strip() in ci.replace("--quiet ", "")


@pytest.mark.parametrize("snippet", blocks("python"))
def test_snippet(snippet: str, trained: Path) -> None:
    run = subprocess.run([sys.executable, "-c", snippet], cwd=trained, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_resume_command(trained: Path) -> None:
    assert "`fastformer pretrain --resume`" in README
    command = [sys.executable, "-m", "fastformer.cli", "pretrain", "--resume", "--max_steps", "3"]
    run = subprocess.run(command, cwd=trained, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


# What each command that takes minutes is cut down to.
SMALLEST = {
    "finetune": (
        *("--max_steps", "2", "--vocab_size", "400", "--overrides.num_hidden_layers=1"),
        *("--text.max_target_length", "4"),
    ),
    "kernels compile": ("--operators", "merge_attention", "--dtypes", "bfloat16", "--layouts", "aligned"),
    "kernels report": ("--operators", "merge_attention", "--arch", "sm_80"),
    "numerics": ("--operators", "softmax", "--dtypes", "float32"),
    "doctor": (),
    "verify": (),
    "hub export": (),
    "models": ("bert-tiny",),
    "plan": (),
    "explain": (),
    "bench": ("linear-cross-entropy", "--quick"),
}


COMMANDS = [line for block in blocks("bash")[2:] for line in block.replace("\\\n", " ").strip().splitlines()]
SENTIMENT = [command for command in COMMANDS if "sentiment" in command]
CONVERT = [command for command in COMMANDS if "runs/bert" in command or "converted/bert" in command]


def run_command(arguments: list[str], folder: Path) -> None:
    command = [sys.executable, "-m", "fastformer.cli", *arguments]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_convert_commands(trained: Path) -> None:
    assert [command.split()[1] for command in CONVERT] == ["pretrain", "convert", "convert"]
    for command in CONVERT:
        arguments = command.split()[1:]
        run_command([*arguments, "--max_steps", "2"] if arguments[0] == "pretrain" else arguments, trained)


def test_sentiment_commands(trained: Path) -> None:
    """Those that the study measures, here on a set that is not to be fetched, and cut to two steps."""
    expected = [sentiment.FETCH, sentiment.EXPORT, sentiment.PRETRAIN]
    expected += [sentiment.FINETUNE_PRETRAINED, sentiment.FINETUNE_SCRATCH]
    assert [shlex.split(command) for command in SENTIMENT] == [["fastformer", *shlex.split(each)] for each in expected]
    for command in expected[1:]:
        arguments = shlex.split(command.replace("vader-sentiment", "python-classes"))
        if arguments[0] != "data":
            arguments += ["--max_steps", "2"]
        run_command(arguments, trained)
    for name in ("pretrained", "scratch"):
        assert (trained / "runs/sentiment" / name / "report.md").exists()


@pytest.mark.parametrize("command", [line for line in COMMANDS if line not in (*CONVERT, *SENTIMENT)])
def test_inspection_command(command: str, tmp_path: Path, trained: Path) -> None:
    if command in (Path(__file__).parent.parent / ".ci/run").read_text().splitlines():
        return  # it runs there, for minutes
    name = next(name for name in SMALLEST if command.startswith(f"fastformer {name}"))
    command = re.sub(r" --model \S+ --precision \S+", "", command).replace("/opt", str(tmp_path))
    arguments = [*shlex.split(command)[1:], *SMALLEST[name]]
    run = subprocess.run(
        [sys.executable, "-m", "fastformer.cli", *arguments],
        cwd=trained,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
