"""Weights that are no numbers: what would be made of them is nothing, so they are refused by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def finite(name: str, tensor: Tensor) -> Tensor:
    """`tensor`, of that name.

    Raises:
        ValueError: it has elements that are infinite or no numbers.
    """
    if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"the weights {name} have elements that are infinite or no numbers (NaN)")
    return tensor


def check_finite_weights(model: nn.Module) -> None:
    """Raises ValueError for the first of the model's parameters that is not finite."""
    for name, parameter in model.named_parameters():
        finite(name, parameter.detach())
