"""Tests of the results of the GPU benchmark's steps at tiny sizes, and of the work from which rates are computed."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from processes import python

from fastformer.benchmarking.calls import Call
from fastformer.benchmarking.gpu.rates import BACKWARD, BOTH, ERROR, FORWARD, NO_TIME, PEAK_MEMORY, Case, rates
from fastformer.benchmarking.gpu.step import Record, Setting
from fastformer.benchmarking.gpu.steps import attention, decode, feed_forward, rows
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
        "nan": Peer(lambda: doubled(lambda x: x * 2 + (x - x).sqrt())),  # nan only in the gradient, the second result
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
    assert found["nan", FORWARD].value is not None
    assert found["nan", BACKWARD].missing == "wrong, nan from exact"
    assert "shape '[3]' is invalid" in str(found["fails", FORWARD].missing)
    assert found["absent", FORWARD].missing == "no_such_package is not installed"


def test_what_has_no_exact_result_is_not_taken_for_wrong(tmp_path: Path) -> None:
    def fails() -> list[torch.Tensor]:
        raise RuntimeError("out of memory")

    ours = {OURS: DOUBLE.peers[OURS]}
    records: list[Record] = []
    with pytest.raises(
        RuntimeError, match="1 figures of Fastformer are missing, the first: double, error: no exact result"
    ):
        records.extend(rates([replace(DOUBLE, peers=ours, exact=fails)], setting(tmp_path)))
    found = by_place(records)
    assert found[OURS, FORWARD].value is not None
    assert found[OURS, ERROR].missing == "no exact result: RuntimeError: out of memory"
    random = by_place(list(rates([replace(DOUBLE, peers=ours, exact=None)], setting(tmp_path))))
    assert set(random) == {(OURS, FORWARD), (OURS, BACKWARD)}


def test_a_refusal_says_why(tmp_path: Path) -> None:
    def refuse(x: torch.Tensor) -> torch.Tensor:
        for line in ("Flash attention kernel not used because:", "Flash attention has been runtime disabled.", "Why."):
            warnings.warn(f"{line} (Triggered internally at a.cpp:1.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    case = replace(DOUBLE, peers={"refuses": Peer(lambda: doubled(refuse))})
    found = by_place(list(rates([case], setting(tmp_path))))
    assert found["refuses", FORWARD].missing == "RuntimeError: No available kernel. Aborting execution. Why."


def test_a_fault_of_the_device_is_recorded_and_ends_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access, everything that waits for the device fails, for every peer."""
    broken: list[bool] = []

    def wait(device: torch.device) -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def break_it(x: torch.Tensor) -> torch.Tensor:
        broken.append(True)
        return x

    monkeypatch.setattr("fastformer.benchmarking.gpu.rates.wait", wait)
    breaks = replace(DOUBLE, name="breaks", peers={OURS: Peer(lambda: doubled(break_it))})
    found = []
    with pytest.raises(RuntimeError, match="illegal memory access"):
        for record in rates([DOUBLE, breaks, DOUBLE], setting(tmp_path)):
            found.append(record)
    assert found[-1].case == "breaks" and "illegal memory access" in str(found[-1].missing)


def test_a_dry_run_fails_in_the_end_where_we_do(tmp_path: Path) -> None:
    fails = replace(DOUBLE, name="triple", peers={OURS: DOUBLE.peers["fails"]})
    found = []
    with pytest.raises(
        RuntimeError, match="2 figures of Fastformer are missing, the first: triple, forward: RuntimeError: shape"
    ):
        for record in rates([fails, DOUBLE], setting(tmp_path)):
            found.append(record)
    assert {each.case for each in found} == {"triple", "double"}


def test_without_time_the_rest_is_missing(tmp_path: Path) -> None:
    found = list(rates([DOUBLE], replace(setting(tmp_path, seconds=0.0), dry=False)))
    assert {each.missing for each in found if each.peer != "absent"} == {NO_TIME}


def test_attention_everybody_computes_the_same(tmp_path: Path) -> None:
    """In each case of the step, every peer that runs on a CPU computes the same. A wrong peer would have no rate."""
    records = list(attention.STEP.run(setting(tmp_path)))
    assert not [each for each in records if each.missing and "wrong" in each.missing]
    ours = [each for each in records if each.peer == OURS]
    assert {each.metric for each in ours} == {FORWARD, BACKWARD, ERROR}
    assert all(each.value is not None for each in ours)
    assert {each.case for each in ours} - {each.case for each in ours if each.metric == ERROR} == {
        "dropout, causal, d 16, 2 x 32"  # every peer has its own pattern
    }
    for peer in ("SDPA flash", "torch.compile"):
        assert any(each.value is not None for each in records if each.peer == peer)


def test_attention_at_full_size_is_16k_tokens_2048_wide() -> None:
    cases = {case.name: case for case in attention.cases(torch.device("meta"), dry=False)}
    # Two products, a multiply and an add, 16 heads, 4 sequences of 4096 x 4096 pairs. Causal attention sees half of the
    # pairs.
    full = 2 * 2 * 16 * 4 * 4096**2 * 128
    assert cases["full, d 128, 4 x 4,096"].work == Work("FLOP", full, 2.5 * full)
    assert cases["causal, d 128, 4 x 4,096"].work == Work("FLOP", full / 2, 2.5 * full / 2)
    assert cases["full, d 64, 4 x 4,096"].work.forward == full
    assert cases["full, d 128, 1 x 16,384"].work.forward == 4 * full
    assert {"causal, d 64, 16 x 1,024", "causal, d 64, 8 x 2,048", "full, d 128, 2 x 8,192"} <= set(cases)
    # The first 512 queries see 1 to 512 keys, all other queries 513.
    pairs = 512 * 513 // 2 + (4096 - 512) * 513
    assert cases["window 512, d 128, 4 x 4,096"].work.forward == 2 * 2 * 16 * 4 * pairs * 128


