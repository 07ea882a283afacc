"""The host's time of a call contains only the call; for a model it contains only the operators' part."""

from __future__ import annotations

import time

import pytest
import torch

import fastformer.nn.normalization
from fastformer.benchmarking.host_time import HostCall, best_microseconds
from fastformer.benchmarking.operator_time import OperatorTime
from fastformer.benchmarking.studies.launch import ABOVE, BARE, LAUNCHES, TO_THE_LAUNCHES, to_the_launches

CPU = torch.device("cpu")


def busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_best_of_turns_is_the_calls_own_time() -> None:
    found = best_microseconds({"long": HostCall(busy, (2e-3,)), "short": HostCall(busy, (5e-4,))}, 3, CPU)
    assert found["long"] == pytest.approx(2000, rel=0.25)
    assert found["short"] == pytest.approx(500, rel=0.25)


def test_gradients_of_arguments_in_a_dict_are_computed_and_not_accumulated() -> None:
    log = []
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda gradient: log.append("backward"))
    HostCall(lambda given: given["x"] * 2.0, ({"x": x},), (torch.ones(3),)).timer().timeit(2)
    assert log == ["backward"] * 2 and x.grad is None


@pytest.mark.parametrize("backward", [False, True])
def test_backward_is_part_of_the_call_where_there_are_gradients(backward: bool) -> None:
    log = []

    def function(x: torch.Tensor, factor: float) -> torch.Tensor:
        log.append("forward")
        assert torch.is_grad_enabled() is backward
        output = x * factor
        if backward:
            output.register_hook(lambda gradient: log.append("backward"))
        return output

    inputs = (torch.ones(3, requires_grad=True), 2.0)
    best_microseconds({"": HostCall(function, inputs, [torch.ones(3)] if backward else None)}, 1, CPU)
    assert log == (["forward", "backward"] if backward else ["forward"]) * (len(log) // (1 + backward))
    assert inputs[0].grad is None


def test_what_a_call_keeps_is_emptied_before_each_turn() -> None:
    kept: list[int] = []
    calls = {"": HostCall(lambda: kept.append(len(kept)) or busy(1e-3), (), kept=kept)}
    best_microseconds(calls, 5, CPU)
    assert len(kept) < 20


def test_operator_time_is_of_operators_and_their_backward() -> None:
    norm, linear = fastformer.nn.LayerNorm(16), torch.nn.Linear(16, 16)
    used = fastformer.nn.normalization.layer_norm
    x = torch.randn(4, 16)
    with OperatorTime() as ours:
        hidden = linear(x)
        assert ours.microseconds == 0
        output = norm(hidden)
        forward = ours.microseconds
        assert forward > 0
        output.sum().backward()
        assert ours.microseconds > forward
        ours.clear()
        linear(x).sum().backward()
        assert ours.microseconds == 0
    assert fastformer.nn.normalization.layer_norm is used
    assert norm.weight.grad is not None
    assert linear.weight.grad is not None


def test_operator_time_is_not_more_than_all_of_it() -> None:
    layer = fastformer.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    x = torch.randn(2, 8, 32)
    layer(x).sum().backward()
    with OperatorTime() as ours:
        begin = time.process_time()
        layer(x).sum().backward()
        taken = (time.process_time() - begin) * 1e6
    assert 0 < ours.microseconds < taken


def test_stand_in_launches_what_a_gpu_would() -> None:
    measured = list(to_the_launches(rounds=1, quick=True, only="softmax: "))
    found = {(each.case, each.metric): each.median for each in measured}
    forward, both = "softmax: forward, sm_90", "softmax: with backward, sm_90"
    assert found[forward, LAUNCHES] == 1
    assert found[both, LAUNCHES] == 2
    for case in (forward, both):
        assert found[case, ABOVE] == pytest.approx(found[case, TO_THE_LAUNCHES] - found[case, BARE])
        assert found[case, ABOVE] > 0
