"""Linear cross-entropy: both backends against float64, and its memory."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate

from fastformer.ops.linear_cross_entropy import linear_cross_entropy

# The package exports the function under its module's name.
operator = importlib.import_module("fastformer.ops.linear_cross_entropy")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def problem(dtype: torch.dtype = torch.float32, rows: int = 13, classes: int = 301) -> list[torch.Tensor]:
    torch.manual_seed(0)
    target = torch.randint(0, classes, (rows,))
    target[3] = -100
    return [torch.randn(rows, 16).to(dtype), torch.randn(classes, 16).to(dtype), target, torch.randn(classes).to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_matches_float64(backend: str, reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "LOGIT_ELEMENTS", 4 * 301)  # four rows at a time
    tensors = problem(dtype)
    row_grad = torch.rand(13)

    def run(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for t in tensors]
        loss = function(*leaves)
        grads = torch.autograd.grad((loss * row_grad.to(loss.dtype)).sum(), [leaves[0], leaves[1], leaves[3]])
        return [loss.detach(), *grads]

    def exact(input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        rows = reference.linear_cross_entropy(input, weight, target, bias, -100)
        return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / 12}[reduction]

    def pytorch(input: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(input, weight, bias), target, reduction=reduction)

    actual = run(lambda *t: linear_cross_entropy(*t, reduction=reduction), dtype)
    assert actual[0].dtype == torch.float32
    # Probabilities are exp(logit - lse) of float32 exponents rounded to a unit of their own magnitude, which is thus
    # their relative error. In 16 bits it is negligible.
    logits = tensors[0].double() @ tensors[1].double().T + tensors[3]
    exponent = 1.0 + logits.abs().max().item() if dtype == torch.float32 else 1.0
    for index, (a, p, e) in enumerate(zip(actual, run(pytorch, dtype), run(exact, torch.float64), strict=True)):
        assert_as_accurate(f"result {index}", a, p.to(a.dtype), e, scale=exponent * max(1.0, e.abs().max().item()))


def test_nothing_to_learn_from(backend: str) -> None:
    input, weight, target, bias = problem()
    target.fill_(-100)
    assert linear_cross_entropy(input, weight, target, bias).isnan()
    assert linear_cross_entropy(input, weight, target, bias, reduction="sum").item() == 0.0


def test_no_rows(backend: str) -> None:
    weight = torch.randn(5, 4, requires_grad=True)
    linear_cross_entropy(torch.empty(0, 4), weight, torch.empty(0, dtype=torch.int64), reduction="sum").backward()
    assert torch.equal(weight.grad, torch.zeros(5, 4))


def test_never_holds_all_logits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    linear = F.linear

    def watch(*tensors: Any) -> torch.Tensor:
        held.append(linear(*tensors).numel())
        return linear(*tensors)

    monkeypatch.setattr(F, "linear", watch)
    monkeypatch.setattr(operator, "LOGIT_ELEMENTS", 1000)
    linear_cross_entropy(*problem())
    assert len(held) == 5 and max(held) <= 1000


def test_registration(backend: str) -> None:
    input, weight, target, bias = problem(rows=5, classes=7)
    leaves = [t.requires_grad_() for t in (input, weight, bias)]
    ops = torch.ops.fastformer
    torch.library.opcheck(
        ops.linear_cross_entropy.default, (leaves[0], leaves[1], target, leaves[2], torch.ones(5), -100, True)
    )
    torch.library.opcheck(ops.linear_cross_entropy_rows.default, (leaves[0], leaves[1], target, leaves[2], -100))


def test_compiles_without_graph_break() -> None:
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True)
    for rows in (5, 12):
        input, weight, target, _ = problem(rows=rows)
        weight.requires_grad_()
        torch.testing.assert_close(compiled(input, weight, target), linear_cross_entropy(input, weight, target))
        compiled(input, weight, target).backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.full((13,), 301)}, IndexError, "from 0 to 300 or -100; got 301"),
        ({"target": torch.zeros(13)}, TypeError, "target must be int64"),
        ({"target": torch.zeros(12, dtype=torch.int64)}, ValueError, r"target must have shape \(13,\)"),
        ({"weight": torch.zeros(301, 15)}, ValueError, r"input and weight must be .* \(301, 15\)"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none; got 'max'"),
    ],
)
def test_refuses_what_it_cannot_do(change: dict[str, Any], error: type, message: str) -> None:
    input, weight, target, bias = problem()
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{"input": input, "weight": weight, "target": target, "bias": bias, **change})
