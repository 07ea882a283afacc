"""Examines this machine: its devices, which backend each operator uses on them, and a self-test of the operators."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from typing import Any

import torch

from fastformer.backends import HAS_TRITON, selected_backend, use_triton
from fastformer.registry import OPERATORS, Call, Make, Operator
from fastformer.registry.operator import Function
from fastformer.version import __version__

_PACKAGES = ("torch", "triton", "transformers", "lightning", "numpy")


@dataclass(frozen=True)
class Device:
    """A device that operators can run on.

    Attributes:
        name: PyTorch's name, such as cuda:0.
        product: the name of the product.
        architecture: the architecture that decides the kernels' launch configurations; None for a CPU.
        memory_gib: memory in GiB; None for a CPU.
        backend: the backend that all operators use on the device, or "none".
        reason: the reason for the backend.
    """

    name: str
    product: str
    architecture: str | None
    memory_gib: float | None
    backend: str
    reason: str


@dataclass(frozen=True)
class SelfTest:
    """The largest error of an operator, in one dtype on one device, against float64, and the largest allowed error.

    Both are relative to the largest element of the result.
    """

    operator: str
    dtype: str
    device: str
    backend: str
    error: float | None
    allowed: float
    failure: str | None

    @property
    def passed(self) -> bool:
        return self.failure is None


def machine() -> dict[str, Any]:
    """The versions and settings that decide which code runs."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "fastformer": __version__,
        **{name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": _driver(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "settings": {
            name: os.environ[name]
            for name in ("FASTFORMER_BACKEND", "TRITON_INTERPRET", "TRITON_CACHE_DIR")
            if name in os.environ
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The version of NVIDIA's driver."""
    try:
        with open("/proc/driver/nvidia/version") as file:
            return file.readline().strip()
    except OSError:
        return None


def devices() -> list[Device]:
    """The CPU and every GPU that PyTorch sees."""
    found = [_device("cpu", platform.processor() or platform.machine(), None, None)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(_device(f"cuda:{index}", properties.name, _architecture(index), properties.total_memory / 2**30))
    return found


def _architecture(index: int) -> str:
    from fastformer_kernels.launch import architecture_of

    try:
        return architecture_of(torch.empty(0, device=f"cuda:{index}")).name
    except RuntimeError as error:
        return f"unsupported: {error}"


def _device(name: str, product: str, architecture: str | None, memory: float | None) -> Device:
    selected = selected_backend()
    try:
        backend = "triton" if use_triton(torch.empty(0, device=name)) else "torch"
    except RuntimeError as error:
        return Device(name, product, architecture, memory, "none", str(error))
    if selected != "auto":
        reason = f"backend {selected!r} is selected"
    elif name == "cpu":
        reason = "kernels need a GPU"
    else:
        reason = "kernels run on a GPU" if HAS_TRITON else "triton is not installed"
    return Device(name, product, architecture, memory, backend, reason)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The roundings that a self-test allows, by the bytes of an element.
_ROUNDINGS = {4: 128, 2: 4}


def run_test(operator: str, device: Device, dtype: torch.dtype) -> SelfTest:
    """Compare an operator's output and gradients in `dtype` on a device with float64 on the CPU, for the same inputs.

    The allowed error is a number of roundings of the result's largest element. In float32 it is 128, as for a sum of
    128 products. In 16 bits, where sums are in float32, it is 4: for the result, for the values between two products,
    and for the output that the loss squares.
    """
    tested = OPERATORS[operator]
    call = tested.inputs(Make(dtype, torch.device("cpu")))
    expected = _results(tested, tested.plain, call.double())
    rounding = _ROUNDINGS[dtype.itemsize] * torch.finfo(dtype).eps
    place = (operator, str(dtype).removeprefix("torch."), device.name, device.backend)
    try:
        actual = _results(tested, tested.ours, call.on(torch.device(device.name)))
    except Exception as cause:  # any exception is the result of the test
        return SelfTest(*place, None, rounding, f"{type(cause).__name__}: {cause}")
    error = max(map(_relative_error, actual, expected))
    # In this form of the comparison, NaN fails.
    failure = None if error <= rounding else f"error {error:.1e}, allowed {rounding:.1e}"
    return SelfTest(*place, error, rounding, failure)


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.cpu().double() - expected).abs().max() / expected.abs().max()).item()


def _results(operator: Operator, function: Function, call: Call) -> list[torch.Tensor]:
    leaves = operator.leaves(call.tensors)
    output = operator.output(function, call._replace(tensors=leaves))
    wanted = [each for each in leaves.values() if each.requires_grad]
    return [output.detach(), *(torch.autograd.grad(output.square().sum(), wanted) if wanted else ())]
