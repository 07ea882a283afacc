"""Several processes train as one does, and a run goes on with another number of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from training.processes import finish, start

STEPS = 6


@pytest.fixture(scope="module")
def options(tiny_run: list[str]) -> list[str]:
    """Without dropout, whose draws depend on the rank; in the first epoch."""
    return [*tiny_run, "--max_steps", str(STEPS), "--model.overrides.hidden_dropout_prob", "0"]


ONE = ("--devices", "1", "--strategy", "auto", "--accumulate", "2")
TWO = {name: ("--devices", "2", "--strategy", name, "--accumulate", "1") for name in ("ddp", "fsdp2")}
KILL = ("--trainer.callbacks", '[{"class_path": "training.killing.Kill", "init_args": {"step": 5}}]')


def curve(output: Path) -> list[float]:
    """The loss of each optimizer step, of resumed ones the later."""
    losses: dict[int, float] = {}
    for version in sorted(output.glob("logs/csv/*")):
        with (version / "metrics.csv").open() as file:
            losses |= {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}
    return [losses[step] for step in sorted(losses)]


@pytest.fixture(scope="module")
def one(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process leaves."""
    output = tmp_path_factory.mktemp("one") / "output"
    finish(start([*options, *ONE, "--output", str(output)]))
    return output


def assert_same_run(output: Path, one: Path) -> None:
    """Up to the rounding of sums in another order."""
    assert len(curve(one)) == STEPS
    assert curve(output) == pytest.approx(curve(one), rel=1e-5)
    found, expected = (json.loads((folder / "metrics.json").read_text()) for folder in (output, one))
    assert found["end"] == pytest.approx(expected["end"], rel=1e-5)
    assert (found["steps"], found["tokens"]) == (expected["steps"], expected["tokens"])


def test_two_processes_have_the_loss_curve_of_one(options: list[str], one: Path, tmp_path: Path) -> None:
    finish(start([*options, *TWO["ddp"], "--output", str(tmp_path / "output")], ranks=2))
    assert_same_run(tmp_path / "output", one)


@pytest.mark.parametrize(
    ("before", "after"), [((2, TWO["fsdp2"]), (1, ONE)), ((1, ONE), (2, TWO["fsdp2"])), ((2, TWO["ddp"]), (1, ONE))]
)
def test_a_run_goes_on_with_another_number_of_processes(
    before: tuple[int, Sequence[str]],
    after: tuple[int, Sequence[str]],
    options: list[str],
    one: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "output"
    for process in (killed := start([*options, *before[1], *KILL, "--output", str(output)], ranks=before[0])):
        process.join(120)
    assert all(process.exitcode for process in killed)
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        "step-0000002.ckpt",
        "step-0000004.ckpt",
    ]
    resume = ["pretrain", "--resume", "--output", str(output), *after[1], "--trainer.callbacks", "null"]
    finish(start(resume, ranks=after[0]))
    assert_same_run(output, one)
