"""The documents name the right paths, folders of tests and version."""

from __future__ import annotations

import re
from glob import glob
from pathlib import Path

import pytest

import fastformer

pytestmark = [pytest.mark.cpu, pytest.mark.quick]

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
# The changelog is left out: it names files that no longer exist.
DOCUMENTS = sorted(
    path
    for pattern in ("README.md", "CONTRIBUTING.md", "tests/README.md", "docs/**/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)
PATH = re.compile(r"(?<![\w./-])(?:fastformer|kernels|tests|benchmarks|docs|examples|\.ci|\.github)/[\w./-]*")
LINK = re.compile(r"\]\(([^)#:]+)\)")
# Folders with special ways to find faults, which are not run for every change.
NOT_QUICK = {"executed", "fuzz", "gpu", "mutation"}


def folders_of_tests() -> set[str]:
    return {path.relative_to(TESTS).parts[0] for path in TESTS.glob("*/**/test_*.py")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_exist(document: Path) -> None:
    """Every path in a document exists; ``NAME``, as in ``fastformer/ops/NAME.py``, stands for any name."""
    text = document.read_text()
    paths = {(ROOT, found.rstrip(".")) for found in PATH.findall(text)}
    paths |= {(document.parent, found) for found in LINK.findall(text)}
    assert not sorted(path for folder, path in paths if not glob(path.replace("NAME", "*"), root_dir=folder))


def test_the_guide_to_the_tests_has_every_folder() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", (TESTS / "README.md").read_text(), flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert folders_of_tests() <= named


def test_quick_tests_are_of_every_part() -> None:
    without = {
        folder
        for folder in folders_of_tests() - NOT_QUICK
        if not any("pytest.mark.quick" in path.read_text() for path in (TESTS / folder).rglob("test_*.py"))
    }
    assert not without


def test_one_version() -> None:
    version = fastformer.__version__
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## \[.*{re.escape(version)}", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
