"""Softmax and log-softmax: both backends are compared with float64, over shapes, strides, dtypes, masks and scales."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import reference
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from fastformer_kernels.configurations import forced
from fastformer_kernels.rows import RowConfiguration
from hypothesis import given, settings

import fastformer

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FUNCTIONS = {False: fastformer.softmax, True: fastformer.log_softmax}
INFINITY = float("inf")


def check(input: torch.Tensor, dim: int, log: bool = False, inplace: bool = False, **options: Any) -> None:
    """Compare output and gradients, also the mask's, with the reference in float64 and in the dtype of `input`."""
    causal, alignment = options.get("causal", False), options.get("alignment", "bottom_right")
    keys = input.shape[dim]
    queries = input.shape[-2 if dim % input.dim() == input.dim() - 1 else -1] if input.dim() > 1 else 1
    causal_offset = (keys - queries if alignment == "bottom_right" else 0) if causal else None
    plain = {"scale": options.get("scale", 1.0), "causal_offset": causal_offset, "log": log}
    grad_output = torch.randn(input.shape)

    def run(dtype: torch.dtype, own: bool) -> list[torch.Tensor]:
        x = input.detach().to(dtype).requires_grad_()
        mask = options.get("mask")
        leaves = [x]
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(dtype).requires_grad_()
            leaves.append(mask)
        if own:
            given = x * 1.0 if inplace else x
            y = FUNCTIONS[log](given, dim, inplace=inplace, **{**options, "mask": mask})
            assert not inplace or y is given
        else:
            y = reference.softmax(x, dim, mask=mask, **plain)
        # An element without probability has no gradient, and the -inf of log-softmax must not be multiplied by zero.
        return [
            y.detach(),
            *torch.autograd.grad(y.masked_fill(y.detach() == -INFINITY, 0.0), leaves, grad_output.to(dtype)),
        ]

    exact, pytorch, actual = run(torch.float64, False), run(input.dtype, False), run(input.dtype, True)
    assert torch.equal(actual[0] == -INFINITY, exact[0] == -INFINITY)
    for name, a, p, e in zip(["output", "grad_input", "grad_mask"], actual, pytorch, exact, strict=False):
        a, p, e = (tensor.masked_fill(tensor == -INFINITY, 0.0) for tensor in (a, p, e))
        # Log-softmax rounds the logarithm and the difference.
        units = 3.0 if log and a.dtype == torch.float32 else 1.0
        if name == "grad_input":
            units *= max(1.0, abs(plain["scale"]))
        if name == "grad_mask":
            # Each probability is rounded by half a unit of itself. The sum of y (dy - sum y dy), which is zero in exact
            # numbers, then leaves an error, which adds up over the rows that share an element of the mask.
            units *= 1 if e.shape == input.shape else input.numel() // keys
        assert_as_accurate(name, a, p, e, scale=units * max(1.0, e.abs().max().item()))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3, 1), (5, 33), (2, 3, 130), (1, 4097), (2, 16385)])