@pytest.mark.parametrize("step", [decode, feed_forward, rows])
def test_everybody_computes_the_same(step: ModuleType, tmp_path: Path) -> None:
    """In each case of the step, every peer that runs on a CPU computes the same. A wrong peer would have no rate."""
    records = list(step.STEP.run(setting(tmp_path)))
    assert not [each for each in records if each.missing and "wrong" in each.missing]
    assert all(each.value is not None for each in records if each.peer == OURS)
    peers = {each.peer for each in records if each.value is not None}
    assert peers >= {decode: {OURS, "SDPA flash", "FlexAttention"}}.get(step, {OURS, "PyTorch eager", "torch.compile"})


def test_bytes_of_decoding_are_those_of_the_cache() -> None:
    cases = {case.name: case for case in decode.cases(torch.device("meta"), dry=False)}
    # Keys and values have 8 heads of 128 features, in two bytes each.
    assert cases["contiguous, batch 8, 4,096 keys"].work == Work("bytes", 8 * 4096 * 2 * 8 * 128 * 2)
    assert cases["pages of 16, batch 64, 32,768 keys"].work == Work("bytes", 64 * 32768 * 2 * 8 * 128 * 2)


def test_work_of_rows_and_products() -> None:
    meta = torch.device("meta")
    work = {case.name: case.work for case in (*rows.cases(meta, False), *feed_forward.blocks(meta, False))}
    work |= {case.name: case.work for case in feed_forward.losses(meta, False)}
    row = 16384 * 4096 * 2  # bytes of 16k tokens
    # Forward: input, output, weight and bias. Backward: the input again, two gradients of tokens and two of parameters.
    parameters = 2 * 4096 * 2
    assert work["layer_norm, 16,384 x 4,096"] == Work("bytes", 2 * row + parameters, 3 * row + 2 * parameters)
    assert work["layer_norm, residual, 16,384 x 4,096"] == Work("bytes", 4 * row, 4 * row)
    assert work["rms_norm, residual, 16,384 x 8,192"] == Work("bytes", 8 * row, 8 * row)
    assert work["rotary, query and key, 8 x 32 x 2,048 x 128"] == Work("bytes", 4 * row, 4 * row)
    scores = 8 * 4096 * 4096 * 2
    assert work["softmax, 32,768 x 4,096"] == Work("bytes", 2 * scores, 3 * scores)
    logits, targets, loss = 16384 * 32000 * 2, 16384 * 8, 2
    assert work["cross_entropy, 16,384 x 32,000"] == Work("bytes", logits + targets + loss, 2 * logits + targets + loss)
    words = 30522 * 4096 * 2
    assert work["transformer_embedding, 16,384 x 4,096, 30,522 words"] == Work("bytes", 2 * row, 2 * row + words)
    product = 2 * 16384 * 4096 * 11008  # a multiply and an add
    assert work["feed_forward, gelu, 16,384 x 4,096 to 11,008"] == Work("FLOP", 2 * product, 4 * product)
    assert work["feed_forward, gated silu, 16,384 x 4,096 to 11,008"] == Work("FLOP", 3 * product, 6 * product)
    head = 2 * 8192 * 128256 * 4096
    assert work["linear_cross_entropy, 8,192 x 128,256, 4,096 features"] == Work("FLOP", head, 2 * head)


# Run the calls on meta tensors, up to the place where a kernel would be compiled.
LAUNCHES = """
import importlib, json
import torch, triton
from fastformer.kernel_reports.meta_operators import kernels_of_meta_operators
from fastformer.kernel_reports.stand_in import stand_in
from fastformer.ops import linear_cross_entropy

def names_of(calls):
    names = []
    triton.knobs.runtime.jit_cache_hook = lambda *, fn, **_: names.append(fn.name) or True
    with stand_in("sm_90"), kernels_of_meta_operators():
        for call in calls:
            call()
    return names

def head():  # 80 MB of logits: one chunk of a GPU, two of a CPU
    make = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
    linear_cross_entropy(make(1024, 64), make(40000, 64), make(1024, dtype=torch.int64))

found = {"head": names_of([head])}
for name in ("attention", "decode", "rows", "feed_forward"):
    step = importlib.import_module(f"fastformer.benchmarking.gpu.steps.{name}").STEP
    found[name] = [sorted(set(names_of([call]))) for call in step.launches()]
print(json.dumps(found))
"""


def test_launches_are_those_of_all_cases() -> None:
    done = python("-c", LAUNCHES)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    meta = torch.device("meta")
    assert len(found["attention"]) == len(attention.cases(meta, False))
    assert all("_attention_forward_kernel" in call and len(call) >= 2 for call in found["attention"])
    # The largest batch fills a GPU without sharing a sequence's keys among programs.
    merged = [case.name.split(",")[1] != " batch 64" for case in decode.cases(meta, False)]
    assert found["decode"] == [["_decode_kernel", "_merge_kernel"] if each else ["_decode_kernel"] for each in merged]
    assert len(found["rows"]) == len(rows.cases(meta, False)) and all(found["rows"])
    blocks = len(feed_forward.blocks(meta, False))
    assert len(found["feed_forward"]) == 3 * blocks + len(feed_forward.losses(meta, False))
    assert all("_hidden_forward_kernel" in call for call in found["feed_forward"][:blocks])
    assert all("_hidden_forward_kernel" not in call for call in found["feed_forward"][blocks : 2 * blocks])
    assert found["head"] == ["_cross_entropy_kernel"]
