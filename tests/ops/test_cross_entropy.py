"""Cross-entropy of logits: both backends are compared with float64, over shapes, strides, dtypes and options."""

from __future__ import annotations

import importlib
from typing import Any

import hypothesis.strategies as st
import pytest
import reference
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from hypothesis import given, settings

from fastformer.backends import backend as use_backend
from fastformer.ops.cross_entropy import cross_entropy

operator = importlib.import_module("fastformer.ops.cross_entropy")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]


def layouts(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Return random logits (N, classes, ...) with any layout in memory."""
    if layout == "classes_last":
        return torch.randn(shape[0], *shape[2:], shape[1]).to(dtype).movedim(-1, 1)
    if layout == "expanded":
        return torch.randn(1, *shape[1:]).to(dtype).expand(shape)
    if layout == "every_other":
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    return torch.randn(shape).to(dtype)


def check(logits: torch.Tensor, target: torch.Tensor, options: dict[str, Any], inplace: bool) -> None:
    torch.manual_seed(1)
    reduction = options["reduction"]
    grad = torch.randn(target.shape if reduction == "none" else ())

    def run(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaf = logits.detach().to(dtype).requires_grad_()
        loss = function(leaf)
        return [loss.detach(), *torch.autograd.grad(loss, leaf, grad.to(loss.dtype))]

    def naive(leaf: torch.Tensor) -> torch.Tensor:
        rows = leaf.movedim(1, -1).reshape(-1, leaf.shape[1])
        weight = {"class_weight" if name == "weight" else name: value for name, value in options.items()}
        loss = reference.cross_entropy(rows, target.reshape(-1), **weight)
        return loss.view(target.shape) if reduction == "none" else loss

    def ours(leaf: torch.Tensor) -> torch.Tensor:
        # The gradient may only overwrite logits that an operation computed, not a leaf.
        return cross_entropy(leaf.mul(1) if inplace else leaf, target, **options, inplace=inplace)

    exact, pytorch = run(naive, torch.float64), run(naive, logits.dtype)
    # The tanh of a softcap is off by a few float32 roundings of values up to the cap; sums have one rounding per term.
    units = 1.0
    if logits.dtype == torch.float32:
        units = (target.numel() * logits.shape[1]) ** 0.5 + 4.0 * (options.get("softcap") or 0.0)
    for name, actual, p, e in zip(("loss", "gradient"), run(ours, logits.dtype), pytorch, exact, strict=True):
        if e.isnan().any():
            assert torch.equal(actual.isnan(), e.isnan()), name
        else:
            assert_as_accurate(name, actual, p, e, scale=units * max(1.0, e.abs().max().item()))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.2},
    {"z_loss": 0.1},
    {"softcap": 1.5},
    {"weight": True},
    {"weight": True, "label_smoothing": 0.3, "z_loss": 0.05, "softcap": 2.0, "ignore_index": 2},
]


@pytest.mark.quick
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(backend: str, dtype: torch.dtype, reduction: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(6, 11).to(dtype), torch.randint(0, 11, (6,))
    target[1] = options.get("ignore_index", -100)
    if "weight" in options:
        options = {**options, "weight": torch.rand(11)}
    check(logits, target, {**options, "reduction": reduction}, inplace=False)


@pytest.mark.parametrize("options", [{}, {"weight": torch.rand(11)}], ids=["plain", "weight"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_many_logits(reduction: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many logits are right too; a CPU gives few logits to PyTorch's own operator."""
    monkeypatch.setattr(operator, "_FEW_ELEMENTS", 0)
    torch.manual_seed(0)
    logits, target = torch.randn(6, 11), torch.tensor([3, -100, 0, 10, 7, 1])
    check(logits, target, {**options, "reduction": reduction}, inplace=False)
    with pytest.raises(IndexError, match="target must be a class from 0 to 10 or -100; got 11"):
        cross_entropy(logits, target.where(target != 10, 11), reduction=reduction, **options)


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 150), st.integers(1, 3), st.integers(1, 3)),
    dims=st.integers(2, 4),
    layout=st.sampled_from(["contiguous", "classes_last", "expanded", "every_other"]),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(REDUCTIONS),
    options=st.sampled_from(OPTIONS),
    inplace=st.booleans(),
)
def test_any_shape_and_strides(
    shape: tuple[int, ...],
    dims: int,
    layout: str,
    dtype: torch.dtype,
    reduction: str,
    options: dict[str, Any],
    inplace: bool,
) -> None:
    torch.manual_seed(0)
    logits = layouts(shape[:dims], dtype, layout)
    target = torch.randint(0, shape[1], logits.movedim(1, -1).shape[:-1])
    target[torch.rand(target.shape) < 0.2] = options.get("ignore_index", -100)
    if "weight" in options:
        options = {**options, "weight": torch.rand(shape[1]) + 0.1}
    for name in ("triton", "torch"):
        with use_backend(name):
            check(logits, target, {**options, "reduction": reduction}, inplace)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_large_logits_keep_the_probabilities_accurate(backend: str, label_smoothing: float) -> None:
    """Probabilities stay accurate: from a float32 log-sum-exp of 1,000 they would be off by 1,000 units."""
    torch.manual_seed(0)
    logits, target = torch.randn(8, 100) + 1000, torch.arange(8)

    def run(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaf = logits.to(dtype).requires_grad_()
        losses = function(leaf, target, reduction="none", label_smoothing=label_smoothing)
        return [losses.detach(), *torch.autograd.grad(losses.sum(), leaf)]

    exact, pytorch = run(F.cross_entropy, torch.float64), run(F.cross_entropy, torch.float32)
    for name, a, p, e in zip(("loss", "gradient"), run(cross_entropy, torch.float32), pytorch, exact, strict=True):
        assert_as_accurate(name, a, p, e)


def test_rows_longer_than_a_tile(backend: str) -> None:
    torch.manual_seed(0)
    check(torch.randn(2, 9001), torch.tensor([9000, 17]), {"label_smoothing": 0.1, "reduction": "mean"}, False)


@pytest.mark.parametrize("options", [OPTIONS[0], {"weight": torch.rand(1031), "label_smoothing": 0.1, "softcap": 9.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inplace", [False, True])
def test_rows_that_begin_anywhere(backend: str, dtype: torch.dtype, options: dict[str, Any], inplace: bool) -> None:
    """Rows begin at every remainder of a wide access, and targets are in the first and last elements, outside tiles."""
    torch.manual_seed(0)
    memory = torch.randn(9 * 1041 + 1).to(dtype)
    dense, spaced = memory[: 9 * 1031].view(9, 1031), memory[1:].view(9, 1041)
    for logits in (dense, spaced[:, :1031], spaced[:, 3:1034]):
        target = torch.tensor([0, 1030, 6, 1024, 7, 1029, -100, 500, 1])
        check(logits, target, {**options, "reduction": "none"}, inplace)
        check(logits[:1], target[:1], {**options, "reduction": "sum"}, inplace)


def test_nothing_is_written_around_rows_that_begin_anywhere() -> None:
    kernels = pytest.importorskip("fastformer_kernels.cross_entropy")
    torch.manual_seed(0)
    memory = torch.full((5, 1041), 7.0, dtype=torch.bfloat16)
    rows = memory[1:4, 3:1034]
    rows.copy_(torch.randn(3, 1031))
    target = torch.tensor([0, 1030, 5])
    kernels.cross_entropy_in_place(rows, target, None, torch.ones(3), kernels.CrossEntropyOptions())
    rows.fill_(7.0)
    assert (memory == 7.0).all()


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 5, 4), (0, 5)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_pytorch(backend: str, shape: tuple[int, ...], reduction: str, weighted: bool) -> None:
    torch.manual_seed(0)
    logits = torch.randn(shape, requires_grad=True)
    target = torch.randint(0, 5, shape[:1] + shape[2:] if len(shape) > 1 else ())
    weight = torch.rand(5) if weighted else None
    results = []
    for function in (cross_entropy, F.cross_entropy):
        loss = function(logits, target, weight, None, 1, None, reduction, 0.1)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        results.append((loss, gradient))
    torch.testing.assert_close(results[0], results[1], equal_nan=True)


def test_deprecated_reductions() -> None:
    logits, target = torch.randn(3, 5), torch.tensor([0, 4, 2])
    with pytest.warns(UserWarning, match="deprecated"):
        rows = cross_entropy(logits, target, reduce=False)
    assert torch.equal(rows, cross_entropy(logits, target, reduction="none"))


def test_class_probabilities_are_pytorchs() -> None:
    logits, target = torch.randn(3, 5), torch.rand(3, 5)
    options = {"weight": torch.rand(5), "reduction": "sum", "label_smoothing": 0.1}
    assert torch.equal(cross_entropy(logits, target, **options), F.cross_entropy(logits, target, **options))


def test_gradient_takes_the_logits_place(backend: str) -> None:
    leaf = torch.randn(4, 6, requires_grad=True)
    target = torch.tensor([0, 5, 2, -100])
    (expected,) = torch.autograd.grad(cross_entropy(leaf, target), leaf)
    logits, places = leaf * 1, []
    logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
    cross_entropy(logits, target, inplace=True).backward()
    assert places == [logits.data_ptr()]
    torch.testing.assert_close(leaf.grad, expected)
    with pytest.raises(ValueError, match="inplace=True would overwrite input, a leaf"):
        cross_entropy(leaf, target, inplace=True)
    before = leaf.detach().clone()
    cross_entropy(before, target, inplace=True)
    assert torch.equal(before, leaf)


def test_a_second_backward_over_overwritten_logits_is_refused() -> None:
    logits = torch.randn(4, 6, requires_grad=True) * 1
    loss = cross_entropy(logits, torch.tensor([0, 5, 2, 1]), inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_infinities_and_nans(backend: str) -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[0.0, -inf, 1.0], [nan, 0.0, 0.0], [-inf, -inf, -inf], [nan, inf, 0.0]], requires_grad=True)
    target = torch.tensor([0, 1, 2, -100])
    results = []
    for function in (cross_entropy, F.cross_entropy):
        losses = function(logits, target, reduction="none")
        results.append((losses, *torch.autograd.grad(losses.sum(), logits)))
    torch.testing.assert_close(results[0][0], results[1][0], equal_nan=True)
    torch.testing.assert_close(results[0][1][:3], results[1][1][:3], equal_nan=True)
    # An ignored row has a zero gradient even if it is NaN.
    assert torch.equal(results[0][1][3], torch.zeros(3))


def test_a_target_that_is_no_class_gives_nan_in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target outside the classes gives NaN where no check comes first, as on a GPU."""
    monkeypatch.setattr(operator, "check_classes", lambda *_: None)
    logits = torch.randn(3, 5, requires_grad=True)
    for name in ("triton", "torch"):
        with use_backend(name):
            # An option is set, because without one PyTorch's own loss runs, which checks the targets itself.
            losses = cross_entropy(logits, torch.tensor([1, 5, -1]), reduction="none", z_loss=0.1)
            (gradient,) = torch.autograd.grad(losses.sum(), logits)
        assert losses.isnan().tolist() == [False, True, True]
        assert gradient.isnan().all(1).tolist() == [False, True, True]


def test_registration(backend: str) -> None:
    logits, target = torch.randn(4, 5), torch.tensor([0, 4, -100, 2])
    weight, rows = torch.rand(5), torch.rand(4)
    ops = torch.ops.fastformer
    for reduction in REDUCTIONS:
        options = (-100, 0.1, 0.1, 2.0, reduction, False, torch.float32)
        torch.library.opcheck(ops.cross_entropy.default, (logits, target, weight, *options))
    arguments = (target, weight, rows, torch.rand(2, 4), -100, 0.1, 0.1, 2.0)
    torch.library.opcheck(ops.cross_entropy_backward.default, (logits, *arguments))
    torch.library.opcheck(ops.cross_entropy_backward_.default, (logits.clone(), None, *arguments))


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_graph_break(inplace: bool) -> None:
    def loss(leaf: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(leaf * 2, target, label_smoothing=0.1, inplace=inplace)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows in (3, 8):
        leaf, target = torch.randn(rows, 7, requires_grad=True), torch.randint(0, 7, (rows,))
        torch.testing.assert_close(compiled(leaf, target), loss(leaf, target))
        gradients = [torch.autograd.grad(function(leaf, target), leaf) for function in (compiled, loss)]
        torch.testing.assert_close(*gradients)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(3, 5).long()}, TypeError, "input must be float32, float16 or bfloat16"),
        ({"input": torch.tensor(0.0)}, ValueError, "got a scalar"),
        ({"target": torch.rand(3, 5), "softcap": 2.0}, TypeError, "softcap and inplace need a target of int64 classes"),
        ({"target": torch.zeros(3, dtype=torch.int32)}, TypeError, "target must be int64; got torch.int32"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, r"target must have shape \(3,\); got \(4,\)"),
        ({"target": torch.full((3,), 5)}, IndexError, "target must be a class from 0 to 4 or -100; got 5"),
        ({"input": torch.zeros(5), "target": torch.tensor(-1)}, IndexError, "target must be a class from 0 to 4"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must have shape \(5,\); got \(4,\)"),
        ({"weight": torch.zeros(5).long()}, TypeError, "weight must be float32"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none; got 'max'"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]; got 1.5"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be at least 0; got -1.0"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, or None for none; got 0.0"),
    ],
)
def test_refuses_what_it_cannot_do(change: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        cross_entropy(**{"input": torch.zeros(3, 5), "target": torch.zeros(3, dtype=torch.int64), **change})


def test_a_class_weight_is_a_constant(backend: str) -> None:
    logits, target, weight = torch.randn(6, 7, requires_grad=True), torch.arange(6), torch.rand(7)
    expected = cross_entropy(logits, target, weight)
    loss = cross_entropy(logits, target, weight.requires_grad_())
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    loss.backward()
    assert weight.grad is None and logits.grad is not None
