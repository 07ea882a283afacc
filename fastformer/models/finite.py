"""Checks that refuse weights that are infinite or not a number (NaN), with an error that names them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def finite(name: str, tensor: Tensor) -> Tensor:
    """Return `tensor`, whose name is `name`.

    Raises:
        ValueError: it has elements that are infinite or not a number.
    """
    if first_not_finite({name: tensor}) is not None:
        raise ValueError(f"the weights {name} have elements that are infinite or not a number (NaN)")
    return tensor


def check_finite_weights(model: nn.Module) -> None:
    """Raise ValueError for the first of the model's parameters that is not finite."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    name = first_not_finite(parameters)
    if name is not None:
        finite(name, parameters[name])


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with elements that are infinite or not a number; None if there is none.

    This waits once for each device that has tensors. A tensor on meta, which has no data, counts as finite.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            by_device[tensor.device][name] = tensor.isfinite().all()
    fine: dict[str, bool] = {}
    for found in by_device.values():
        fine.update(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
    return next((name for name in tensors if not fine.get(name, True)), None)
