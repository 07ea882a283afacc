"""A run on a small tree tries, keeps and reports the right mutants. No test of the project is run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mutation import __main__ as running
from mutation.mutants import draw

pytestmark = pytest.mark.cpu

SOURCES = {
    "fastformer/ops/one.py": "def one(a, b):\n    return a < b\n",
    "fastformer/data/two.py": "def two(a, b):\n    return a + b\n",
    "fastformer/training/three.py": "def three(a):\n    return not a\n",
}
ONE, TWO, THREE = SOURCES
NOTICING = "tests/ops/test_one.py::test_one[1 - 2]"


class Pytest:
    """A stand-in for pytest, which notices the faults of some files, or fails without a fault."""

    def __init__(self) -> None:
        self.notices = {ONE: NOTICING}
        self.status, self.printed = 0, ""
        self.tried: list[str] = []
        self.checked: list[list[str]] = []

    def __call__(self, tree: Path, tests: list[str], seconds: int) -> tuple[int, str]:
        faulty = [name for name, source in SOURCES.items() if (tree / name).read_text() != source]
        if not faulty:
            self.checked.append(tests)
            return self.status, self.printed
        (name,) = faulty
        self.tried.append(name)
        return (1, f"FAILED {self.notices[name]} - assert 1\n") if name in self.notices else (0, "1 passed\n")


@pytest.fixture
def tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pytest:
    root = tmp_path / "root"
    for name, source in SOURCES.items():
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(source)
    (root / "tests").mkdir()
    (root / "tests/test_all.py").touch()
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    (three,) = [mutant for mutant in draw(root, 40, 0) if mutant.path == THREE]
    (tmp_path / "equivalent.json").write_text(json.dumps({three.key: "is the same"}))
    monkeypatch.setattr(running, "ROOT", root)
    monkeypatch.setattr(running, "EQUIVALENT", tmp_path / "equivalent.json")
    stand_in = Pytest()
    monkeypatch.setattr(running, "pytest_in", stand_in)
    return stand_in


def run(out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["mutation", "--mutants", "40", "--out", str(out), *options])
    assert running.main() == 0
    return json.loads((out / "report.json").read_text())


def survivors(report: dict) -> list[str]:
    return [entry["key"].split(" | ")[0] for entry in report["survivors"]]


def test_a_run_is_continued_and_survivors_are_tried_again(
    tests: Pytest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path / "out", monkeypatch)
    assert sorted(tests.tried) == [TWO, ONE]
    assert survivors(first) == [TWO]
    assert list(first["equivalent"].values()) == ["is the same"]
    assert first["areas"]["fastformer/ops"] == {"drawn": 1, "tried": 1, "equivalent": 0, "survived": 0}
    assert first["areas"]["fastformer/training"] == {"drawn": 1, "tried": 0, "equivalent": 1, "survived": 0}
    # A second run has nothing left to do.
    assert run(tmp_path / "out", monkeypatch) == first
    assert len(tests.tried) == 2
    # Now a test notices the survivor.
    tests.notices[TWO] = "tests/data/test_two.py::test_two"
    second = run(tmp_path / "out", monkeypatch, "--again", "--workers", "2")
    assert tests.tried[2:] == [TWO]
    assert survivors(second) == []
    # The next run knows the new results.
    assert run(tmp_path / "out", monkeypatch) == second
    assert len(tests.tried) == 3


def test_tests_that_fail_without_a_fault_are_reported(
    tests: Pytest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tests.notices[TWO] = "tests/data"
    tests.status, tests.printed = 1, f"..F\nFAILED {NOTICING} - assert x[0] == [1]\n1 failed, 2 passed\n"
    report = run(tmp_path, monkeypatch)
    # All tests run, also after the first that fails.
    assert tests.checked == [["tests/data", NOTICING, "--maxfail=0"]]
    assert report["tests that fail without a fault"] == [NOTICING]
    assert f"fails without a fault, proves nothing: {NOTICING}" in capsys.readouterr().out


def test_nothing_is_run_without_a_fault_where_nothing_was_noticed(
    tests: Pytest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests.notices.clear()
    assert run(tmp_path, monkeypatch)["tests that fail without a fault"] == []
    assert tests.checked == []


def test_tests_that_are_there_no_more_are_no_proof(
    tests: Pytest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing test is an error: pytest then runs no tests, which must not count as no failures."""
    tests.status, tests.printed = 4, f"ERROR: not found: {NOTICING}\n"
    with pytest.raises(RuntimeError, match="status 4 for the tests that noticed faults:\nERROR: not found"):
        run(tmp_path, monkeypatch)
