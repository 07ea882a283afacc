"""Every command and snippet in the README and in the pages of docs/ runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

import fastformer
from fastformer import cli
from fastformer.benchmarking.studies import sentiment

pytestmark = pytest.mark.cpu

pytest.importorskip("jsonargparse", reason="most commands run on the model that `fastformer pretrain` leaves")

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(language: str, pages: list[str] = PAGES) -> list[str]:
    """Return every block of a language once, even if several pages have it."""
    found = [block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)]
    return list(dict.fromkeys(found))


MAIN_JOB, TESTS = (block.strip() for block in blocks("bash", [README]) if " && " in block)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the command of the README's main job has run, cut to two steps."""
    folder = tmp_path_factory.mktemp("readme")
    install, _, command = MAIN_JOB.partition(" && ")
    assert install == 'pip install -e ".[train]"'
    run_command([*command.split()[1:], "--max_steps", "2"], folder)
    return folder


def run_command(arguments: list[str], folder: Path) -> None:
    """Run a command of Fastformer in a process without Triton's interpreter."""
    run = subprocess.run(
        [sys.executable, "-m", "fastformer.cli", *arguments],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_main_job(trained: Path) -> None:
    assert (trained / "runs/pretrain/model/model.safetensors").exists()
    assert (trained / "runs/pretrain/loss.png").exists()


def test_test_command_is_what_ci_runs() -> None:
    assert TESTS in (ROOT / ".ci/run").read_text().replace("--quiet ", "")


@pytest.mark.parametrize("snippet", blocks("python"))
def test_snippet(snippet: str, trained: Path) -> None:
    run = subprocess.run([sys.executable, "-c", snippet], cwd=trained, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_resume_command(trained: Path) -> None:
    assert any("`fastformer pretrain --resume`" in page for page in PAGES)
    run_command(["pretrain", "--resume", "--max_steps", "3"], trained)


def test_reference_has_every_public_name() -> None:
    """The reference has every public name; `mkdocs build` checks entries, and lists other packages' members itself."""
    page = (ROOT / "docs/api/fastformer.md").read_text()
    entries = re.findall(r"^::: fastformer\.(?:\w+\.)*(\w+)$", page, flags=re.MULTILINE)
    assert sorted(entries) == sorted(fastformer.__all__)


# Arguments that cut down each command that takes minutes.
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


INSTALL = "pip install -e ."  # not run: the main job and the tests install more
MUTATION = "PYTHONPATH=tests python -m mutation --mutants 200 --workers 4"  # not run: takes hours; see tests/mutation
COMMANDS = [
    line
    for block in blocks("bash")
    if block.strip() not in (MAIN_JOB, TESTS, INSTALL, MUTATION)
    for line in block.replace("\\\n", " ").strip().splitlines()
]
INFERENCE = [command for command in COMMANDS if "runs/clm" in command or "predictions.jsonl" in command]
SENTIMENT = [command for command in COMMANDS if "sentiment" in command]
CONVERT = [command for command in COMMANDS if "runs/bert" in command or "converted/bert" in command]


def test_convert_commands(trained: Path) -> None:
    assert [command.split()[1] for command in CONVERT] == ["pretrain", "convert", "convert"]
    for command in CONVERT:
        arguments = command.split()[1:]
        run_command([*arguments, "--max_steps", "2"] if arguments[0] == "pretrain" else arguments, trained)


def test_sentiment_commands(trained: Path) -> None:
    """The commands on sentiment are those of the study, and run, on a set without a download, cut to two steps."""
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


def test_inference_commands(tmp_path: Path) -> None:
    assert [command.split()[1] for command in INFERENCE] == ["pretrain", "generate", "predict", "evaluate"]
    run_command(["finetune", "classify", *SMALLEST["finetune"]], tmp_path)
    run_command(["data", "export", "python-classes", "--out", "all.jsonl"], tmp_path)
    first, *_ = (tmp_path / "all.jsonl").read_text().splitlines()
    (tmp_path / "new.jsonl").write_text(first + "\n")
    for command in INFERENCE:
        arguments = shlex.split(command)[1:]
        run_command([*arguments, "--max_steps", "2"] if arguments[0] == "pretrain" else arguments, tmp_path)


# Commands with options that are shown within a line, in a recipe for two machines, or in a Dockerfile.
SHOWN = [
    command
    for page in PAGES
    for command in re.findall(r"(?:^|`)[^`\n]*?fastformer(?:\.cli)? ([^`\n]* --[^`\n]+)", page, flags=re.MULTILINE)
    if command.split()[0] in cli.COMMANDS
]


@pytest.mark.parametrize("command", dict.fromkeys(SHOWN))
def test_options_of_a_command_that_is_shown_exist(command: str, capsys: pytest.CaptureFixture) -> None:
    words = [*takewhile(str.islower, re.sub(r"runs/\S+", "", command.partition(" --")[0]).split())]
    with pytest.raises(SystemExit):
        cli.main([*words, "--help"])
    known = {*re.findall(r"--[\w.]+", capsys.readouterr().out)}
    options = re.findall(r" (--[\w.]+)", command)
    assert [option for option in options if option not in known and not option.startswith("--overrides.")] == []


@pytest.mark.parametrize("command", [line for line in COMMANDS if line not in (*CONVERT, *SENTIMENT, *INFERENCE)])
def test_command(command: str, tmp_path: Path, trained: Path) -> None:
    if command in (ROOT / ".ci/run").read_text().splitlines():
        return  # it runs there and takes minutes
    smaller = next((SMALLEST[name] for name in SMALLEST if command.startswith(f"fastformer {name}")), None)
    assert smaller is not None, f"SMALLEST does not say what {command!r} is cut down to"
    command = re.sub(r" --model \S+ --precision \S+", "", command).replace("/opt", str(tmp_path))
    run_command([*shlex.split(command)[1:], *smaller], trained)
