"""Feed-forward: both backends and plans agree with float64, over activations, gates, dropout, shapes and dtypes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import reference
import torch
from accuracy import assert_as_accurate
from fastformer_kernels.feed_forward import fused
from fastformer_kernels.plans import forced_plan
from hypothesis import given, settings

from fastformer.backends import backend as use_backend
from fastformer.ops.feed_forward import ACTIVATIONS, feed_forward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["fused", "library", "torch"])
def implementation(request: pytest.FixtureRequest):
    """Run each test that takes this fixture with each of the two plans of the kernels, and with PyTorch."""
    with use_backend("torch" if request.param == "torch" else "triton"):
        if request.param == "torch":
            yield
        else:
            with forced_plan(request.param):
                yield


def make(tokens: int, features: int, intermediate: int, gated: bool, biased: bool, dtype: torch.dtype) -> list[Any]:
    def tensor(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)

    def bias(size: int) -> torch.Tensor | None:
        return tensor(size) if biased else None

    gate = tensor(intermediate, features) if gated else None
    x = torch.randn(features, tokens).to(dtype).T
    up, down = tensor(intermediate, features), tensor(features + 1, intermediate)
    return [x, up, down, bias(intermediate), bias(features + 1), gate, bias(intermediate) if gated else None]


def dropout_scale(p: float, rows: int, columns: int) -> torch.Tensor | float:
    """Return the factors of the next dropout, drawn as the operator draws them."""
    if p == 0.0:
        return 1.0
    seed, offset = torch.randint(0, 2**63 - 1, (2,)).tolist()
    return reference.matrix_dropout_keep(seed, offset, p, rows, columns).double() / (1.0 - p)


def check(
    tensors: list[Any],
    activation: str,
    residual: torch.Tensor | None = None,
    hidden_dropout_p: float = 0.0,
    output_dropout_p: float = 0.0,
    recompute: bool = False,
) -> None:
    input, up, down, *_ = tensors
    grad_output = torch.randn(input.shape[0], down.shape[0])
    torch.manual_seed(3)
    scales = [
        dropout_scale(p, input.shape[0], columns)
        for p, columns in ((hidden_dropout_p, up.shape[0]), (output_dropout_p, down.shape[0]))
    ]

    def run(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (*tensors, residual)]
        torch.manual_seed(3)
        output = function(*leaves)
        grads = torch.autograd.grad(output, [leaf for leaf in leaves if leaf is not None], grad_output.to(dtype))
        return [output.detach(), *grads]

    def ours(*leaves: Any) -> torch.Tensor:
        return feed_forward(
            *leaves[:-1],
            activation,
            hidden_dropout_p=hidden_dropout_p,
            output_dropout_p=output_dropout_p,
            residual=leaves[-1],
            recompute=recompute,
        )

    def naive(*leaves: Any) -> torch.Tensor:
        same = [scale if isinstance(scale, float) else scale.to(leaves[0].dtype) for scale in scales]
        return reference.feed_forward(*leaves[:-1], activation, leaves[-1], *same)

    # Float32 sums of n terms, in another order than PyTorch's, differ by about sqrt(n) roundings; in 16 bits the one
    # rounding of the result hides them.
    longest = max(max(t.shape) for t in tensors if t is not None)
    units = longest**0.5 if input.dtype == torch.float32 else 1.0
    exact, pytorch = run(naive, torch.float64), run(naive, input.dtype)
    for index, (a, p, e) in enumerate(zip(run(ours, input.dtype), pytorch, exact, strict=True)):
        assert_as_accurate(f"result {index}", a, p, e, scale=units * max(1.0, e.abs().max().item()))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_float64(implementation: None, activation: str, gated: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(make(9, 24, 40, gated, True, dtype), activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_dropout_and_residual_match_float64(implementation: None, gated: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors, residual = make(35, 17, 22, gated, True, dtype), torch.randn(18, 35).to(dtype).T
    check(tensors, "gelu", residual, hidden_dropout_p=0.3, output_dropout_p=0.6, recompute=gated)


@settings(max_examples=8)
@given(
    tokens=st.integers(1, 70),
    features=st.integers(1, 40),
    intermediate=st.integers(1, 50),
    gated=st.booleans(),
    biased=st.booleans(),
    with_residual=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4]),
    recompute=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    plan=st.sampled_from(["fused", "library"]),
)
def test_any_shape_and_options(
    tokens: int,
    features: int,
    intermediate: int,
    gated: bool,
    biased: bool,
    with_residual: bool,
    dropout: float,
    recompute: bool,
    dtype: torch.dtype,
    plan: Any,
) -> None:
    torch.manual_seed(0)
    tensors = make(tokens, features, intermediate, gated, biased, dtype)
    residual = torch.randn(tokens, features + 1).to(dtype) if with_residual else None
    for name in ("triton", "torch"):
        with use_backend(name), forced_plan(plan):
            check(tensors, "silu", residual, dropout, dropout / 2, recompute)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [32, 37])
@pytest.mark.parametrize(
    "overlap", [{}, {"descriptor_stores": True, "flatten": True}, {"descriptor_stores": True, "warp_specialize": True}]
)
def test_descriptors(overlap: dict[str, bool], gated: bool, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operands may be read by descriptors, as on sm_90: (outer, depth) forward, (depth, outer) backward.

    Hidden layers are also written by descriptors where that is asked for, and the output, which is not aligned, never.
    """
    tables = fused._CONFIGURATIONS["interpreter"]
    copied = {kernel: replace(choice, descriptors=True, **overlap) for kernel, choice in tables[4].items()}
    monkeypatch.setitem(fused._CONFIGURATIONS, "interpreter", {4: copied})
    torch.manual_seed(0)
    tensors = make(tokens, 20, 44, gated, True, torch.float32)
    tensors[0] = tensors[0].contiguous()
    with use_backend("triton"), forced_plan("fused"):
        check(tensors, "gelu", torch.randn(tokens, 21), hidden_dropout_p=0.2)


