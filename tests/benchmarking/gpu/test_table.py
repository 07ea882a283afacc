"""Tests of the tables that ``fastformer bench gpu`` makes of its records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastformer.benchmarking.gpu.findings import findings_of, mean_ratio, worst_error
from fastformer.benchmarking.gpu.records import append, append_record, entries
from fastformer.benchmarking.gpu.step import Record
from fastformer.benchmarking.gpu.table import MOST_LINES, WIDTH, long_table, rooms_for, short_table


class Run:
    """The records of steps, written as a run writes them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "records.jsonl"

    def step(self, name: str, *records: Record, end: str = "ok", error: str | None = None, modules: int = 0) -> None:
        for record in records:
            append_record(self.path, name, record)
        append(self.path, step=name, end=end, error=error, seconds=12.0, modules=modules)

    @property
    def found(self) -> list[dict[str, Any]]:
        return entries(self.path)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def rate(case: str, peer: str, value: float | None, missing: str | None = None) -> Record:
    return Record(case, peer, "forward", value, "TFLOP/s", missing)


def test_a_figure_beside_its_peers_and_the_ceiling(run: Run) -> None:
    run.step("environment", Record("matrix product", "cuBLAS", "ceiling", 800.0, "TFLOP/s"))
    run.step("attention", rate("d64", "fastformer", 400.0), rate("d64", "flash", 500.0), rate("d64", "flex", 100.0))
    lines = short_table(run.found).splitlines()
    (line,) = (line for line in lines if line.startswith("d64"))
    assert line.split() == ["d64", "forward", "400", "TFLOP/s", "50%", "0.80", "500", "flash"]
    assert "ratio to the best peer 0.80 (0.80 to 0.80, 1 figures)" in lines[3]
    assert "| d64 | forward | 400 TFLOP/s | 50% | 0.80 | 500 flash, 100 flex |" in long_table(run.found)


@pytest.mark.parametrize(("unit", "ratio"), [("us", 2.0), ("GiB", 2.0), ("GB/s", 0.5), ("tokens/s", 0.5), ("%", 0.5)])
def test_more_is_better_of_rates_and_shares_alone(run: Run, unit: str, ratio: float) -> None:
    run.step("step", *(Record("a", peer, "m", value, unit) for peer, value in (("fastformer", 1.0), ("peer", 2.0))))
    (finding,) = findings_of(entry for entry in run.found if "case" in entry)
    assert finding.ratio == ratio


def test_errors_are_no_part_of_the_ratio_and_the_worst_is_shown(run: Run) -> None:
    errors = {"small": (1e-3, 2e-3), "worst": (4e-3, 1e-3), "largest": (9e-3, 9e-3)}
    for case, figures in errors.items():
        for peer, value in zip(("fastformer", "peer"), figures, strict=True):
            append_record(run.path, "step", Record(case, peer, "error", value, "relative"))
    run.step("step", rate("a", "fastformer", 1.0), rate("a", "peer", 1.0))
    findings = findings_of(entry for entry in run.found if "case" in entry)
    worst = worst_error(findings)
    assert worst is not None and worst.case == "worst"
    assert mean_ratio(findings) == (1.0, 1.0, 1.0, 1)
    table = short_table(run.found)
    assert "worst" in table and "small" not in table


def test_what_failed_is_said_in_a_line_for_each_reason(run: Run) -> None:
    run.step(
        "attention",
        rate("a", "fastformer", None, "illegal access"),
        rate("b", "fastformer", None, "illegal access"),
        rate("a", "flash-attn", None, "not installed"),
        rate("b", "flash-attn", None, "not installed"),
        end="timed out",
        error="was ended after 70 s",
    )
    assert [line.strip() for line in short_table(run.found).splitlines()[1:]] == [
        "attention: timed out, 12 s, 4 records",
        "! was ended after 70 s",
        "! a forward and 1 more: illegal access",
        "! peers without figures: flash-attn: not installed (2)",
    ]


def test_what_was_compiled_is_counted(run: Run) -> None:
    for kernel in ("_forward", "_forward", "_backward"):
        append(run.path, step="attention", compiled=kernel)
    run.step("attention", modules=3)
    assert "! compiled during the run: _forward 2, _backward 1, 3 C launchers" in short_table(run.found)


def test_the_short_table_is_short_and_the_long_one_has_everything(run: Run) -> None:
    for step in range(11):
        records = [rate(f"{step}-{case} {'long' * 40}", "fastformer", 1.0) for case in range(step * 10)]
        failures = [rate(f"failed {number}", "fastformer", None, f"reason {number}") for number in range(9)]
        run.step(f"step-{step}", *records, *failures)
    lines = short_table(run.found).splitlines()
    assert len(lines) == MOST_LINES
    assert max(map(len, lines)) <= WIDTH
    assert all(f"step-{step}: ok" in "\n".join(lines) for step in range(11))
    assert long_table(run.found).count("long |") == sum(step * 10 for step in range(11))
    assert long_table(run.found).count("reason") == 11 * 9


def test_rooms() -> None:
    assert rooms_for([1, 5, 9], 9) == [1, 4, 4]
    assert rooms_for([1, 2], 9) == [1, 2]
    assert rooms_for([3], -1) == [0]
