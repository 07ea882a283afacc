"""Each study is run on the CPU as ``fastformer bench`` runs it, and must reach its goals.

``pytest benchmarks -k first-call`` runs one study, by the name that ``fastformer bench --list`` gives it.
"""

from __future__ import annotations

import pytest
import torch

from fastformer.benchmarking.measurement import verdicts
from fastformer.benchmarking.studies import STUDIES, load
from fastformer.benchmarking.study import Setting
from fastformer.benchmarking.tables import study_rows, verdict_rows

# These train many models, for hours, or need what a plain machine lacks: a C++ compiler, or a file that is downloaded.
LEFT_OUT = {"compiled-pretraining", "crossovers", "sentiment", "tasks"}


@pytest.mark.parametrize("name", [name for name in STUDIES if name not in LEFT_OUT])
def test_study(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    study = load(name)
    measured = list(study.measure(Setting(torch.device("cpu"))))
    judged = verdicts(study.goals, measured)
    with capsys.disabled():
        print(f"\n{study_rows(measured, 'CPU').markdown()}\n\n{verdict_rows(judged).markdown()}")
    missed = [verdict for verdict in judged if verdict.met is False]
    assert not missed, verdict_rows(missed).markdown()
