"""Examines this machine: its devices, which backend each operator uses on them, and a self-test of the operators."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import fastformer
from fastformer.backends import HAS_TRITON, selected_backend, use_triton

_PACKAGES = ("torch", "triton", "transformers", "lightning", "numpy")


@dataclass(frozen=True)
class Device:
    """A device that operators can run on.

    Attributes:
        name: PyTorch's, such as cuda:0; `product`: the maker's.
        architecture: the kernels' launch configurations are chosen for it; None for a CPU.
        backend: what every operator runs there; `reason`: why.
    """

    name: str
    product: str
    architecture: str | None
    memory_gib: float | None
    backend: str
    reason: str


@dataclass(frozen=True)
class SelfTest:
    """One operator in one dtype on one device: its largest error against float64, and the most allowed.

    Both are relative to the largest element of the result that has the error.
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
    """Versions and settings that decide what runs."""
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "fastformer": fastformer.__version__,
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


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _rows_and_weight() -> list[torch.Tensor]:
    return [_randn(33, 70), _randn(70)]


def _norm(function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    return lambda x, weight: function(x, (x.shape[-1],), weight, eps=1e-5)


def _exact_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value


def _exact_feed_forward(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x @ up.T) @ down.T


_TARGET = torch.arange(40) % 50
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# By the bytes of an element.
_ROUNDINGS = {4: 128, 2: 4}

# For each operator: the call, the same in float64, and its tensors.
TESTS: dict[str, tuple[Callable[..., Any], Callable[..., torch.Tensor], Callable[[], list[torch.Tensor]]]] = {
    "softmax": (lambda x: fastformer.softmax(x), lambda x: x.softmax(-1), lambda: [_randn(33, 70)]),
    "layer_norm": (
        _norm(fastformer.layer_norm),
        _norm(torch.nn.functional.layer_norm),
        _rows_and_weight,
    ),
    "rms_norm": (_norm(fastformer.rms_norm), _norm(torch.nn.functional.rms_norm), _rows_and_weight),
    "attention": (
        lambda q, k, v: fastformer.attention(q, k, v, causal=True),
        _exact_attention,
        lambda: [_randn(1, 2, 70, 16), _randn(1, 2, 70, 16), _randn(1, 2, 70, 16)],
    ),
    "feed_forward": (
        lambda x, up, down: fastformer.feed_forward(x, up, down),
        _exact_feed_forward,
        lambda: [_randn(40, 24), _randn(64, 24) / 5, _randn(24, 64) / 8],
    ),
    "linear_cross_entropy": (
        lambda x, weight: fastformer.linear_cross_entropy(x, weight, _TARGET.to(x.device)),
        lambda x, weight: torch.nn.functional.cross_entropy(x @ weight.T, _TARGET),
        lambda: [_randn(40, 24), _randn(50, 24)],
    ),
}


def run_test(operator: str, device: Device, dtype: torch.dtype) -> SelfTest:
    """An operator's output and gradients in `dtype` on a device, against float64 on the CPU of the same inputs.

    Allowed are so many roundings of numbers of the result's magnitude as a sum of products may have: in float32 one for
    each of 128; in 16 bits, where sums are float32's, those of the result, of what is kept between two products, and of
    the output that the loss has squared.
    """
    call, exact, make = TESTS[operator]
    tensors = [tensor.to(dtype).double() for tensor in make()]
    expected = _results(exact, tensors, "cpu", torch.float64)
    rounding = _ROUNDINGS[dtype.itemsize] * torch.finfo(dtype).eps
    place = (operator, str(dtype).removeprefix("torch."), device.name, device.backend)
    try:
        actual = _results(call, tensors, device.name, dtype)
    except Exception as cause:  # what it is, is the finding
        return SelfTest(*place, None, rounding, f"{type(cause).__name__}: {cause}")
    error = max(map(_relative_error, actual, expected))
    # Written so that NaN fails.
    failure = None if error <= rounding else f"error {error:.1e}, allowed {rounding:.1e}"
    return SelfTest(*place, error, rounding, failure)


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.cpu().double() - expected).abs().max() / expected.abs().max()).item()


def _results(
    function: Callable[..., Any], tensors: list[torch.Tensor], device: str, dtype: torch.dtype
) -> list[torch.Tensor]:
    leaves = [tensor.to(device, dtype).requires_grad_() for tensor in tensors]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]
