"""`torch.nn.functional`, with Fastformer's operators for all functions that have one with PyTorch's arguments.

Every other name is PyTorch's own.
"""

from typing import Any

import torch

from fastformer.ops.attention.scaled_dot_product_attention import scaled_dot_product_attention
from fastformer.ops.cross_entropy import cross_entropy
from fastformer.ops.normalization import layer_norm, rms_norm

__all__ = ["cross_entropy", "layer_norm", "rms_norm", "scaled_dot_product_attention"]


def __getattr__(name: str) -> Any:
    return getattr(torch.nn.functional, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(torch.nn.functional)})
