"""Tests of `fastformer predict`: which files it refuses to replace, and which to read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fastformer import cli

OPTIONS = {
    "task": "classify",
    "max_length": 128,
    "text": {"stride": 32, "beams": 1},
    "trainer": {"detect_anomaly": False},
}
EXAMPLES = '{"text": "some"}\n'


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Write the part of a run that `predict` looks at before it reads the model."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(OPTIONS, sort_keys=False))
    (tmp_path / "data.jsonl").write_text(EXAMPLES)
    return tmp_path / "run"


def refusal(run: Path, out: Path, capsys: pytest.CaptureFixture[str], *options: str, data: str = "data.jsonl") -> str:
    arguments = ["predict", str(run), "--data", str(run.parent / data), "--out", str(out), *options]
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def linked(path: Path, to: Path, link: Callable[[Path, Path], None]) -> Path:
    link(to, path)
    return path


def test_its_input_is_never_replaced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "given.jsonl").symlink_to(data)
    outs = [
        data,
        linked(tmp_path / "link", data, os.symlink),
        linked(tmp_path / "hard", data, os.link),
        tmp_path / "folder" / "data.jsonl",
        run / ".." / "data.jsonl",
    ]
    for out in outs:
        for options in ([], ["--overwrite"]):
            for given in ("data.jsonl", "given.jsonl"):
                assert f"--out {out} is part of the input, --data" in refusal(run, out, capsys, *options, data=given)
    assert data.read_text() == EXAMPLES
    for out in (run / "config.yaml", run / "model" / "config.json"):
        assert f"--out {out} is part of the input, DIR" in refusal(run, out, capsys, "--overwrite")


def test_the_file_beside_its_input_is_never_replaced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump({**OPTIONS, "task": "summarize"}, sort_keys=False))
    for suffix in ("source", "target"):
        (tmp_path / f"test.{suffix}").write_text("some\n")
    assert "part of the input, --data" in refusal(
        run, tmp_path / "test.target", capsys, "--overwrite", data="test.source"
    )


def test_what_is_there_is_never_replaced_unasked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    error = refusal(run, tmp_path / "thesis.tex", capsys)
    assert "thesis.tex already exists: replace it with --overwrite" in error
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    assert "is a folder" in refusal(run, run, capsys, "--overwrite")


WHOLE = yaml.safe_dump(OPTIONS, sort_keys=False)
DAMAGED = {
    "empty": "",
    "a list": "- a\n",
    "no YAML": "a: [\n",
    "no text": WHOLE.replace("text:", "texts:"),
    "misspelt": WHOLE.replace("max_length", "max_lenght"),
    "misspelt within": WHOLE.replace("stride", "strid"),
    "of a former run": yaml.safe_dump({**OPTIONS, "text": {"max_length": 128}}, sort_keys=False),
    "another type": WHOLE.replace("128", "x128"),
    "text is a word": yaml.safe_dump({**OPTIONS, "text": "a"}, sort_keys=False),
    "task is a list": yaml.safe_dump({**OPTIONS, "task": ["a"]}, sort_keys=False),
    "no task": yaml.safe_dump({**OPTIONS, "task": None}, sort_keys=False),
    "cut at a line": WHOLE.partition("trainer")[0],
    "cut in a line": WHOLE[:-3],
    **{f"{share} of it": WHOLE[: int(len(WHOLE) * share)] for share in (0.25, 0.5, 0.75)},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_options_are_named(damage: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.yaml").write_text(DAMAGED[damage])
    assert str(run / "config.yaml") in refusal(run, run.parent / "out.jsonl", capsys)


def test_beams_are_for_tasks_that_write(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(run, tmp_path / "out.jsonl", capsys, "--beams", "4")
    assert line.endswith(f"--beams is for summarize, translate, generate; {run} is a run of classify")
