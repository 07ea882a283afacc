"""LayerNorm and RMSNorm: both backends are compared with float64, over shapes, strides, dtypes and residuals."""

from __future__ import annotations

from functools import partial
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
from torch.utils._python_dispatch import TorchDispatchMode

from fastformer.backends import backend as use_backend
from fastformer.ops import normalization
from fastformer.ops.normalization import layer_norm, rms_norm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = 1e-5
# As few programs as the kernels of odd rows can have: each takes every 8th row.
FEW_PROGRAMS = RowConfiguration(tile_elements=1024, thread_elements=8, programs=1)


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


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (2, 3, 128), (300, 7), (2, 4097)])
def test_matches_float64(backend: str, shape: tuple[int, ...], centered: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check((torch.randn(shape) * 2 + 1).to(dtype), centered, affine=True)


@settings(max_examples=30)
@given(data=st.data())
def test_any_strides(data: st.DataObject) -> None:
    torch.manual_seed(0)
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 40))
    dtype, centered, affine = data.draw(st.tuples(st.sampled_from(DTYPES), st.booleans(), st.booleans()))
    x = torch.randn(columns * 2, rows, 2).to(dtype)[::2].permute(2, 1, 0)
    for name in ("triton", "torch"):
        with use_backend(name):
            check(x, centered, affine)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_needs_no_weight(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, bias, grad_output = torch.randn(5, 33).to(dtype), torch.randn(33).to(dtype), torch.randn(5, 33)

    def run(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, bias)]
        return gradients(function(leaves[0], (33,), None, leaves[1], EPS), leaves, grad_output)

    exact, pytorch = run(F.layer_norm, torch.float64), run(F.layer_norm, dtype)
    for name, a, p, e in zip(
        ("output", "grad_input", "grad_bias"), run(layer_norm, dtype), pytorch, exact, strict=True
    ):
        # The six roundings of `check`.
        units = 3.0 if dtype == torch.float32 else 1.0
        assert_as_accurate(name, a, p, e, scale=units * max(1.0, e.abs().max().item()))


