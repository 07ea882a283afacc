"""Attention over parts of the keys is merged exactly, and so are its gradients."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from accuracy import assert_as_accurate
from hypothesis import given, settings

import fastformer
from fastformer.ops import attention, merge_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def merged(outputs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge by the formula, in the dtype of `lses`."""
    lse = torch.logsumexp(lses, 0)
    return (torch.softmax(lses, 0)[..., None] * outputs).sum(0).to(outputs.dtype), lse


@pytest.mark.quick
@settings(max_examples=30)
@given(
    parts=st.integers(1, 40),
    rows=st.lists(st.integers(1, 5), max_size=3),
    head_dim=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    strided=st.booleans(),
)
def test_matches_float64(parts: int, rows: list[int], head_dim: int, dtype: torch.dtype, strided: bool) -> None:
    torch.manual_seed(parts)
    outputs, lses = torch.randn(parts, *rows, head_dim).to(dtype), torch.randn(parts, *rows) * 3
    if strided:
        outputs = torch.randn(head_dim, *rows, parts).to(dtype).transpose(0, -1)
        lses = torch.randn(*lses.shape, 2)[..., 0] * 3
    grads = torch.randn(*rows, head_dim), torch.randn(rows)

    def run(function, dtype: torch.dtype, lse_dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [outputs.detach().to(dtype).requires_grad_(), lses.detach().to(lse_dtype).requires_grad_()]
        results = function(*leaves)
        loss = sum((r * g.to(r.dtype)).sum() for r, g in zip(results, grads, strict=True))
        return [r.detach() for r in results] + list(torch.autograd.grad(loss, leaves))

    exact = run(merged, torch.float64, torch.float64)
    pytorch = run(merged, dtype, torch.float32)
    for backend in ("triton", "torch"):
        with fastformer.backend(backend):
            actual = run(merge_attention, dtype, torch.float32)
        for name, a, p, e in zip(("output", "lse", "grad_outputs", "grad_lses"), actual, pytorch, exact, strict=True):
            # This float32 gradient comes from products that were rounded to the dtype of the outputs.
            coarser = torch.finfo(dtype).eps / torch.finfo(a.dtype).eps if name == "grad_lses" else 1.0
            magnitude = max(1.0, e.abs().max().item(), grads[0].abs().sum(-1).max().item() * (name == "grad_lses"))
            assert_as_accurate(f"{backend} {name}", a, p, e, scale=coarser * magnitude)


def test_large_log_sum_exps_keep_the_weights_accurate(backend: str) -> None:
    """Weights are accurate: base-2 exponents rounded before the maximum is subtracted would be off by many units."""
    torch.manual_seed(0)
    outputs, lses = torch.randn(4, 32, 16), torch.randn(4, 32) + 1000
    exact, pytorch = merged(outputs.double(), lses.double()), merged(outputs, lses)
    for name, a, p, e in zip(("output", "lse"), merge_attention(outputs, lses), pytorch, exact, strict=True):
        assert_as_accurate(name, a, p, e)


@pytest.mark.quick
def test_parts_of_the_keys_make_the_whole(backend: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 8, requires_grad=True) for _ in range(3))
    whole, whole_lse = attention(q, k, v, return_lse=True)
    parts = [
        attention(q, k[:, :, i], v[:, :, i], return_lse=True)
        for i in (slice(3), slice(3, 3), slice(3, 5), slice(5, 12))
    ]
    output, lse = merge_attention(*(torch.stack(part) for part in zip(*parts, strict=True)))
    torch.testing.assert_close(output, whole)
    torch.testing.assert_close(lse, whole_lse)
    grads = torch.autograd.grad(output.square().sum() + lse.sum(), (q, k, v))
    torch.testing.assert_close(grads, torch.autograd.grad(whole.square().sum() + whole_lse.sum(), (q, k, v)))


def test_a_part_without_keys_counts_for_nothing(backend: str) -> None:
    outputs = torch.tensor([[[1.0]], [[float("nan")]]]).expand(2, 3, 1).clone().requires_grad_()
    lses = torch.tensor([[0.5, 0.5, float("-inf")], [float("-inf")] * 3]).requires_grad_()
    output, lse = merge_attention(outputs, lses)
    assert output.flatten().tolist() == [1.0, 1.0, 0.0]
    assert lse.tolist() == [0.5, 0.5, float("-inf")]
    grad_outputs, grad_lses = torch.autograd.grad(output.sum() + lse[:2].sum(), (outputs, lses))
    assert grad_outputs.flatten().tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert grad_lses.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_registration(backend: str) -> None:
    outputs, lses = torch.randn(3, 5, 8), torch.randn(3, 5)
    torch.library.opcheck(torch.ops.fastformer.merge_attention.default, (outputs, lses))


def test_compiles_without_graph_break() -> None:
    compiled = torch.compile(merge_attention, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        outputs, lses = torch.randn(3, rows, 8, requires_grad=True), torch.randn(3, rows, requires_grad=True)
        torch.testing.assert_close(compiled(outputs, lses), merge_attention(outputs, lses))
        compiled(outputs, lses)[0].sum().backward()


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("outputs", "lses", "error", "message"),
    [
        (torch.ones(2, 3, 4).double(), torch.ones(2, 3), TypeError, "outputs must be float32, float16 or bfloat16"),
        (torch.ones(2), torch.ones(2), ValueError, r"outputs must be \(parts, ..., head_dim\).*got shape \(2,\)"),
        (torch.ones(0, 3, 4), torch.ones(0, 3), ValueError, "parts and head_dim at least 1"),
        (torch.ones(2, 3, 4), torch.ones(2, 3).half(), TypeError, "lses must be float32"),
        (torch.ones(2, 3, 4), torch.ones(2, 4), ValueError, r"lses must have shape \(2, 3\)"),
    ],
)
def test_refuses_what_it_cannot_do(outputs: torch.Tensor, lses: torch.Tensor, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        merge_attention(outputs, lses)
