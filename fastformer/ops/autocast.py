"""Autocast for the operators, by PyTorch's own rules: products in the autocast dtype, reductions in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar, overload

import torch

Implementation = TypeVar("Implementation", bound=Callable)


def without_autocast(implementation: Implementation) -> Implementation:
    """Let an operator's PyTorch implementation compute in the dtypes it chooses, even if autocast is active around it.

    The operator has already cast its inputs. Autocast would cast tensors again that the implementation widened.
    """

    @functools.wraps(implementation)
    def run(first: torch.Tensor, *others, **options):
        if not torch.is_autocast_enabled(autocast_device_type(first)):
            return implementation(first, *others, **options)
        with torch.autocast(first.device.type, enabled=False):
            return implementation(first, *others, **options)

    return run  # type: ignore[return-value]


@overload
def to_autocast_dtype(tensor: torch.Tensor) -> torch.Tensor: ...
@overload
def to_autocast_dtype(tensor: None) -> None: ...
def to_autocast_dtype(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Convert a floating tensor to autocast's dtype (float16 or bfloat16) if autocast is on; else return `tensor`."""
    if tensor is None or not torch.is_autocast_enabled(autocast_device_type(tensor)) or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.get_autocast_dtype(autocast_device_type(tensor)))


@overload
def to_autocast_float32(tensor: torch.Tensor) -> torch.Tensor: ...
@overload
def to_autocast_float32(tensor: None) -> None: ...
def to_autocast_float32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Convert a floating tensor to float32 if a GPU's autocast is on; otherwise return `tensor` itself.

    PyTorch promotes softmax, norms and losses to float32 on GPUs only; its CPU autocast leaves them as they are.
    """
    if tensor is None or tensor.is_cpu or not torch.is_autocast_enabled(autocast_device_type(tensor)):
        return tensor
    return tensor.float() if tensor.is_floating_point() else tensor


def autocast_float32_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that `to_autocast_float32` gives a floating `tensor`, for an operator that converts while reading."""
    if tensor.is_cpu or not torch.is_autocast_enabled(autocast_device_type(tensor)):
        return tensor.dtype
    return torch.float32


def autocast_device_type(tensor: torch.Tensor) -> str:
    """The device type whose autocast applies to `tensor`: PyTorch has none for meta, which stands for a GPU."""
    # Reading `is_cpu` takes a tenth of the time of reading the name of the device.
    if tensor.is_cpu:
        return "cpu"
    return "cuda" if tensor.is_cuda or tensor.is_meta else tensor.device.type
