"""What the benchmarks share: a study is run as ``fastformer bench`` runs it, and must reach its goals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastformer.benchmarking.measurement import verdicts
from fastformer.benchmarking.studies import load
from fastformer.benchmarking.study import Setting
from fastformer.benchmarking.tables import study_rows, verdict_rows


@pytest.fixture
def reach_goals(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Runs a study on a CPU by its name, prints what it found, and asserts its goals."""

    def run(name: str) -> None:
        study = load(name)
        measured = list(study.measure(Setting(torch.device("cpu"))))
        judged = verdicts(study.goals, measured)
        with capsys.disabled():
            print(f"\n{study_rows(measured, 'CPU').markdown()}\n\n{verdict_rows(judged).markdown()}")
        missed = [verdict for verdict in judged if verdict.met is False]
        assert not missed, verdict_rows(missed).markdown()

    return run
