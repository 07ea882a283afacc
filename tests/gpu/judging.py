"""Calls of operators, their results and gradients, and the rule of accuracy at real sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accuracy import assert_as_accurate
from torch import Tensor

SEED = 1
Function = Callable[..., Any]

# tf32 is float32 whose products have 10 bits of mantissa: PyTorch's switch, which the kernels follow.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
# Tensor cores cut operands off where cuBLAS rounds them: the terms of a product are too small by 0.7 of a unit on
# average, and the result of two products in a row by less than two units.
_TF32_ROUNDING = 2 * 2.0**-10


@dataclass(frozen=True)
class Call:
    """An operator's call, and what it must give.

    Attributes:
        operator: the operator, of the tensors alone.
        exact: the reference, of the same tensors in float64.
        tensors: in float32, to be taken in the dtype of a test.
        float32: tensors that stay float32, after the others.
        pytorch: PyTorch's own computation in a lower dtype; None: that of `exact`.
        backward: whether the tensors have gradients.
        exponent: the largest number that is exponentiated: an exponential's relative error in float32 is the rounding
            of its exponent, so many units.
        random: whether it draws from PyTorch's generator.
    """

    operator: Function
    exact: Function
    tensors: Sequence[Tensor]
    float32: Sequence[Tensor] = ()
    pytorch: Function | None = None
    backward: bool = True
    exponent: float = 0.0
    random: bool = False

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """The tensors for a call in `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return [*(tensor.to(dtype) for tensor in self.tensors), *(tensor.to(wide) for tensor in self.float32)]


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """The dtype of a name in `DTYPES`, with PyTorch's switch for products of float32 set accordingly."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if name == "tf32" else "ieee"
    try:
        yield DTYPES[name]
    finally:
        switch.fp32_precision = before


@contextmanager
def deterministic(fill: bool = False) -> Iterator[None]:
    """PyTorch's deterministic mode; with `fill` it fills what `torch.empty` returns with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def outputs_of(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What it returns, as a list."""
    outputs = function(*inputs)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def results(function: Function, inputs: Sequence[Tensor], grads: Sequence[Tensor] | None) -> list[Tensor]:
    """The outputs and the gradient of every input, for these gradients of the outputs (None: no backward).

    The inputs themselves become leaves, so that whoever wrote them, and when, is seen. Nothing waits for the GPU.
    """
    if grads is None:
        return outputs_of(function, inputs)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = outputs_of(function, leaves)
    taken = [grad.to(output.dtype) for output, grad in zip(outputs, grads, strict=True)]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, taken)]


def output_grads(call: Call, dtype: torch.dtype) -> list[Tensor] | None:
    """Random gradients of the call's outputs, which `dtype` represents exactly."""
    if not call.backward:
        return None
    with torch.no_grad():
        outputs = outputs_of(call.operator, call.inputs(dtype))
    torch.manual_seed(SEED)
    return [torch.randn(output.shape, device=output.device).to(dtype) for output in outputs]


def run(call: Call, dtype: torch.dtype) -> list[Tensor]:
    """The operator's results in `dtype`; dropout is the same in every run."""
    grads = output_grads(call, dtype)
    torch.manual_seed(SEED)
    return results(call.operator, call.inputs(dtype), grads)


def judge(call: Call, name: str) -> None:
    """The call in the precision `name` obeys the rule of accuracy.

    In float32 a sum of n numbers, added in another order than PyTorch's, errs by about sqrt(n) roundings, and an
    exponential by those of its exponent; in 16 bits the rounding of the result hides both, with tf32 that of operands.
    """
    with precision(name) as dtype:
        grads, inputs = output_grads(call, dtype), call.inputs(dtype)
        torch.manual_seed(SEED)
        actual = results(call.operator, inputs, grads)
        pytorch = results(call.pytorch or call.exact, inputs, grads)
        exact = results(call.exact, [tensor.double() for tensor in inputs], grads)
    longest = max(max(tensor.shape, default=1) for tensor in inputs)
    units = longest**0.5 + call.exponent if dtype == torch.float32 else 1.0
    for number, (a, p, e) in enumerate(zip(actual, pytorch, exact, strict=True)):
        assert_within(f"result {number}", a, p, e, unit_of(name, a.dtype, units))


def unit_of(name: str, dtype: torch.dtype, units: float) -> float:
    """`units` roundings of a result's dtype in the precision `name`, in roundings of that dtype."""
    if name != "tf32":
        return units
    return max(units, _TF32_ROUNDING / torch.finfo(dtype).eps)


def assert_within(name: str, actual: Tensor, pytorch: Tensor, exact: Tensor, units: float) -> None:
    """The rule of accuracy, with infinities where the reference has them."""
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(actual), finite), f"{name}: infinities or NaN where the reference has none"
    magnitude = max(1.0, exact[finite].abs().max().item()) if finite.any() else 1.0
    pytorch = pytorch.to(actual.dtype)
    if not finite.all():
        actual, pytorch, exact = actual[finite], pytorch[finite], exact[finite]
    assert_as_accurate(name, actual, pytorch, exact, scale=magnitude * units)


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], exactly: bool = False) -> None:
    """Two runs of a call in bfloat16 give the same: bit by bit, or but for the order of atomic additions.

    The additions are float32's: another order changes a result by less than a rounding of bfloat16 at its largest
    magnitude.
    """
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(torch.isfinite(a), torch.isfinite(e)), f"result {number}: infinities or NaN differ"
        if exactly:
            assert torch.equal(a, e), f"result {number}: not the same bits"
        else:
            a, e = a.float().nan_to_num(0.0, 0.0, 0.0), e.float().nan_to_num(0.0, 0.0, 0.0)
            allowed = torch.finfo(torch.bfloat16).eps * max(1.0, e.abs().max().item())
            error = (a - e).abs().max().item()
            assert error <= allowed, f"result {number}: differs by {error:.3e}, allowed {allowed:.3e}"
