"""The doctor says what the machine has and why a backend is used, and its self-test can fail."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch

import fastformer
from fastformer import cli
from fastformer.diagnostics import doctor
from fastformer.registry import OPERATORS

pytestmark = pytest.mark.cpu


def test_it_reports_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert torch.__version__.startswith(report["machine"]["torch"])  # the report leaves out the build
    assert report["devices"][0]["name"] == "cpu"
    assert all(test["passed"] for test in report["tests"])
    tested = {(test["operator"], test["dtype"]) for test in report["tests"]}
    assert tested == set(product(OPERATORS, ("float32", "float16", "bfloat16")))


@pytest.mark.parametrize(
    ("backend", "reason"), [("auto", "kernels need a GPU"), ("torch", "backend 'torch' is selected")]
)
def test_it_says_why_a_backend_is_used(backend: str, reason: str) -> None:
    with fastformer.backend(backend):
        device = doctor.devices()[0]
    assert (device.backend, device.reason) == ("torch", reason)


@pytest.mark.quick
def test_a_wrong_operator_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fastformer, "softmax", lambda input: input.softmax(-1) * 1.01)
    with pytest.raises(SystemExit) as exit:
        cli.main(["doctor"])
    assert exit.value.code == 1
    assert "allowed" in capsys.readouterr().out


def test_an_operator_that_raises_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastformer, "softmax", lambda input: input.no_such_method())
    result = doctor.run_test("softmax", doctor.devices()[0], torch.float32)
    assert not result.passed and result.failure is not None and "no_such_method" in result.failure


def test_nan_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastformer, "softmax", lambda input: input * float("nan"))
    assert not doctor.run_test("softmax", doctor.devices()[0], torch.float32).passed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_operator_that_is_wrong_in_sixteen_bits_alone_fails(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(
        fastformer, "softmax", lambda input: input.softmax(-1) * (1.0 if input.dtype == torch.float32 else 1.1)
    )
    device = doctor.devices()[0]
    assert doctor.run_test("softmax", device, torch.float32).passed
    assert not doctor.run_test("softmax", device, dtype).passed
