"""Tensors that are made while tests are collected, when no test's device is chosen yet."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch.utils._pytree import tree_map_only

Value = TypeVar("Value")


def here(value: Value) -> Value:
    """`value`, a structure, with its tensors moved to where the running test makes its own."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(torch.get_default_device()), value)
