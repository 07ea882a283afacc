"""Argument checks shared by the operators. Each error names the argument, what was given and what is accepted."""

from __future__ import annotations

import torch

FLOATING_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """Raise TypeError unless `tensor` is float32, float16 or bfloat16."""
    if tensor.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16; got {tensor.dtype}")


def check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has exactly `shape`."""
    if tuple(tensor.shape) != tuple(shape):
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
