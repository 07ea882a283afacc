"""The study of tasks runs the commands of docs/training.md, and compares their results with the baselines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastformer.benchmarking.measurement import OURS, TIME
from fastformer.benchmarking.studies import load, tasks
from fastformer.benchmarking.study import Setting

TRAINING = (Path(__file__).parents[3] / "docs/training.md").read_text()


def test_commands_are_those_of_the_docs() -> None:
    assert set(tasks.COMMANDS.values()) <= set(TRAINING.splitlines())


def test_the_first_goals_are_for_something_measured() -> None:
    study = load("tasks")
    measured = list(study.measure(Setting(torch.device("cpu"), quick=True)))
    found = {(each.peer, each.metric.name): each.median for each in measured}
    assert found[OURS, TIME.name] > 0
    goals = [goal for goal in study.goals if goal.case == "qa"]
    assert goals
    assert all((name, goal.metric.name) in found for goal in goals for name in (OURS, goal.peer))


def test_a_command_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "COMMANDS", {"qa": "fastformer finetune qa --data absent"})
    with pytest.raises(RuntimeError, match=r"finetune qa --data absent failed: .*neither a set"):
        list(load("tasks").measure(Setting(torch.device("cpu"), quick=True)))
