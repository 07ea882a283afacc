"""Tests of ``fastformer bench``: its files, resuming, comparing, and errors."""

from __future__ import annotations

import json

import pytest

from fastformer.benchmarking.results import load_results
from fastformer.commands.bench_studies import main

STUDY = "linear-cross-entropy"


def bench(*arguments: object) -> None:
    main([str(argument) for argument in arguments], 0.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("bench")
    bench(STUDY, "--quick", "--rounds", 1, "--out", folder)
    return folder


def test_files(finished) -> None:
    results = load_results(finished / "results.json")
    assert results.quick and list(results.studies) == [STUDY]
    report = (finished / "report.md").read_text()
    assert "do not publish these figures" in report and f"({STUDY}.png)" in report and "PyTorch" in report
    assert (finished / f"{STUDY}.png").read_bytes().startswith(b"\x89PNG")


def test_resume_keeps_what_was_finished(finished, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "results.json").read_bytes()
    bench(STUDY, "--quick", "--out", finished, "--resume")
    assert f"{STUDY}: finished before" in capsys.readouterr().out
    assert (finished / "results.json").read_bytes() == before


def test_compare_fails_on_a_regression(finished, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    old = json.loads((finished / "results.json").read_text())
    for each in old["studies"][STUDY]:
        each["values"] = [value / 2 for value in each["values"]] if each["peer"] == "fastformer" else each["values"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    with pytest.raises(SystemExit, match="1"):
        bench(STUDY, "--quick", "--out", finished, "--resume", "--compare", tmp_path / "old.json")
    assert "worse" in capsys.readouterr().out
    assert "## Changes" in (finished / "report.md").read_text()


def test_errors(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"studies must be among .*linear-cross-entropy.*; got speed"):
        bench("speed", "--out", tmp_path)
    (tmp_path / "old.json").write_text("{}")
    with pytest.raises(ValueError, match="has no results"):
        bench(STUDY, "--compare", tmp_path / "old.json", "--out", tmp_path)
