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

# tf32 is float32 with products of 10 bits of mantissa, a switch of PyTorch's that the kernels obey.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
# Tensor cores truncate operands where cuBLAS rounds them: the terms of a product are too small by 0.7 of a unit on
# average. The result of two products in a row is then too small by less than two units.
_TF32_ROUNDING = 2 * 2.0**-10


@dataclass(frozen=True)
class Call:
    """A call of an operator, with its reference.

    Attributes:
        operator: the operator as a function of the tensors alone.
        exact: the reference, which gets the same tensors in float64.
        tensors: the tensors in float32, which a test converts to its dtype.
        float32: tensors that stay float32, after the others.
        pytorch: PyTorch's own computation in a lower dtype; None means `exact` in that dtype.
        backward: whether the tensors have gradients.
        exponent: the largest number that is exponentiated. The relative error of an exponential in float32 is the
            rounding of its exponent, which is this number of units.
        random: whether the call draws from PyTorch's generator.
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
        """Return the tensors for a call in `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return [*(tensor.to(dtype) for tensor in self.tensors), *(tensor.to(wide) for tensor in self.float32)]


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """Set PyTorch's switch for products of float32 to the precision `name` of `DTYPES`, and yield its dtype."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32" if name == "tf32" else "ieee"
    try:
        yield DTYPES[name]
    finally:
        switch.fp32_precision = before


@contextmanager
def deterministic(fill: bool = False) -> Iterator[None]:
    """Use PyTorch's deterministic mode; with `fill`, `torch.empty` then returns memory full of NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def outputs_of(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Call the function and return its outputs as a list."""
    outputs = function(*inputs)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def results(function: Function, inputs: Sequence[Tensor], grads: Sequence[Tensor] | None) -> list[Tensor]:
    """Return the outputs and the gradient of every input, for these gradients of the outputs (None: no backward).

    The leaves are views of the inputs, not copies: kernels read the memory itself. Nothing waits for the GPU.
    """
    if grads is None:
        return outputs_of(function, inputs)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = outputs_of(function, leaves)
    taken = [grad.to(output.dtype) for output, grad in zip(outputs, grads, strict=True)]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, taken)]


def output_grads(call: Call, dtype: torch.dtype) -> list[Tensor] | None:
    """Return random gradients of the call's outputs, which `dtype` represents exactly."""
    if not call.backward:
        return None
    with torch.no_grad():
        outputs = outputs_of(call.operator, call.inputs(dtype))
    torch.manual_seed(SEED)
    return [torch.randn(output.shape, device=output.device).to(dtype) for output in outputs]


def run(call: Call, dtype: torch.dtype) -> list[Tensor]:
    """Return the operator's results in `dtype`, with the same dropout in every run."""
    grads = output_grads(call, dtype)
    torch.manual_seed(SEED)
    return results(call.operator, call.inputs(dtype), grads)


def judge(call: Call, name: str) -> None:
    """Fail unless the call obeys the rule of accuracy in the precision `name`.

    In float32 a sum of n numbers, added in another order than PyTorch's, errs by about sqrt(n) roundings, and an
    exponential by the rounding of its exponent. The rounding of the result hides both in 16 bits, and with tf32 the
    rounding of the operands does.
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
    """Return the allowed roundings of a result of `dtype`: `units`, or with tf32 its own rounding, if larger."""
    if name != "tf32":
        return units
    return max(units, _TF32_ROUNDING / torch.finfo(dtype).eps)


def assert_within(name: str, actual: Tensor, pytorch: Tensor, exact: Tensor, units: float) -> None:
    """Fail unless the rule of accuracy holds, with infinities exactly where the reference has them."""
    finite = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(actual), finite), f"{name}: infinities or NaN where the reference has none"
    magnitude = max(1.0, exact[finite].abs().max().item()) if finite.any() else 1.0
    pytorch = pytorch.to(actual.dtype)
    if not finite.all():
        actual, pytorch, exact = actual[finite], pytorch[finite], exact[finite]
    assert_as_accurate(name, actual, pytorch, exact, scale=magnitude * units)


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], exactly: bool = False) -> None:
    """Fail unless two runs of a call in bfloat16 agree, bit by bit or up to the order of atomic additions.

    The additions are in float32: another order changes a result by less than a rounding of bfloat16 at its largest
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
