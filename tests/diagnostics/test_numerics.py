"""The rule of accuracy holds in every regime, on both backends, and the report can say that it is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pictures import saved_figures

import fastformer
from fastformer import cli
from fastformer.diagnostics import numerics


@pytest.mark.parametrize("dtype", list(numerics.DTYPES))
@pytest.mark.parametrize("problem", numerics.problems(), ids=lambda problem: f"{problem.operator}, {problem.regime}")
def test_the_rule_is_kept(problem: numerics.Problem, dtype: str, device: torch.device) -> None:
    errors = list(numerics.errors_of(problem, dtype, device.type, seed=0))
    assert {"triton", "torch", "pytorch"} <= {error.implementation for error in errors}
    assert not [error for error in errors if error.kept is False]


@pytest.mark.parametrize(
    ("operator", "gradients"),
    [
        ("decode_attention", 0),
        ("merge_attention", 2),
        ("rotary", 2),
        ("transformer_embedding", 5),
        ("cross_entropy", 1),
    ],
)
def test_the_output_and_every_gradient_are_measured(operator: str, gradients: int, device: torch.device) -> None:
    problem = next(problem for problem in numerics.problems() if problem.operator == operator)
    errors = [e for e in numerics.errors_of(problem, "bfloat16", device.type, seed=0) if e.implementation == "torch"]
    assert [error.result for error in errors] == ["output", *(f"gradient {number}" for number in range(gradients))]


def test_a_less_accurate_operator_breaks_it(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastformer, "softmax", lambda input: (input.bfloat16().softmax(-1)).to(input.dtype))
    problem = next(problem for problem in numerics.problems() if problem.operator == "softmax")
    errors = list(numerics.errors_of(problem, "float32", device.type, seed=0))
    assert {error.implementation for error in errors if error.kept is False} == {"triton", "torch"}
    table = numerics.as_table(errors)
    assert "broken: gradient 0, output" in table.rows[-1][-1]


def test_nan_breaks_it(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastformer, "softmax", lambda input: input * float("nan"))
    problem = next(problem for problem in numerics.problems() if problem.operator == "softmax")
    ours = [e for e in numerics.errors_of(problem, "float32", device.type, seed=0) if e.implementation == "torch"]
    assert ours and all(error.units is None and error.kept is False for error in ours)


def _key_of(error: dict) -> tuple[str, str, str, str]:
    return error["operator"], error["regime"], error["implementation"], error["dtype"]


@pytest.mark.cpu
def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    written, picture = tmp_path / "errors.json", tmp_path / "errors.png"
    saved = saved_figures(monkeypatch)
    options = ["--operators", "attention,rms_norm", "--dtypes", "float32,bfloat16", "--device", "cpu"]
    assert cli.main(["numerics", *options, "--json", str(written), "--picture", str(picture)]) == 0
    errors = json.loads(written.read_text())
    assert {error["operator"] for error in errors} == {"attention", "rms_norm"}
    assert {error["implementation"] for error in errors} == {"torch", "pytorch", "sdpa"}
    assert picture.exists()
    assert [axes.get_title() for axes in saved[0].axes] == ["float32", "bfloat16"]
    rows = list(dict.fromkeys((error["operator"], error["regime"]) for error in errors))
    for axes in saved[0].axes:
        drawn = {points.get_label(): points.get_offsets().tolist() for points in axes.collections}
        for name, points in drawn.items():
            for units, row in points:
                key = (*rows[round(row)], name, axes.get_title())
                assert units == max(e["units"] for e in errors if _key_of(e) == key and e["units"] is not None), key
        assert set(drawn) <= {"torch", "pytorch", "sdpa"} and "torch" in drawn
    assert "broken" not in capsys.readouterr().out


def test_an_unknown_operator_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["numerics", "--operators", "sofmax"]) == 2
    assert "--operators must be among attention" in capsys.readouterr().err


def test_units_of_rounding() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    actual = torch.tensor([1.0, 2.0 + 2**-6])
    assert numerics._units([actual.bfloat16()], [exact]) == [0.5 * 2**-6 / 2**-7]
