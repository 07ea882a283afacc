"""Dropout of the elements of a matrix, drawn from a counter, so that the backward draws the same mask again.

The mask is a function of (seed, offset, stream, row, column) alone, the same as the Triton kernels': Philox-4x32-10
(Salmon et al., SC 2011) of (column // 4, row, stream, offset), whose four words serve four neighbouring columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer.ops.attention_dropout import dropout_threshold, philox

# Elements whose 64-bit words are in the cache together.
_CACHED_ELEMENTS = 1 << 17


def check_probability(name: str, probability: float) -> None:
    """Raise ValueError unless `probability` is in [0, 1)."""
    if not 0.0 <= probability < 1.0:
        raise ValueError(f"{name} must be in [0, 1); got {probability}")


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed and offset, (2,) int64, from PyTorch's generator: no synchronisation, capturable in a graph."""
    return torch.randint(0, 2**63 - 1, (2,), device=device, dtype=torch.int64)


def drop_(matrix: Tensor, probability: float, seed: Tensor, stream: int) -> Tensor:
    """Drop elements of `matrix` (rows, columns) in place, and scale the others by ``1 / (1 - probability)``.

    Args:
        seed: as `draw_seed` returns it.
        stream: tells apart the dropouts that share a seed.
    """
    rows, columns = matrix.shape
    step = max(1, _CACHED_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        chunk = matrix[start : start + step]
        chunk.masked_fill_(~_keep(start, chunk.shape, probability, seed, stream), 0.0)
    return matrix.mul_(1.0 / (1.0 - probability))


def _keep(first_row: int, shape: torch.Size, probability: float, seed: Tensor, stream: int) -> Tensor:
    rows, columns = shape
    group = torch.arange((columns + 3) // 4, device=seed.device)
    row = torch.arange(first_row, first_row + rows, device=seed.device)[:, None]
    counters = (group, row, torch.full_like(group[:1], stream), seed[1] & 0xFFFFFFFF)
    words = torch.stack(torch.broadcast_tensors(*philox(seed[0], counters)), dim=-1)
    return words.view(rows, -1)[:, :columns] >= dropout_threshold(probability)