def fused(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    input_bias: torch.Tensor | None,
    keep: torch.Tensor | None,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised value and the sum, in plain PyTorch; the norm is LayerNorm where there is a bias."""
    total = x if input_bias is None else x + input_bias
    if keep is not None:
        total = total * keep / (1.0 - dropout_p)
    total = total if residual is None else total + residual
    if bias is None:
        return F.rms_norm(total, weight.shape, weight, EPS), total
    return F.layer_norm(total, weight.shape, weight, bias, EPS), total


def check_fused(
    shape: tuple[int, int],
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    centered: bool,
    with_input_bias: bool,
    dropout_p: float,
    return_sum: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, columns = shape
    seed = torch.tensor([(5 << 40) + 17, 2**33 + 3])
    monkeypatch.setattr(normalization, "draw_seed", lambda device: seed)
    keep = reference.matrix_dropout_keep(*seed.tolist(), dropout_p, rows, columns) if dropout_p else None
    given = {
        "x": torch.randn(shape).to(dtype),
        "residual": None if residual_dtype is None else torch.randn(shape).to(residual_dtype),
        "weight": torch.randn(columns),
        "bias": torch.randn(columns) if centered else None,
        "input_bias": torch.randn(columns).to(dtype) if with_input_bias else None,
    }
    grad_output, grad_sum = torch.randn(shape), torch.randn(shape)

    def run(function: Any, wide: torch.dtype | None) -> list[torch.Tensor]:
        leaves = {
            name: tensor if tensor is None else tensor.to(wide or tensor.dtype).requires_grad_()
            for name, tensor in given.items()
        }
        output, total = function(**leaves)
        outputs, grads = [output], [grad_output.to(output.dtype)]
        if return_sum and residual_dtype is not None:
            outputs.append(total)
            grads.append(grad_sum.to(total.dtype))
        inputs = [leaf for leaf in leaves.values() if leaf is not None]
        return [*(tensor.detach() for tensor in outputs), *torch.autograd.grad(outputs, inputs, grads)]

    def own(x: torch.Tensor, residual: Any, weight: torch.Tensor, bias: Any, input_bias: Any) -> Any:
        options = {"residual": residual, "input_bias": input_bias, "dropout_p": dropout_p, "return_sum": return_sum}
        if centered:
            result = layer_norm(x, (columns,), weight, bias, EPS, **options)
        else:
            result = rms_norm(x, (columns,), weight, EPS, **options)
        return result if isinstance(result, tuple) else (result, None)

    plain = partial(fused, keep=keep, dropout_p=dropout_p)
    exact = run(plain, torch.float64)
    actual, pytorch = run(own, None), run(plain, None)
    sum_dtype = dtype if residual_dtype is None else torch.promote_types(dtype, residual_dtype)
    for index, (a, p, e) in enumerate(zip(actual, pytorch, exact, strict=True)):
        # Up to six roundings of the sum and, in float32, six of the norm (see `check`), by half a unit each. The unit
        # of the sum is that of its own dtype, also where the sum enters a float32 gradient.
        units = 6.0 * max(1.0, torch.finfo(sum_dtype).eps / torch.finfo(a.dtype).eps)
        assert_as_accurate(str(index), a, p.to(a.dtype), e, scale=units * max(1.0, e.abs().max().item()))


@settings(max_examples=40)
@given(data=st.data())
def test_bias_dropout_and_residual_come_first(data: st.DataObject) -> None:
    torch.manual_seed(0)
    arguments = data.draw(
        st.tuples(
            st.tuples(st.integers(1, 7), st.integers(8, 40)),
            st.sampled_from(DTYPES),
            st.sampled_from([None, *DTYPES]),
            st.booleans(),
            st.booleans(),
            st.sampled_from([0.0, 0.3]),
            st.booleans(),
        )
    )
    for name in ("triton", "torch"):
        with use_backend(name), pytest.MonkeyPatch.context() as monkeypatch:
            check_fused(*arguments, monkeypatch)


@pytest.mark.parametrize("centered", [True, False])
def test_long_rows(backend: str, centered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("fastformer_kernels.normalization.FORWARD_ONE_PASS_COLUMNS", 64)
    monkeypatch.setattr("fastformer_kernels.normalization.BACKWARD_ONE_PASS_COLUMNS", 16)
    monkeypatch.setattr("fastformer_kernels.normalization.BACKWARD_WIDE_COLUMNS", 16)
    tiles_of_64 = RowConfiguration(tile_elements=64, thread_elements=8, programs=4)
    with forced({"norm_forward": tiles_of_64, "norm_backward": tiles_of_64}):
        check_fused((5, 203), torch.float32, torch.float32, centered, True, 0.25, True, monkeypatch)
        check_fused((3, 128), torch.bfloat16, None, centered, False, 0.0, True, monkeypatch)


@pytest.mark.parametrize("columns", [68, 203, 256])
@pytest.mark.parametrize("centered", [True, False])
def test_wide_rows(backend: str, centered: bool, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are longer than a tile, and whose parameters' sums fit in registers."""
    torch.manual_seed(0)
    monkeypatch.setattr("fastformer_kernels.normalization.BACKWARD_ONE_PASS_COLUMNS", 64)
    with forced({"norm_backward": RowConfiguration(tile_elements=64, thread_elements=8, programs=1)}):
        check((torch.randn(5, columns) * 2 + 1).bfloat16(), centered, affine=False)
        check_fused((5, columns), torch.bfloat16, torch.bfloat16, centered, True, 0.0, True, monkeypatch)
        check_fused((3, columns), torch.float16, None, centered, False, 0.0, True, monkeypatch)
        check_fused((3, columns), torch.float16, None, centered, False, 0.25, True, monkeypatch)


# The kernels of odd rows begin at 513 columns.
@pytest.mark.parametrize(("rows", "columns"), [(3, 513), (17, 771), (33, 1023), (2, 4095)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("centered", [True, False])
def test_odd_rows(
    backend: str, centered: bool, dtype: torch.dtype, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(rows, columns) * 2 + 1).to(dtype)
    check(x, centered, affine=True)
    check(x, centered, affine=False)
    with forced({"norm_forward": FEW_PROGRAMS, "norm_backward": FEW_PROGRAMS}):
        check_fused((rows, columns), dtype, dtype, centered, False, 0.0, True, monkeypatch)
        check_fused((rows, columns), dtype, torch.float32, centered, False, 0.0, False, monkeypatch)


@pytest.mark.parametrize("centered", [True, False])
def test_nan_stays_in_its_odd_row(backend: str, centered: bool) -> None:
    norm = layer_norm if centered else rms_norm
    for column in (0, 300, 512):
        x = torch.randn(20, 513, dtype=torch.bfloat16)
        x[9, column] = float("nan")
        x.requires_grad_()
        output = norm(x, (513,))
        output.sum().backward()
        assert x.grad is not None
        for tensor in (output, x.grad):
            assert tensor.isnan().all(1).nonzero().flatten().tolist() == [9]
            assert tensor.isnan().any(1).nonzero().flatten().tolist() == [9]


def test_odd_rows_of_any_strides(backend: str) -> None:
    """Rows that do not lie end to end, or that do not begin at a multiple of 16 bytes."""
    torch.manual_seed(0)
    check(torch.randn(9, 600).bfloat16()[:, 7:596], True, affine=True)
    check(torch.randn(9 * 589 + 3).bfloat16()[3:].view(9, 589), True, affine=True)


def test_dropout_drops_the_right_share(backend: str) -> None:
    torch.manual_seed(0)
    x, zero = torch.ones(100, 200), torch.zeros(100, 200)
    _, total = layer_norm(x, (200,), residual=zero, dropout_p=0.2)
    # Five standard deviations of a binomial of 20,000.
    assert abs((total == 0).double().mean().item() - 0.2) < 5 * (0.2 * 0.8 / 20000) ** 0.5
    assert torch.equal(total.unique(), torch.tensor([0.0, 1.0 / (1.0 - 0.2)]))
    _, again = layer_norm(x, (200,), residual=zero, dropout_p=0.2)
    assert not torch.equal(total, again)


def test_only_the_sum_is_used(backend: str) -> None:
    x, r = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    _, total = layer_norm(x, (8,), residual=r)
    for gradient in torch.autograd.grad(total.sum(), (x, r)):
        torch.testing.assert_close(gradient, torch.ones(3, 8))


def test_a_sum_that_nobody_asks_for_is_not_kept(backend: str) -> None:
    """The sum, a write of all rows, is kept only where it is asked for or a backward may need it."""
    kept = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            result = function(*arguments, **(options or {}))
            if "fastformer.norm." in str(function):
                kept.append(result[1].numel() > 0)
            return result

    x, bias, weight = torch.randn(3, 8), torch.randn(8), torch.ones(8)
    with Calls():
        for requires_grad, grad_enabled in ((False, True), (True, False), (True, True)):
            with torch.set_grad_enabled(grad_enabled):
                layer_norm(x, (8,), weight.clone().requires_grad_(requires_grad), input_bias=bias)
    assert kept == [False, False, True]


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
    x, w = torch.randn(3, 8), torch.randn(8)
    torch.library.opcheck(
        torch.ops.fastformer.norm.default,
        (x, None, w, w.detach().clone(), None, None, 1e-5, True, 0.0, torch.float32, False),
    )
    torch.library.opcheck(
        torch.ops.fastformer.norm.default,
        (
            x,
            x.detach().clone(),
            w,
            None,
            w.detach().clone(),
            torch.tensor([1, 2]),
            1e-5,
            False,
            0.3,
            torch.float32,
            True,
        ),
    )


def test_compiles_without_graph_break() -> None:
    def fused_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, dropout_p: float) -> torch.Tensor:
        output, total = layer_norm(x, (8,), weight, residual=residual, input_bias=weight, dropout_p=dropout_p)
        return output * total

    compiled = torch.compile(fused_norm, fullgraph=True, dynamic=True)
    weight = torch.randn(8, requires_grad=True)
    for size in (3, 11):
        x, residual = torch.randn(size, 8, requires_grad=True), torch.randn(size, 8)
        torch.testing.assert_close(compiled(x, residual, weight, 0.0), fused_norm(x, residual, weight, 0.0))
        compiled(x, residual, weight, 0.5).sum().backward()


@pytest.mark.cpu
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


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dropout_p": 1.5}, ValueError, r"dropout_p must be in \[0, 1\]; got 1.5"),
        ({"input_bias": torch.ones(2)}, ValueError, r"input_bias must have shape \(3,\); got \(2,\)"),
        ({"residual": torch.ones(3)}, ValueError, r"residual must have shape \(2, 3\); got \(3,\)"),
        ({"residual": torch.ones(2, 3).double()}, TypeError, "residual must be float32, float16 or bfloat16; got"),
    ],
)
def test_refuses_wrong_options(options: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        layer_norm(torch.ones(2, 3), (3,), **options)
