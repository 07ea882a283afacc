"""The call of PyTorch's scaled_dot_product_attention, SDPA, that computes what a mask's structure says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastformer.integrations.attention.mask import MaskStructure

_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Sdpa(NamedTuple):
    """PyTorch's scaled_dot_product_attention, with this mask and `is_causal`, by cuDNN where it can if `cudnn`."""

    mask: Tensor | None
    causal: bool
    cudnn: bool = False


def sdpa_backends(cudnn: bool) -> AbstractContextManager[None]:
    """Let SDPA try cuDNN first within the `with` block, if `cudnn`; else PyTorch's own choice holds."""
    return sdpa_kernel(_CUDNN_FIRST, set_priority=True) if cudnn else nullcontext()


def sdpa_call(structure: MaskStructure, m: int, n: int) -> Sdpa | None:
    """Return the mask, (batch, 1, 1, n), and `is_causal` with which SDPA computes `structure`; None if it cannot."""
    last_query = m == 1 and structure.causal and (structure.alignment == "bottom_right" or n == 1)
    if structure.ignores_positions or (last_query and _unlimited(structure)):
        return Sdpa(_key_mask(structure, n), False)
    return Sdpa(None, True) if only_causal(structure, m, n) else None


def only_causal(structure: MaskStructure, m: int, n: int) -> bool:
    """Whether causality is all that hides any of n keys from any of m queries."""
    keys = structure.key_mask is None and structure.key_lengths is None
    return keys and structure.causal and _unlimited(structure) and m == n


def _unlimited(structure: MaskStructure) -> bool:
    return structure.window == (None, None) and structure.chunk is None


def _key_mask(structure: MaskStructure, n: int) -> Tensor | None:
    lengths = structure.key_lengths
    if lengths is None:
        return structure.key_mask
    mask = (torch.arange(n) < lengths[:, None])[:, None, None]
    return mask if structure.key_mask is None else mask & structure.key_mask
