"""Every operator and its peers through pytest-benchmark, a group for each case.

The study ``operators`` of ``test_studies.py`` measures the same cases, and prints them as one table.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastformer.benchmarking.studies.operators import cases
from fastformer.benchmarking.study import Setting
from fastformer.benchmarking.timing import wait

SETTING = Setting(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
CASES = {case.name: case for case in cases(SETTING)}
PEERS = [pytest.param(case.name, peer, id=f"{case.name}, {peer}") for case in CASES.values() for peer in case.peers]


@pytest.mark.parametrize(("case", "peer"), PEERS)
def test_operator(case: str, peer: str, benchmark: BenchmarkFixture) -> None:
    chosen = CASES[case].peers[peer]
    if reason := chosen.missing(SETTING.device):
        pytest.skip(f"{peer}: {reason}")
    run = chosen.prepare()

    def finished() -> None:
        run()
        wait(SETTING.device)

    benchmark.group = case
    benchmark.extra_info["work"] = CASES[case].work
    benchmark.pedantic(finished, rounds=5, warmup_rounds=1)
