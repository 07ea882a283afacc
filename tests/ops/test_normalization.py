"""LayerNorm and RMSNorm: both backends against float64, over shapes, strides, dtypes and residuals."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import reference
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from hypothesis import given, settings

from fastformer.backends import backend as use_backend
from fastformer.ops.normalization import layer_norm, rms_norm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5


def gradients(output: torch.Tensor, leaves: list[torch.Tensor], grad_output: torch.Tensor) -> list[torch.Tensor]:
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(output.dtype))]


def check(x: torch.Tensor, centered: bool, affine: bool) -> None:
    columns = x.shape[-1]
    parameters = [torch.randn(columns) for _ in range(1 + centered)] if affine else []
    grad_output = torch.randn(x.shape)

    def run(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, *parameters)]
        padded = [*leaves[1:], *[None] * (1 + centered - len(parameters))]
        return gradients(function(leaves[0], *padded), leaves, grad_output)

    if centered:
        exact = run(lambda x, w, b: reference.layer_norm(x, w, b, EPS), torch.float64)
        pytorch = run(lambda x, w, b: F.layer_norm(x, (columns,), w, b, EPS), x.dtype)
        actual = run(lambda x, w, b: layer_norm(x, (columns,), w, b, EPS), x.dtype)
    else:
        exact = run(lambda x, w: reference.rms_norm(x, w, EPS), torch.float64)
        pytorch = run(lambda x, w: F.rms_norm(x, (columns,), w, EPS), x.dtype)
        actual = run(lambda x, w: rms_norm(x, (columns,), w, EPS), x.dtype)
    names = ["output", "grad_input", "grad_weight", "grad_bias"]
    # Six operations (mean, + eps, square root, reciprocal, two products) round in float32, by half a unit each.
    units = 3.0 if x.dtype == torch.float32 else 1.0
    for name, a, p, e in zip(names, actual, pytorch, exact, strict=False):
        assert_as_accurate(name, a, p, e, scale=units * max(1.0, e.abs().max().item()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (2, 3, 128), (300, 7), (2, 4097)])
def test_matches_float64(backend: str, shape: tuple[int, ...], centered: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check((torch.randn(shape) * 2 + 1).to(dtype), centered, affine=True)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_strides(data: st.DataObject) -> None:
    torch.manual_seed(0)
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 40))
    dtype, centered, affine = data.draw(st.tuples(st.sampled_from(DTYPES), st.booleans(), st.booleans()))
    x = torch.randn(columns * 2, rows, 2).to(dtype)[::2].permute(2, 1, 0)
    for name in ("triton", "torch"):
        with use_backend(name):
            check(x, centered, affine)


@pytest.mark.parametrize("centered", [True, False])
def test_residual_is_added_first(backend: str, centered: bool) -> None:
    torch.manual_seed(0)
    norm = layer_norm if centered else rms_norm
    x, r = torch.randn(2, 6, 20, requires_grad=True), torch.randn(2, 6, 20, requires_grad=True)
    output, total = norm(x, (20,), residual=r)
    alone = norm(x + r, (20,))
    torch.testing.assert_close(output, alone)
    torch.testing.assert_close(total, x + r)
    fused = torch.autograd.grad(output.sin().sum() + total.square().sum(), (x, r))
    plain = torch.autograd.grad(alone.sin().sum() + (x + r).square().sum(), (x, r))
    torch.testing.assert_close(fused, plain)


def test_float32_parameters_with_bfloat16_input(backend: str) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(4, 16).bfloat16().requires_grad_(), torch.randn(16, requires_grad=True), torch.randn(16)
    output = layer_norm(x, (16,), w, b)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and w.grad is not None and w.grad.dtype == torch.float32
    torch.testing.assert_close(output.double(), reference.layer_norm(x, w, b, 1e-5), atol=2**-6, rtol=2**-8)


def test_nan_stays_in_its_row(backend: str) -> None:
    x = torch.randn(3, 8)
    x[1, 2] = float("nan")
    assert layer_norm(x, (8,)).isnan().all(1).tolist() == [False, True, False]


def test_empty(backend: str) -> None:
    x = torch.empty(0, 8, requires_grad=True)
    layer_norm(x, (8,), torch.ones(8, requires_grad=True)).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 8)


def test_registration(backend: str) -> None:
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(torch.ops.fastformer.norm.default, (x, None, w, w.detach().requires_grad_(), 1e-5, True))
    torch.library.opcheck(
        torch.ops.fastformer.norm.default, (x, x.detach().clone().requires_grad_(), w, None, 1e-5, False)
    )


def test_compiles_without_graph_break() -> None:
    compiled = torch.compile(layer_norm, fullgraph=True, dynamic=True)
    weight = torch.randn(8, requires_grad=True)
    for size in (3, 11):
        x = torch.randn(size, 8, requires_grad=True)
        torch.testing.assert_close(compiled(x, (8,), weight), layer_norm(x, (8,), weight))
        compiled(x, (8,), weight).sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3, dtype=torch.int64), (3,)), TypeError, "input must be float32"),
        (
            (torch.ones(2, 3), (2,)),
            ValueError,
            r"normalized_shape must be the last dimensions of input \(2, 3\); got \(2,\)",
        ),
        ((torch.ones(2, 3), (3,), torch.ones(2)), ValueError, r"weight must have shape \(3,\)"),
        ((torch.ones(1, 65537), (65537,)), ValueError, "1 to 65536 elements; got 65537"),
    ],
)
def test_refuses_what_it_cannot_do(arguments: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        layer_norm(*arguments)