def test_matches_float64(backend: str, shape: tuple[int, ...], log: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(torch.randn(shape).to(dtype) * 4, -1, log)


@pytest.mark.parametrize("shape", [(3, 70), (2, 600, 5), (1, 300001)])
def test_rows_longer_than_a_tile_or_across_memory(backend: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    check(torch.randn(shape), 1)


# The interpreter has two multiprocessors: up to four long rows are split.
LONG_ROWS = [(1, 16385), (2, 16401), (4, 40000), (5, 16391)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("shape", LONG_ROWS)
def test_long_rows_that_are_split_or_begin_anywhere(
    backend: str, shape: tuple[int, int], log: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    padded = torch.randn(shape[0], shape[1] + 3).to(dtype) * 4
    mask = torch.randn(shape[1]).masked_fill(torch.rand(shape[1]) < 0.2, -INFINITY)
    # Rows of an odd stride, in place, and with an offset that leaves whole parts of the first rows without a score.
    check(padded[:, 2:-1], -1, log)
    check(padded[:, :-3], -1, log, inplace=True, mask=mask, scale=0.3, causal=True, alignment="top_left")
    check(padded[:, :-3], -1, log, mask=mask > 0, causal=True)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("shape", LONG_ROWS)
def test_long_rows_of_infinity_and_nan(backend: str, shape: tuple[int, int], log: bool) -> None:
    torch.manual_seed(0)
    x, nothing = torch.randn(shape), -INFINITY if log else 0.0
    for value, column in itertools.product((float("nan"), INFINITY), (0, 8, shape[1] // 2, shape[1] - 1)):
        x[-1] = -INFINITY
        x[-1, column] = value
        x.requires_grad_()
        y = FUNCTIONS[log](x)
        (gradient,) = torch.autograd.grad(y[-1].sum(), x)
        assert y[-1].isnan().all() and not y[:-1].isnan().any()
        assert gradient[-1].isnan().all() and not gradient[:-1].any()
        x = x.detach()
    x[-1] = -INFINITY
    x.requires_grad_()
    y = FUNCTIONS[log](x)
    assert (y[-1] == nothing).all() and not y.isnan().any()
    assert not torch.autograd.grad(y[-1].nan_to_num(neginf=0.0).sum(), x)[0].any()


@pytest.mark.parametrize("log", [False, True])
def test_a_split_row_is_the_whole_row(log: bool) -> None:
    """Also with parts of several tiles, and with rows across memory."""
    torch.manual_seed(0)
    for x, dim in ((torch.randn(3, 20003), 1), (torch.randn(20003, 3), 0)):
        results = []
        for split in (0, 1, 2, 64):
            configuration = RowConfiguration(tile_elements=4096, thread_elements=16, split=split)
            leaf = x.clone().requires_grad_()
            with (
                fastformer.backend("triton"),
                forced({"softmax_forward": configuration, "softmax_backward": configuration}),
            ):
                y = FUNCTIONS[log](leaf, dim)
                y.backward(x)
            results.append((y.detach(), leaf.grad))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0])


@settings(max_examples=40)
@given(data=st.data())
def test_any_shape_strides_and_options(data: st.DataObject) -> None:
    torch.manual_seed(0)
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    order = data.draw(st.permutations(range(len(shape))))
    step = data.draw(st.integers(1, 2))
    dtype = data.draw(st.sampled_from(DTYPES))
    input = torch.randn([size * step for size in shape]).to(dtype)[tuple(slice(None, None, step) for _ in shape)]
    input = input.permute(order)
    options: dict[str, Any] = {"scale": data.draw(st.sampled_from([1.0, 0.3, -2.0]))}
    options["causal"] = len(shape) > 1 and data.draw(st.booleans())
    dim = data.draw(st.integers(len(shape) - 2 if options["causal"] else 0, len(shape) - 1))
    if options["causal"]:
        options["alignment"] = data.draw(st.sampled_from(["bottom_right", "top_left"]))
    kind = data.draw(st.sampled_from(["none", "boolean", "additive"]))
    mask_shape = [data.draw(st.sampled_from([1, size])) for size in input.shape][
        data.draw(st.integers(0, len(shape))) :
    ]
    if kind == "boolean":
        options["mask"] = torch.rand(mask_shape) > 0.4
    elif kind == "additive":
        options["mask"] = torch.randn(mask_shape).masked_fill(torch.rand(mask_shape) < 0.2, -INFINITY)
    log, inplace = data.draw(st.booleans()), data.draw(st.booleans())
    for name in ["triton", "torch"]:
        with fastformer.backend(name):
            check(input, dim - len(shape) if data.draw(st.booleans()) else dim, log, inplace, **options)


@pytest.mark.parametrize("log", [False, True])
def test_large_scores_keep_their_precision(backend: str, log: bool) -> None:
    torch.manual_seed(0)
    check(torch.randn(3, 50) + 10000.0, -1, log)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_row_of_negative_infinity_gives_zeros(backend: str, log: bool, inplace: bool) -> None:
    x = torch.tensor([[-INFINITY] * 3, [0.0, -INFINITY, 0.0]], requires_grad=True)
    y = FUNCTIONS[log](x * 1.0, inplace=inplace)
    y.backward(torch.ones(2, 3))
    half = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 0.5]])
    torch.testing.assert_close(y, half.log() if log else half)
    torch.testing.assert_close(x.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("columns", [2, 20000])
def test_nan_in_nan_out(backend: str, log: bool, columns: int) -> None:
    x = torch.zeros(2, columns)
    x[0, 1] = float("nan")
    y = FUNCTIONS[log](x)
    assert y[0].isnan().all() and not y[1].isnan().any()
    mask = torch.ones(columns, dtype=torch.bool)
    mask[1] = False
    assert not FUNCTIONS[log](x, mask=mask).isnan().any()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty(backend: str, shape: tuple[int, int]) -> None:
    assert fastformer.softmax(torch.empty(shape)).shape == shape
    assert fastformer.softmax(torch.empty(shape), causal=True, inplace=True).shape == shape


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("given", [torch.float16, torch.float32, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("wanted", DTYPES)
def test_dtype_is_pytorchs(backend: str, log: bool, given: torch.dtype, wanted: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 9) * 3).to(given).requires_grad_(given.is_floating_point)
    expected, actual = (f(x, -1, dtype=wanted) for f in ((F.softmax, F.log_softmax)[log], FUNCTIONS[log]))
    assert actual.dtype == wanted
    unit = 4 * torch.finfo(wanted).eps
    torch.testing.assert_close(actual, expected, atol=unit, rtol=unit)
    if given.is_floating_point:
        gradients = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in (actual, expected)]
        # Each of nine terms is rounded by half a unit, in both computations. Where a weight is near 1 the terms cancel:
        # the error is relative to the terms, dy and the weight times the sum of dy, not to their difference.
        weights, dy = F.softmax(x.detach().float(), -1), 2 * expected.detach().float().abs()
        terms = (
            dy + weights * dy.sum(-1, keepdim=True) if log else weights * (dy + (dy * weights).sum(-1, keepdim=True))
        )
        unit = max(torch.finfo(dtype).eps for dtype in (wanted, given))
        torch.testing.assert_close(*gradients, atol=9 * unit * terms.max().item(), rtol=0)


def test_inplace_keeps_autograds_rules(backend: str) -> None:
    leaf = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        fastformer.softmax(leaf, inplace=True)
    exponential = leaf.exp()
    fastformer.softmax(exponential, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        exponential.sum().backward()


def test_registration(backend: str) -> None:
    x = torch.randn(3, 5)
    for mask in (None, torch.rand(3, 5) > 0.5, torch.randn(3, 5)):
        for log in (False, True):
            torch.library.opcheck(torch.ops.fastformer.softmax.default, (x, mask, 1, 0.5, 2, log, torch.float32))
    torch.library.opcheck(torch.ops.fastformer.softmax_.default, (torch.randn(3, 5), None, 1, 0.5, 2, False))
    torch.library.opcheck(
        torch.ops.fastformer.softmax_backward.default,
        (torch.randn(3, 5), torch.rand(3, 5), 1, 1.0, False, torch.float16),
    )


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_graph_break(inplace: bool) -> None:
    def masked(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return fastformer.softmax(x * 2.0, mask=mask, causal=True, inplace=inplace)

    compiled = torch.compile(masked, fullgraph=True, dynamic=True)
    for size in (7, 19):
        x, mask = torch.randn(3, size, requires_grad=True), torch.rand(size) > 0.5
        expected, actual = masked(x, mask), compiled(x, mask)
        torch.testing.assert_close(actual, expected)
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected)]
        torch.testing.assert_close(*gradients)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.ones(3, dtype=torch.int64),), {}, TypeError, "input must be float32, float16 or bfloat16; got torch.i"),
        ((torch.ones(3, 3), 2), {}, IndexError, r"dim must be in \[-2, 1\].*got 2"),
        ((torch.ones(3), 0, torch.float64), {}, TypeError, "dtype must be float32, float16 or bfloat16; got torch.fl"),
        ((torch.ones(3), 0, torch.float16), {"inplace": True}, TypeError, "dtype must be input's, torch.float32, when"),
        ((torch.ones(3) * 1j, 0, torch.float32), {}, TypeError, "input must be real; got torch.complex64"),
        ((torch.ones(3),), {"mask": torch.ones(3, dtype=torch.int32)}, TypeError, "mask must be boolean"),
        ((torch.ones(2, 3),), {"mask": torch.ones(2)}, ValueError, r"mask must broadcast to.*\(2, 3\); got \(2,\)"),
        ((torch.ones(3),), {"causal": True}, ValueError, "causal needs an input of two or more dimensions"),
        ((torch.ones(3, 3, 3), 0), {"causal": True}, ValueError, "causal needs .*; got dim=0 of a 3-D input"),
        ((torch.ones(3, 3),), {"causal": True, "alignment": "left"}, ValueError, "alignment must be .*; got 'left'"),
    ],
)
def test_refuses_what_it_cannot_do(arguments: Any, options: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fastformer.softmax(*arguments, **options)
