"""Argument checks shared by the operators. Each error names the argument, what was given and what is accepted."""

from __future__ import annotations

from collections.abc import Iterable

import torch

FLOATING_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError unless `tensor` is float32, float16 or bfloat16."""
    if tensor.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16; got {tensor.dtype}")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has exactly `shape`."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(tensor.shape)}")


def check_like(name: str, tensor: torch.Tensor, reference_name: str, reference: torch.Tensor) -> None:
    """Raise unless `tensor` has the dtype (TypeError) and the device (ValueError) of `reference`."""
    if tensor.dtype != reference.dtype:
        raise TypeError(f"{name} must have {reference_name}'s dtype, {reference.dtype}; got {tensor.dtype}")
    check_device(name, tensor, reference_name, reference)


def check_device(name: str, tensor: torch.Tensor, reference_name: str, reference: torch.Tensor) -> None:
    """Raise ValueError unless `tensor` is on the device of `reference`."""
    if tensor.device != reference.device:
        raise ValueError(f"{name} must be on {reference_name}'s device, {reference.device}; got {tensor.device}")


def check_int32(name: str, tensor: torch.Tensor, shape: tuple[int, ...], like_name: str, like: torch.Tensor) -> None:
    """Raise unless `tensor` is int32 (TypeError), of `shape` and on the device of `like` (ValueError)."""
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} must be int32; got {tensor.dtype}")
    check_shape(name, tensor, shape)
    check_device(name, tensor, like_name, like)


def check_no_gradient(operator: str, tensors: Iterable[torch.Tensor | None], instead: str) -> None:
    """Raise RuntimeError if autograd would expect a gradient of an operator that has none."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError(f"{operator} has no gradient: call it under torch.no_grad(), or {instead}")


def check_lengths(name: str, lengths: torch.Tensor, limit_name: str, limit: int) -> None:
    """Raise ValueError unless `lengths` on a CPU lie in [0, limit]; reading them would stall a GPU, whose kernels
    assert it."""
    if lengths.is_cpu:
        check_counts(name, lengths.tolist(), limit_name, limit)


def check_counts(name: str, values: list[int], limit_name: str, limit: int) -> None:
    """Raise ValueError unless all `values` lie in [0, limit]."""
    if values and not (min(values) >= 0 and max(values) <= limit):
        raise ValueError(f"{name} must be from 0 to {limit_name}, {limit}; got {values}")