def test_recomputation_keeps_no_pre_activations(implementation: None) -> None:
    tensors = make(5, 8, 16, True, True, torch.float32)
    tensors[1].requires_grad_()

    def saved_sizes(recompute: bool) -> list[int]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            feed_forward(*tensors, recompute=recompute)
        return sizes

    assert saved_sizes(recompute=False).count(5 * 16) == 2
    assert 5 * 16 not in saved_sizes(recompute=True)


def test_dropout_draws_from_pytorchs_generator() -> None:
    tensors = make(6, 8, 16, False, True, torch.float32)
    torch.manual_seed(1)
    first, second = (feed_forward(*tensors, hidden_dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    again = feed_forward(*tensors, hidden_dropout_p=0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_wider_residual_is_not_rounded(implementation: None, device: torch.device) -> None:
    """A 16-bit block adds to a float32 residual without rounding it, as under autocast."""
    tensors = make(6, 8, 16, False, True, torch.bfloat16)
    residual = torch.randn(6, 9, requires_grad=True)
    output = feed_forward(*tensors, residual=residual)
    assert output.dtype == torch.float32
    plain = feed_forward(*(t if t is None else t.float() for t in tensors))
    torch.testing.assert_close(output, plain + residual, atol=0.05, rtol=0.0)
    gradient = torch.randn(6, 9)
    output.backward(gradient)
    assert torch.equal(residual.grad, gradient)
    with torch.autocast(device.type, torch.bfloat16):
        same = feed_forward(*(t if t is None else t.float() for t in tensors), residual=residual)
    assert torch.equal(same, output)


def test_leading_dimensions_and_no_tokens(implementation: None) -> None:
    up, down = torch.randn(6, 4, requires_grad=True), torch.randn(5, 6)
    assert feed_forward(torch.randn(2, 3, 4), up, down, residual=torch.zeros(2, 3, 5)).shape == (2, 3, 5)
    feed_forward(torch.randn(0, 4), up, down, hidden_dropout_p=0.5, output_dropout_p=0.5).sum().backward()
    assert torch.equal(up.grad, torch.zeros(6, 4))
    bias = torch.randn(6)
    nothing = feed_forward(torch.randn(3, 0), torch.randn(6, 0), down, bias, residual=torch.ones(3, 5))
    torch.testing.assert_close(nothing, (torch.nn.functional.gelu(bias) @ down.T + 1).expand(3, 5))


def test_result_may_be_changed_in_place(implementation: None) -> None:
    """The result is not a view, which autograd might not let a hook on a module's output change in place."""
    up, down = torch.randn(6, 4, requires_grad=True), torch.randn(5, 6)
    for shape in ((3, 4), (2, 3, 4)):
        output = feed_forward(torch.randn(shape), up, down)
        assert not output._is_view()
        output.mul_(2).sum().backward()


def test_registration(backend: str) -> None:
    tensors = make(3, 4, 6, True, True, torch.float32)
    residual, seed = torch.randn(3, 5), torch.tensor([3, 4])
    ops = torch.ops.fastformer
    torch.library.opcheck(ops.feed_forward.default, (*tensors, residual, seed, seed, "gelu", 0.2, 0.3, True))
    x, up, down, up_bias, _, gate, gate_bias = tensors
    saved = (x, up, down, up_bias, gate, gate_bias, None, None, seed, seed)
    needs_grad = [True, False, True, False, True, False, True]
    torch.library.opcheck(ops.feed_forward_backward.default, (torch.randn(3, 5), *saved, "gelu", 0.2, 0.3, needs_grad))


def test_compiles_without_graph_break() -> None:
    def block(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return feed_forward(x, up, down, hidden_dropout_p=0.2, residual=x.repeat(1, 2)[:, :9], recompute=True)

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    _, up, down, *_ = make(1, 8, 12, False, False, torch.float32)
    up.requires_grad_()
    for size in (3, 11):
        x = torch.randn(size, 8)
        assert compiled(x, up, down).shape == (size, 9)
        compiled(x, up, down).sum().backward()


X, UP, DOWN = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3, 4)


@pytest.mark.cpu
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
        ((X, UP, DOWN), {"hidden_dropout_p": 1.5}, ValueError, r"hidden_dropout_p must be in \[0, 1\]; got 1.5"),
        ((X, UP, DOWN), {"output_dropout_p": -0.1}, ValueError, r"output_dropout_p must be in \[0, 1\]; got -0.1"),
        ((X, UP, DOWN), {"residual": torch.zeros(2, 4)}, ValueError, r"residual must have shape \(2, 3\)"),
        ((X, UP, DOWN), {"residual": X.long()}, TypeError, "residual must be float32"),
    ],
)
def test_refuses_what_it_cannot_do(arguments: Any, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        feed_forward(*arguments, **options)
