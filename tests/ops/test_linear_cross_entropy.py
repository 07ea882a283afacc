"""Linear cross-entropy: both backends agree with float64 over options, shapes and dtypes, and keep to their memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import reference
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from hypothesis import given, settings
from torch.utils.checkpoint import checkpoint

from fastformer.backends import backend as use_backend
from fastformer.ops.linear_cross_entropy import (
    _adds_in_float32,
    _budget_of_gpu,
    _last_budgets,
    linear_cross_entropy,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
REDUCTIONS = ["mean", "sum", "none"]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.2},
    {"z_loss": 0.1},
    {"softcap": 1.5},
    {"class_weight": True},
    {"class_weight": True, "label_smoothing": 0.3, "z_loss": 0.05, "softcap": 2.0, "ignore_index": 2},
]


def problem(dtype: torch.dtype = torch.float32, rows: int = 13, classes: int = 301) -> list[torch.Tensor]:
    torch.manual_seed(0)
    target = torch.randint(0, classes, (rows,))
    target[rows // 4] = -100
    return [torch.randn(rows, 16).to(dtype), torch.randn(classes, 16).to(dtype), target, torch.randn(classes).to(dtype)]


def bytes_of_rows(rows: int, classes: int, dtype: torch.dtype) -> int:
    """Return the memory budget for this number of rows, each of which starts at a multiple of 128 bytes."""
    return rows * -(-classes * dtype.itemsize // 128) * 128


def check(tensors: list[Any], options: dict[str, Any], memory_budget: int | None) -> None:
    input, weight, target, bias = tensors
    reduction, dtype = options["reduction"], input.dtype
    grad = torch.rand(target.shape) if reduction == "none" else torch.tensor(0.7)

    def run(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (input, weight, bias)]
        loss = function(*leaves)
        gradients = torch.autograd.grad(loss, [t for t in leaves if t is not None], grad.to(loss.dtype))
        return [loss.detach(), *gradients]

    def naive(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return reference.cross_entropy(F.linear(input, weight, bias), target, **options)

    def ours(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return linear_cross_entropy(input, weight, target, bias, **options, memory_budget=memory_budget)

    actual = run(ours, dtype)
    assert actual[0].dtype == torch.float32
    # The tanh of a softcap is off by a few float32 roundings of values up to the cap. In 16 bits that is negligible.
    units = 1.0
    if dtype == torch.float32:
        units += 4.0 * (options.get("softcap") or 0.0)
    for index, (a, p, e) in enumerate(zip(actual, run(naive, dtype), run(naive, torch.float64), strict=True)):
        assert_as_accurate(f"result {index}", a, p.to(a.dtype), e, scale=units * max(1.0, e.abs().max().item()))


@pytest.mark.quick
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(backend: str, dtype: torch.dtype, reduction: str, options: dict[str, Any]) -> None:
    tensors = problem(dtype, classes=201)
    tensors[2][5] = options.get("ignore_index", -100)
    if "ignore_index" in options:
        tensors[2][3] = 7
    if "class_weight" in options:
        options = {**options, "class_weight": torch.rand(201)}
    check(tensors, {**options, "reduction": reduction}, bytes_of_rows(4, 201, dtype))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_few_and_many_logits(backend: str, reduction: str) -> None:
    """Few and many logits give the right loss; without a budget, a CPU holds only few of them all at once."""
    check(problem(), {"reduction": reduction, "label_smoothing": 0.1}, memory_budget=None)
    check(problem(rows=90, classes=3000), {"reduction": reduction}, memory_budget=None)


def test_large_logits_keep_the_probabilities_accurate(backend: str) -> None:
    """Probabilities stay accurate: from a float32 log-sum-exp above 100 they would be off by over 100 units."""
    torch.manual_seed(3)
    leaves = [torch.randn(32, 48, dtype=torch.float64) * 30, torch.randn(500, 48, dtype=torch.float64) / 48**0.5]
    target = torch.arange(32) * 7 % 500

    def run(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        input, weight = (leaf.float().to(dtype).requires_grad_() for leaf in leaves)
        loss = function(input, weight)
        return [loss.detach(), *torch.autograd.grad(loss, (input, weight))]

    def plain(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(input @ weight.T, target)

    actual = run(lambda input, weight: linear_cross_entropy(input, weight, target), torch.float32)
    pytorch, exact = run(plain, torch.float32), run(plain, torch.float64)
    for name, a, p, e in zip(("loss", "input", "weight"), actual, pytorch, exact, strict=True):
        assert_as_accurate(name, a, p, e)


@settings(max_examples=20)
@given(
    rows=st.integers(1, 20),
    features=st.integers(1, 40),
    classes=st.integers(1, 150),
    rows_at_once=st.integers(1, 25),
    biased=st.booleans(),
    transposed=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(REDUCTIONS),
    options=st.sampled_from(OPTIONS[:5]),
)
def test_any_shape_and_strides(
    rows: int,
    features: int,
    classes: int,
    rows_at_once: int,
    biased: bool,
    transposed: bool,
    dtype: torch.dtype,
    reduction: str,
    options: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    input, weight = torch.randn(rows, features), torch.randn(classes, features) / features**0.5
    if transposed:
        input, weight = torch.randn(features, rows).T, torch.randn(features, classes).T / features**0.5
    bias = torch.randn(classes).to(dtype) if biased else None
    if "class_weight" in options:
        options = {**options, "class_weight": torch.rand(classes) + 0.1}
    tensors = [input.to(dtype), weight.to(dtype), torch.randint(0, classes, (rows,)), bias]
    for name in ("triton", "torch"):
        with use_backend(name):
            check(tensors, {**options, "reduction": reduction}, bytes_of_rows(rows_at_once, classes, dtype))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_returns_the_z_loss_that_the_loss_includes(backend: str, reduction: str) -> None:
    input, weight, target, bias = problem()
    class_weight = torch.rand(301)
    loss, z_loss = linear_cross_entropy(
        input, weight.requires_grad_(), target, bias, reduction=reduction, class_weight=class_weight, z_loss=0.2,
        return_z_loss=True,
    )  # fmt: skip
    without = linear_cross_entropy(input, weight, target, bias, reduction=reduction, class_weight=class_weight)
    torch.testing.assert_close(loss, without + z_loss)
    assert loss.requires_grad and not z_loss.requires_grad and z_loss.sum() > 0


def test_leading_dimensions(backend: str) -> None:
    input, weight, target, bias = problem(rows=12)
    losses = linear_cross_entropy(input.view(3, 4, 16), weight, target.view(3, 4), bias, reduction="none")
    assert torch.equal(losses.flatten(), linear_cross_entropy(input, weight, target, bias, reduction="none"))


def test_nothing_to_learn_from(backend: str) -> None:
    input, weight, target, bias = problem()
    target.fill_(-100)
    assert linear_cross_entropy(input, weight, target, bias).isnan()
    assert linear_cross_entropy(input, weight, target, bias, reduction="sum").item() == 0.0


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_rows(backend: str, reduction: str) -> None:
    weight = torch.randn(5, 4, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64)
    linear_cross_entropy(torch.empty(0, 4), weight, target, reduction=reduction).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(5, 4))


@pytest.mark.parametrize(("budget", "most_rows"), [(4 * 1280 - 1, 3), (1, 1), (1 << 20, 13)])
def test_holds_no_more_logits_than_its_budget(
    backend: str, budget: int, most_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk has only the rows that fit, here of 1,280 bytes for 301 float32 logits; chunks share their memory."""
    held: list[tuple[int, int]] = []
    project = torch.addmm

    def watch(*tensors: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        held.append((out.shape[0], out.data_ptr()))
        return project(*tensors, out=out)

    monkeypatch.setattr(torch, "addmm", watch)
    linear_cross_entropy(*problem(), memory_budget=budget)
    rows, places = zip(*held, strict=True)
    assert max(rows) == most_rows and sum(rows) == 13 and len(set(places)) == 1


@pytest.mark.parametrize("learned", ["input", "weight", "bias", "input bias"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_computes_no_gradient_that_nobody_needs(
    backend: str, reduction: str, learned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gradient is the same as among all, twice differentiable, and costs its own product of each chunk alone."""
    names, tensors = ("input", "weight", "bias"), problem()
    budget, chunks = bytes_of_rows(4, 301, torch.float32), 4

    def call(needed: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
        input, weight, target, bias = (tensor.clone() for tensor in tensors)
        leaves = dict(zip(names, (input, weight, bias), strict=True))
        found = [leaves[name].requires_grad_() for name in needed.split()]
        loss = linear_cross_entropy(input, weight, target, bias, reduction=reduction, memory_budget=budget)
        return loss.sum(), found

    loss, leaves = call("input weight bias")
    every = dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))
    products: list[Any] = []

    def counting(product: Any) -> Any:
        return lambda *tensors, **options: products.append(product) or product(*tensors, **options)

    monkeypatch.setattr(torch, "mm", counting(torch.mm))
    monkeypatch.setattr(torch, "addmm", counting(torch.addmm))
    loss, leaves = call(learned)
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
    forward = chunks * (2 if reduction == "none" else 1)
    # The second and later chunks of the weight's gradient are added in place.
    expected = {"input": forward + chunks, "weight": forward + 1, "bias": forward, "input bias": forward + chunks}
    assert len(products) == expected[learned]
    for name, gradient in zip(learned.split(), gradients, strict=True):
        assert torch.equal(gradient, every[name])
    assert all(map(torch.equal, torch.autograd.grad(loss, leaves, retain_graph=True), gradients))

    def second(loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    def plain(dtype: torch.dtype) -> torch.Tensor:
        input, weight, target, bias = (t.clone() if t.dtype == torch.int64 else t.to(dtype, copy=True) for t in tensors)
        leaf = {"input": input, "weight": weight, "bias": bias}[learned.split()[0]].requires_grad_()
        return second(F.cross_entropy(F.linear(input, weight, bias), target, reduction=reduction).sum(), leaf)

    exact = plain(torch.float64)
    scale = max(1.0, exact.abs().max().item())
    assert_as_accurate("second", second(loss, leaves[0]), plain(torch.float32), exact, scale=scale)


def test_gradients_under_a_checkpoint(backend: str) -> None:
    input, weight, target, bias = problem()
    weight.requires_grad_()
    options = {"memory_budget": bytes_of_rows(4, 301, torch.float32)}
    wanted = torch.autograd.grad(linear_cross_entropy(input, weight, target, bias, **options) * 3, weight)
    loss = checkpoint(linear_cross_entropy, input, weight, target, bias, use_reentrant=False, **options)
    assert torch.equal(torch.autograd.grad(loss * 3, weight)[0], wanted[0])


@pytest.mark.cpu
def test_budget_of_a_gpu_follows_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free, capturing = [64 << 30], [False]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[0], 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: 2 << 30)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.delitem(_last_budgets, 0, raising=False)

    def budget(rows: int, row_bytes: int) -> int:
        return _budget_of_gpu(SimpleNamespace(shape=(rows, 4), get_device=lambda: 0), row_bytes)

    capturing[0] = True
    assert budget(4096, 256 << 10) == 256 << 20, "nothing is asked of a device while a graph is captured"
    capturing[0] = False
    assert budget(4096, 256 << 10) == 4096 * 256 << 10, "all rows"
    assert budget(1 << 20, 256 << 10) == 8192 * 256 << 10, "no more than 8,192 rows"
    free[0] = 7 << 30
    assert budget(1 << 20, 256 << 10) == 1 << 30, "an eighth of free and kept memory"
    free[0], capturing[0] = 64 << 30, True
    assert budget(1 << 20, 256 << 10) == 1 << 30, "in a graph as in the call before"
    free[0], capturing[0] = 0, False
    assert budget(1 << 20, 256 << 10) == 256 << 20, "no less than 256 MiB"
    assert budget(100, 1024) == 256 << 20
    free[0] = 64 << 30
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert budget(1 << 20, 256 << 10) == 256 << 20, "the same order of sums in each run"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_library_that_refuses_float32_sums_is_not_asked_again(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library of a GPU is asked once, and products are then rounded before they are added."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    asked = []

    def refuse(*matrices: torch.Tensor, **options: Any) -> torch.Tensor:
        asked.append(options)
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    ones, zeros = torch.ones, torch.zeros
    monkeypatch.setattr(torch, "ones", lambda *shape, device, **options: ones(*shape, **options))
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    monkeypatch.setattr(torch, "mm", refuse)
    _adds_in_float32.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"are rounded to torch\..*float.*NOT_SUPPORTED"):
            assert not _adds_in_float32(torch.device("cuda", 0), dtype)
        assert not _adds_in_float32(torch.device("cuda", 0), dtype)
    finally:
        _adds_in_float32.cache_clear()
    assert asked == [{"out_dtype": torch.float32}]


def test_registration(backend: str) -> None:
    input, weight, target, bias = problem(rows=5, classes=7)
    options, budget = (-100, 0.1, 0.1, 2.0), 1 << 20
    tensors = (input, weight, target, bias, torch.rand(7))
    ops, needs = torch.ops.fastformer, (True, True, True)
    for reduction in ("mean", "sum"):
        torch.library.opcheck(ops.linear_cross_entropy.default, (*tensors, *options, reduction, budget, *needs))
    torch.library.opcheck(ops.linear_cross_entropy_rows.default, (*tensors, *options, budget))
    torch.library.opcheck(
        ops.linear_cross_entropy_rows_backward.default, (*tensors, torch.rand(5), *options, budget, *needs)
    )


def test_compiles_without_graph_break() -> None:
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=True)
    for rows in (5, 12):
        input, weight, target, _ = problem(rows=rows)
        weight.requires_grad_()
        torch.testing.assert_close(compiled(input, weight, target), linear_cross_entropy(input, weight, target))
        compiled(input, weight, target).backward()


def test_autocast(device: torch.device) -> None:
    input, weight, target, bias = problem()
    with torch.autocast(device.type, torch.bfloat16):
        loss = linear_cross_entropy(input, weight, target, bias)
    sixteen = [t.bfloat16() for t in (input, weight, bias)]
    assert torch.equal(loss, linear_cross_entropy(sixteen[0], sixteen[1], target, sixteen[2]))


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": torch.full((13,), 301)}, IndexError, "from 0 to 300 or -100; got 301"),
        ({"target": torch.zeros(13)}, TypeError, "target must be int64"),
        ({"target": torch.zeros(12, dtype=torch.int64)}, ValueError, r"target must have shape \(13,\)"),
        ({"weight": torch.zeros(301, 15)}, ValueError, r"input and weight must be .* \(301, 15\)"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none; got 'max'"),
        ({"class_weight": torch.zeros(300)}, ValueError, r"class_weight must have shape \(301,\); got \(300,\)"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be at least 1 byte; got 0"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive and finite, or None for none; got -1.0"),
    ],
)
def test_refuses_what_it_cannot_do(change: dict[str, Any], error: type, message: str) -> None:
    input, weight, target, bias = problem()
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{"input": input, "weight": weight, "target": target, "bias": bias, **change})
