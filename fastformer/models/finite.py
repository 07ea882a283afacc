"""Weights that are no numbers: what would be made of them is nothing, so they are refused by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def finite(name: str, tensor: Tensor) -> Tensor:
    """`tensor`, of that name.

    Raises:
        ValueError: it has elements that are infinite or no numbers.
    """
    if first_not_finite({name: tensor}) is not None:
        raise ValueError(f"the weights {name} have elements that are infinite or no numbers (NaN)")
    return tensor


def check_finite_weights(model: nn.Module) -> None:
    """Raises ValueError for the first of the model's parameters that is not finite."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    name = first_not_finite(parameters)
    if name is not None:
        finite(name, parameters[name])


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that has elements that are infinite or no numbers; None if none has.

    Each device that has tensors is waited for once. A tensor on meta, which has no elements, is finite.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            by_device[tensor.device][name] = tensor.isfinite().all()
    fine: dict[str, bool] = {}
    for found in by_device.values():
        fine.update(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
    return next((name for name in tensors if not fine.get(name, True)), None)
