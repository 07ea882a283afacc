"""Files at the place where a command would write stay as they are, and one line says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastformer import cli
from fastformer.extras import require
from fastformer.integrations.verification import coverage

STUDY = "linear-cross-entropy"
EVALUATE = ["evaluate", "predictions.jsonl", "--task", "classify", "--output", "out"]
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "evaluate, metrics": ("out/metrics.json", EVALUATE),
    "evaluate, picture": ("out/confusion.png", EVALUATE),
    "bench, results": ("out/results.json", ["bench", STUDY, "--quick", "--out", "out"]),
    "bench, report": ("out/report.md", ["bench", STUDY, "--quick", "--out", "out", "--resume"]),
    "bench, picture": (f"out/{STUDY}.png", ["bench", STUDY, "--quick", "--out", "out"]),
    "bench gpu": ("out/table.md", ["bench", "gpu", "--dry-run", "--out", "out"]),
    "kernels compile": ("out/group/__grp__k.json", ["kernels", "compile", "--arch", "sm_90", "--out", "out"]),
    "kernels report, figures": ("figures.json", ["kernels", "report", "--arch", "sm_90", "--json", "figures.json"]),
    "kernels report, picture": ("roofline.png", ["kernels", "report", "--arch", "sm_90", "--picture", "roofline.png"]),
    "numerics, errors": ("errors.json", ["numerics", "--json", "errors.json"]),
    "numerics, picture": ("errors.png", ["numerics", "--picture", "errors.png"]),
    "verify": ("report.json", ["verify", "BertModel", "--out", "report.json"]),
    "data export": ("train.jsonl", ["data", "export", "python-questions", "--out", "train.jsonl"]),
    "hub export": ("out/thesis.tex", ["hub", "export", "out"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_there_is_never_replaced_unasked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    require("jsonargparse")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "predictions.jsonl").write_text('{"prediction": "a", "reference": "a"}\n')
    file, arguments = COMMANDS[name]
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("precious")
    before = set(tmp_path.rglob("*"))
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert file.partition("/")[0] in line
    assert Path(file).read_text() == "precious"
    assert set(tmp_path.rglob("*")) == before


def test_the_table_of_coverage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "table.md"
    file.write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        coverage.main(["--out", str(file), "--classes", "BertModel"])
    assert f"--out {file} already exists: replace it with --overwrite" in capsys.readouterr().err
    assert file.read_text() == "precious"


def test_metrics_are_replaced_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "predictions.jsonl").write_text('{"prediction": "a", "reference": "a"}\n')
    assert [cli.main(EVALUATE), cli.main(EVALUATE), cli.main([*EVALUATE, "--overwrite"])] == [0, 2, 0]
