"""Files can make a command do only what they are for: no class of others, no code, and no question to the user."""

from __future__ import annotations

import ast
import io
import json
import pydoc
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import fastformer
from fastformer import cli
from fastformer.extras import require
from fastformer.training.options import _HARMLESS

LIGHTNINGS = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}
EVIL = {"class_path": "evil.Callback"}


def lightnings(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": arguments}


FOREIGN: dict[str, dict[str, Any]] = {
    "a class": {"callbacks": [EVIL]},
    "one among ours": {"callbacks": [LIGHTNINGS, EVIL]},
    "a name alone": {"callbacks": ["evil.Callback"]},
    "not in a list": {"callbacks": "evil.Callback"},
    "a logger": {"logger": {"class_path": "evil.Logger"}},
    "a profiler": {"profiler": "evil.Profiler"},
    "a plugin": {"plugins": [{"class_path": "evil.Plugin"}]},
    "a function": {"callbacks": [lightnings("LambdaCallback", on_fit_start="evil.function")]},
    "an argument": {"callbacks": [lightnings("ModelCheckpoint", dirpath=EVIL)]},
    "an argument of any kind": {"callbacks": [lightnings("Callback", anything=EVIL)]},
    "a process": {"callbacks": [{"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "{}"]}}]},
    "a module of ours": {"callbacks": [{"class_path": "fastformer.benchmarking.environment.subprocess.Popen"}]},
}


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of a file that exists once the module `evil` has been imported."""
    require("jsonargparse")
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nfrom lightning.pytorch import Callback\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    return ran


def fails(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Return the one line of error with which a command line ends, with status 2."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as exit:
        status = exit.code
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    return line


def test_what_is_named_of_ours_exists() -> None:
    # A name that does not exist would be refused for that reason, and the tests below would show nothing.
    names = re.findall(r"fastformer\.[\w.]+", json.dumps([FOREIGN, WRITERS]))
    assert len(names) == 3
    assert all(pydoc.locate(name) for name in names)


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("command", ["pretrain", "finetune classify"])
def test_a_file_of_options_runs_no_code(
    command: str, kind: str, evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"trainer": FOREIGN[kind]}).replace("{}", str(evil)))
    arguments = [*command.split(), "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "run")]
    line = fails(capsys, *arguments)
    assert line.startswith(f"fastformer {command.split()[0]}")
    assert "error: " in line
    assert not evil.exists()
    assert not (tmp_path / "run").exists()


# Classes of Lightning and of ours that write where they are told to, or call what they are told to.
WRITERS: dict[str, dict[str, Any]] = {
    "ours": {
        "callbacks": [
            {"class_path": "fastformer.training.callbacks.SavePretrained", "init_args": {"folder": "{}"}},
        ]
    },
    "ours, elsewhere": {
        "callbacks": [
            {"class_path": "fastformer.training.pretraining_run.SavePretrained", "init_args": {"folder": "{}"}},
        ]
    },
    "a checkpoint": {"callbacks": [lightnings("ModelCheckpoint", dirpath="{}")]},
    "by its place": {"callbacks": ["lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint"]},
    "by its name alone": {"callbacks": ["ModelCheckpoint"]},
    "beside a harmless one": {"callbacks": [LIGHTNINGS, lightnings("OnExceptionCheckpoint", dirpath="{}")]},
    "of functions": {"callbacks": [lightnings("LambdaCallback", on_fit_start="shutil.rmtree")]},
    "a logger": {"logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "{}"}}},
    "a profiler": {
        "profiler": {"class_path": "lightning.pytorch.profilers.SimpleProfiler", "init_args": {"dirpath": "{}"}}
    },
    "a plugin": {"plugins": [{"class_path": "lightning.pytorch.plugins.io.TorchCheckpointIO"}]},
}


@pytest.mark.parametrize("way", ["--config", "--resume", "the command line"])
@pytest.mark.parametrize("kind", WRITERS)
def test_what_writes_elsewhere_needs_trust(
    kind: str, way: str, tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    victim, output = tmp_path / "victim", tmp_path / "run"
    victim.mkdir()
    (victim / "thesis").write_text("mine")
    text = json.dumps(WRITERS[kind]).replace("{}", str(victim))
    arguments = [*tiny_run, "--max_steps", "1", "--output", str(output)]
    if way == "--config":
        (tmp_path / "run.yaml").write_text(json.dumps({"trainer": json.loads(text)}))
        arguments += ["--config", str(tmp_path / "run.yaml")]
    elif way == "--resume":
        output.mkdir()
        options = yaml.safe_load(_options_of(tiny_run, capsys))
        options["trainer"].update(json.loads(text))
        (output / "config.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
        arguments = ["pretrain", "--resume", "--output", str(output)]
    else:
        ((name, value),) = json.loads(text).items()
        arguments += [f"--trainer.{name}={json.dumps(value)}"]
    line = fails(capsys, *arguments)
    # (A profiler may also be a text, so a refused class is taken for a wrong text.)
    assert "give --trust" in line or (kind == "a profiler" and "can only be one of" in line)
    assert [path.name for path in victim.iterdir()] == ["thesis"]
    assert [path.name for path in output.glob("*")] == (["config.yaml"] if way == "--resume" else [])


def _options_of(command: list[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit):
        cli.main([*command, "--print_config"])
    return capsys.readouterr().out


def test_every_class_that_needs_no_trust_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    required = {
        "EarlyStopping": {"monitor": "val/loss"},
        "GradientAccumulationScheduler": {"scheduling": {0: 1}},
    }
    named = [lightnings(kind.__name__, **required.get(kind.__name__, {})) for kind in _HARMLESS]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": named}}))
    with pytest.raises(SystemExit) as exit:
        cli.main(["pretrain", "--config", str(tmp_path / "run.yaml"), "--print_config"])
    assert exit.value.code == 0
    written = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert [each["class_path"] for each in written] == [each["class_path"] for each in named]


def test_the_class_is_named_and_how_to_allow_it(evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"trainer": FOREIGN["a class"]}))
    line = fails(capsys, "pretrain", "--config", str(tmp_path / "run.yaml"))
    assert "a file names evil.Callback, which is neither Lightning's nor Fastformer's" in line
    assert "--trust" in line


def test_a_file_does_not_trust_itself(evil: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for content in ({"trust": True}, {"trust": True, "trainer": FOREIGN["a class"]}):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        line = fails(capsys, "pretrain", "--config", str(tmp_path / "run.yaml"))
        assert "--trust" in line
    assert not evil.exists()


def test_a_run_that_is_resumed_runs_no_code(
    evil: Path, tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "run"
    # Lightning's own classes need no trust.
    ours = ["--trainer.callbacks", json.dumps([LIGHTNINGS])]
    assert cli.main([*tiny_run, "--max_steps", "2", *ours, "--output", str(output)]) == 0
    assert cli.main(["pretrain", "--resume", "--output", str(output)]) == 0
    options = yaml.safe_load((output / "config.yaml").read_text())
    options["trainer"]["callbacks"] = FOREIGN["a class"]["callbacks"]
    (output / "config.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
    capsys.readouterr()
    assert "evil.Callback" in fails(capsys, "pretrain", "--resume", "--output", str(output))
    assert not evil.exists()
    # Options that the command line replaces are not checked, and what the command line names is the user's own choice.
    assert cli.main(["pretrain", "--resume", "--output", str(output), "--trainer.callbacks", "null"]) == 0
    assert not evil.exists()
    named = json.dumps([{"class_path": "evil.Callback"}])
    assert cli.main(["pretrain", "--resume", "--output", str(output), "--trainer.callbacks", named]) == 0
    assert evil.exists()
    evil.unlink()
    del sys.modules["evil"]
    assert cli.main(["pretrain", "--resume", "--output", str(output), "--trust"]) == 0
    assert evil.exists()


# --- Models with code of their own ------------------------------------------------------------------------------------


@pytest.fixture
def coded(evil: Path, tmp_path: Path) -> Path:
    """Return the folder of a model that has its own code."""
    folder = tmp_path / "model"
    folder.mkdir()
    names = {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", None], "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": names}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": names}))
    (folder / "evil.py").write_text((tmp_path / "evil.py").read_text())
    return folder


class _NeverAsked(io.StringIO):
    def readline(self, *arguments: Any) -> str:
        raise AssertionError("asked on standard input")

    def isatty(self) -> bool:
        return True


COMMANDS = {
    "finetune": ["classify", "--max_steps", "1", "--model", "{}"],
    "predict": ["{run}", "--data", "{data}", "--out", "out.jsonl"],
    "generate": ["{}", "--prompt", "one"],
    "explain": ["{}", "--text", "one", "--out", "out"],
    "convert": ["{}", "out"],
    "verify": ["{}"],
    "plan": ["--model", "{}"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_models_own_code_is_neither_run_nor_asked_about(
    name: str,
    coded: Path,
    evil: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", _NeverAsked())
    monkeypatch.setattr("builtins.input", lambda *arguments: pytest.fail("asked on standard input"))
    (tmp_path / "config.yaml").write_text("task: classify\nmax_length: 128\ntext: {}\n")
    places = {"run": str(tmp_path), "data": str(data / "classify/test.jsonl")}
    arguments = [argument.format(coded, **places) for argument in COMMANDS[name]]
    line = fails(capsys, name, *arguments)
    assert line.startswith(f"fastformer {name}: error: ") or name == "verify"
    assert not evil.exists()


def test_every_auto_class_is_told_to_trust_no_code() -> None:
    """Every auto class is told to trust no code. Otherwise it asks the user if a folder has code."""
    untold = []
    for path in Path(fastformer.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            automatic = node.func.attr in ("from_pretrained", "from_config")
            owner = ast.unparse(node.func.value)
            named = {keyword.arg for keyword in node.keywords}
            if automatic and owner.lower().startswith("auto") and not named & {"trust_remote_code", None}:
                untold.append(f"{path}:{node.lineno}")
    assert untold == []
