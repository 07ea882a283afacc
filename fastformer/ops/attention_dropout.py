"""Attention dropout's random numbers, regenerated anywhere: Philox-4x32-10 as a pure function of the position.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The four words drawn for one counter serve four
neighbouring keys. The Triton kernels draw the same words.
"""

from __future__ import annotations

import torch

from fastformer.ops.dropout import dropout_threshold, philox


def dropout_keep(
    seed: int, offset: int, dropout_p: float, rows: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Which attention weights dropout keeps.

    Args:
        seed, offset: the two words of the generator's state.
        dropout_p: probability that a weight is dropped.
        rows: (r,) int64, batch index * heads + head.
        queries: (m,) int64 positions within the sequence.
        keys: (n,) int64 positions within the sequence.

    Returns:
        (r, m, n) boolean, True where the weight is kept.
    """
    counters = (keys // 4, queries[:, None], rows[:, None, None], torch.tensor(offset & 0xFFFFFFFF, device=keys.device))
    words = torch.stack(torch.broadcast_tensors(*philox(seed, counters)), dim=-1)
    lane = (keys % 4).expand(words.shape[:-1])[..., None]
    return words.gather(-1, lane).squeeze(-1) >= dropout_threshold(dropout_p)
