"""Tensors made on the host, on their way to the device that generates."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`. A GPU is not waited for: it copies from pinned memory when it comes to that."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
