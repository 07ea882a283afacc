"""The published report and the table of goals in docs/benchmarks.md agree with the published results."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastformer.benchmarking.measurement import worst
from fastformer.benchmarking.report import judged, write_report
from fastformer.benchmarking.results import Results, load_results
from fastformer.benchmarking.tables import verdict_rows

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "docs/benchmarks"


@pytest.fixture(scope="module")
def results() -> Results:
    return load_results(PUBLISHED / "results.json")


def test_report_is_of_the_results(results: Results, tmp_path: Path) -> None:
    assert not results.quick
    write_report(results, tmp_path)
    assert (tmp_path / "report.md").read_text() == (PUBLISHED / "report.md").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == {path.name for path in PUBLISHED.glob("*.png")}


def test_docs_have_every_goal_met_or_missed(results: Results) -> None:
    assert verdict_rows(worst(judged(results))).markdown() in (ROOT / "docs/benchmarks.md").read_text()
