"""Softmax: both backends against float64, over shapes, strides and dtypes."""

import hypothesis.strategies as st
import pytest
import reference
import torch
from accuracy import assert_as_accurate
from hypothesis import given, settings

import fastformer

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(input: torch.Tensor, dim: int) -> None:
    grad_output = torch.randn_like(input)
    results = {}
    for name, function, dtype in [
        ("actual", fastformer.softmax, input.dtype),
        ("pytorch", torch.softmax, input.dtype),
        ("exact", reference.softmax, torch.float64),
    ]:
        x = input.detach().to(dtype).requires_grad_()
        y = function(x, dim)
        y.backward(grad_output.to(dtype))
        results[name] = (y.detach(), x.grad)
    for index, name in enumerate(["output", "grad_input"]):
        assert_as_accurate(
            name, results["actual"][index], results["pytorch"][index], results["exact"][index], scale=1.0
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 1), (5, 33), (2, 3, 130), (1, 4097), (2, 16385)])
def test_matches_float64(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(torch.randn(shape).to(dtype) * 4, -1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_dim_and_strides(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    order = data.draw(st.permutations(range(len(shape))))
    step = data.draw(st.integers(1, 2))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    dtype = data.draw(st.sampled_from(DTYPES))
    input = torch.randn([size * step for size in shape]).to(dtype)[tuple(slice(None, None, step) for _ in shape)]
    for name in ["triton", "torch"]:
        with fastformer.backend(name):
            check(input.permute(order), dim)


def test_row_of_negative_infinity_gives_zeros(backend: str) -> None:
    x = torch.tensor([[float("-inf")] * 3, [0.0, float("-inf"), 0.0]], requires_grad=True)
    y = fastformer.softmax(x)
    y.sum().backward()
    assert y.tolist() == [[0.0, 0.0, 0.0], [0.5, 0.0, 0.5]]
    assert torch.equal(x.grad, torch.zeros(2, 3))


def test_nan_in_nan_out(backend: str) -> None:
    y = fastformer.softmax(torch.tensor([[0.0, float("nan")], [1.0, 1.0]]))
    assert y.isnan().tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty(backend: str, shape: tuple[int, int]) -> None:
    assert fastformer.softmax(torch.empty(shape)).shape == shape


def test_registration(backend: str) -> None:
    torch.library.opcheck(torch.ops.fastformer.softmax.default, (torch.randn(3, 5, requires_grad=True), 1))


def test_compiles_without_graph_break() -> None:
    compiled = torch.compile(fastformer.softmax, fullgraph=True, dynamic=True)
    for size in (7, 19):
        x = torch.randn(3, size, requires_grad=True)
        torch.testing.assert_close(compiled(x, 1), fastformer.softmax(x, 1))
        compiled(x, 1).square().sum().backward()
        assert x.grad is not None


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(TypeError, match=r"input must be float32, float16 or bfloat16; got torch.int64"):
        fastformer.softmax(torch.ones(3, dtype=torch.int64))
    with pytest.raises(IndexError, match=r"dim must be in \[-2, 1\].*got 2"):
        fastformer.softmax(torch.ones(3, 3), 2)
