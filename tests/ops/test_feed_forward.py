"""Feed-forward: both backends against float64, over activations, gates, biases, shapes and dtypes."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import reference
import torch
from accuracy import assert_as_accurate
from hypothesis import given, settings

from fastformer.backends import backend as use_backend
from fastformer.ops.feed_forward import ACTIVATIONS, feed_forward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(tokens: int, features: int, intermediate: int, gated: bool, biased: bool, dtype: torch.dtype) -> list[Any]:
    def tensor(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)

    def bias(size: int) -> torch.Tensor | None:
        return tensor(size) if biased else None

    gate = tensor(intermediate, features) if gated else None
    x = torch.randn(features, tokens).to(dtype).T
    up, down = tensor(intermediate, features), tensor(features + 1, intermediate)
    return [x, up, down, bias(intermediate), bias(features + 1), gate, bias(intermediate) if gated else None]


def check(tensors: list[Any], activation: str) -> None:
    grad_output = torch.randn(tensors[0].shape[0], tensors[2].shape[0])

    def run(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
        output = function(*leaves, activation)
        grads = torch.autograd.grad(output, [leaf for leaf in leaves if leaf is not None], grad_output.to(dtype))
        return [output.detach(), *grads]

    # Sums of n terms in float32, in another order than PyTorch's, differ by about sqrt(n) roundings; in 16 bits the one
    # rounding of the result hides them.
    longest = max(max(t.shape) for t in tensors if t is not None)
    units = longest**0.5 if tensors[0].dtype == torch.float32 else 1.0
    exact, pytorch = run(reference.feed_forward, torch.float64), run(reference.feed_forward, tensors[0].dtype)
    for index, (a, p, e) in enumerate(zip(run(feed_forward, tensors[0].dtype), pytorch, exact, strict=True)):
        assert_as_accurate(f"result {index}", a, p, e, scale=units * max(1.0, e.abs().max().item()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_float64(backend: str, activation: str, gated: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(make(9, 24, 40, gated, True, dtype), activation)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 150),
    features=st.integers(1, 70),
    intermediate=st.integers(1, 150),
    gated=st.booleans(),
    biased=st.booleans(),
)
def test_any_shape(tokens: int, features: int, intermediate: int, gated: bool, biased: bool) -> None:
    torch.manual_seed(0)
    tensors = make(tokens, features, intermediate, gated, biased, torch.float32)
    for name in ("triton", "torch"):
        with use_backend(name):
            check(tensors, "silu")


def test_leading_dimensions_and_no_tokens(backend: str) -> None:
    up, down = torch.randn(6, 4, requires_grad=True), torch.randn(5, 6)
    assert feed_forward(torch.randn(2, 3, 4), up, down).shape == (2, 3, 5)
    feed_forward(torch.randn(0, 4), up, down).sum().backward()
    assert torch.equal(up.grad, torch.zeros(6, 4))


def test_registration(backend: str) -> None:
    tensors = make(3, 4, 6, True, True, torch.float32)
    leaves = [t.detach().requires_grad_() for t in tensors]
    residual, seed = torch.randn(3, 5, requires_grad=True), torch.tensor([3, 4])
    ops = torch.ops.fastformer
    for stored in (True, False):
        torch.library.opcheck(ops.feed_forward.default, (*leaves, residual, seed, "gelu", 0.2, 0.3, stored))
    x, up, down, up_bias, _, gate, gate_bias = tensors
    saved = (x, up, down, up_bias, gate, gate_bias, None, None, seed)
    torch.library.opcheck(
        ops.feed_forward_backward.default, (torch.randn(3, 5), *saved, "gelu", 0.2, 0.3, [True, False] * 3 + [True])
    )


def test_compiles_without_graph_break() -> None:
    compiled = torch.compile(feed_forward, fullgraph=True, dynamic=True)
    _, up, down, *_ = make(1, 8, 12, False, False, torch.float32)
    up.requires_grad_()
    for size in (3, 11):
        x = torch.randn(size, 8)
        torch.testing.assert_close(compiled(x, up, down), feed_forward(x, up, down))
        compiled(x, up, down).sum().backward()


X, UP, DOWN = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X.long(), UP, DOWN), {}, TypeError, "input must be float32"),
        ((X, UP.T, DOWN), {}, ValueError, r"up_weight must have shape .* got \(3, 4\)"),
        ((X, UP, UP), {}, ValueError, "down_weight must have shape"),
        ((X, UP.half(), DOWN), {}, TypeError, "up_weight must have input's dtype"),
        ((X, UP, DOWN, torch.zeros(3)), {}, ValueError, r"up_bias must have shape \(4,\)"),
        ((X, UP, DOWN), {"activation": "tanh"}, ValueError, "activation must be one of relu, gelu.*'tanh'"),
        ((X, UP, DOWN), {"gate_bias": torch.zeros(4)}, ValueError, "gate_bias was given without gate_weight"),
    ],
)
def test_refuses_what_it_cannot_do(arguments: Any, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        feed_forward(*arguments, **options)
