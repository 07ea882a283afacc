"""What the steps of the GPU benchmark find at tiny sizes, and what their rates are computed from."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastformer.benchmarking.calls import Call
from fastformer.benchmarking.gpu.rates import BACKWARD, BOTH, ERROR, FORWARD, NO_TIME, PEAK_MEMORY, Case, rates
from fastformer.benchmarking.gpu.step import Record, Setting
from fastformer.benchmarking.gpu.steps import attention
from fastformer.benchmarking.measurement import OURS
from fastformer.benchmarking.operations import Work
from fastformer.benchmarking.study import Peer

CPU = torch.device("cpu")


def setting(tmp_path: Path, seconds: float = 600.0) -> Setting:
    return Setting(CPU, dry=True, out=tmp_path, deadline=time.monotonic() + seconds)


def doubled(function: object) -> Call:
    x = torch.arange(1.0, 5.0, requires_grad=True)
    return Call(function, [x], [torch.ones(4)])  # type: ignore[arg-type]


DOUBLE = Case(
    "double",
    {
        OURS: Peer(lambda: doubled(lambda x: 2 * x)),
        "wrong": Peer(lambda: doubled(lambda x: 2 * x + 1)),
        "wrong gradient": Peer(lambda: doubled(lambda x: x.detach() + x)),
        "fails": Peer(lambda: doubled(lambda x: x.view(3))),
        "absent": Peer(lambda: doubled(abs), packages=("no_such_package",)),
    },
    Work("bytes", 32.0, 64.0),
    lambda: [2 * torch.arange(1.0, 5.0), 2 * torch.ones(4)],
)


def by_place(records: list[Record]) -> dict[tuple[str, str], Record]:
    found = {(each.peer, each.metric): each for each in records}
    assert len(found) == len(records)
    return found


def test_a_rate_is_the_work_per_second(tmp_path: Path) -> None:
    found = by_place(list(rates([replace(DOUBLE, phases=(FORWARD, BACKWARD, BOTH), memory=True)], setting(tmp_path))))
    for phase, amount in ((FORWARD, 32.0), (BACKWARD, 64.0), (BOTH, 96.0)):
        record = found[OURS, phase]
        assert record.value == pytest.approx(amount / record.details["seconds"]["median"] / 1e9)
        assert record.unit == "GB/s" and record.details["sets of buffers"] == 2
    assert found[OURS, ERROR].value == 0.0
    assert found[OURS, PEAK_MEMORY].value is not None


def test_what_is_wrong_or_missing_has_no_rate(tmp_path: Path) -> None:
    found = by_place(list(rates([DOUBLE], setting(tmp_path))))
    assert found["wrong", FORWARD].value is None and "wrong, 0.18 from exact" in str(found["wrong", FORWARD].missing)
    assert found["wrong", ERROR].value == pytest.approx(2 / (2 * 30**0.5))
    assert found["wrong gradient", FORWARD].value is not None
    assert found["wrong gradient", BACKWARD].missing == "wrong, 0.5 from exact"
    assert "shape '[3]' is invalid" in str(found["fails", FORWARD].missing)
    assert found["absent", FORWARD].missing == "no_such_package is not installed"


def test_without_time_the_rest_is_missing(tmp_path: Path) -> None:
    found = list(rates([DOUBLE], setting(tmp_path, seconds=0.0)))
    assert {each.missing for each in found if each.peer != "absent"} == {NO_TIME}


def test_attention_everybody_computes_the_same(tmp_path: Path) -> None:
    """Each case of the step, with every peer that runs on a CPU: those that are wrong have no rate."""
    records = list(attention.STEP.run(setting(tmp_path)))
    assert not [each for each in records if each.missing and "wrong" in each.missing]
    ours = [each for each in records if each.peer == OURS]
    assert {each.metric for each in ours} == {FORWARD, BACKWARD, ERROR}
    assert {each.case for each in ours if each.value is None} == {"dropout, causal, d 16, 2 x 32"}
    for peer in ("SDPA flash", "torch.compile"):
        assert any(each.value is not None for each in records if each.peer == peer)


def test_attention_at_full_size_is_16k_tokens_2048_wide() -> None:
    cases = {case.name: case for case in attention.cases(torch.device("meta"), dry=False)}
    # Two products, a multiply and an add, 16 heads, 4 sequences of 4096 x 4096 pairs, of which causal sees half.
    full = 2 * 2 * 16 * 4 * 4096**2 * 128
    assert cases["full, d 128, 4 x 4,096"].work == Work("FLOP", full, 2.5 * full)
    assert cases["causal, d 128, 4 x 4,096"].work == Work("FLOP", full / 2, 2.5 * full / 2)
    assert cases["full, d 64, 4 x 4,096"].work.forward == full
    assert cases["full, d 128, 1 x 16,384"].work.forward == 4 * full
    assert {"causal, d 64, 16 x 1,024", "causal, d 64, 8 x 2,048", "full, d 128, 2 x 8,192"} <= set(cases)
    # The first 512 queries see 1 to 512 keys, all others 513.
    pairs = 512 * 513 // 2 + (4096 - 512) * 513
    assert cases["window 512, d 128, 4 x 4,096"].work.forward == 2 * 2 * 16 * 4 * pairs * 128
