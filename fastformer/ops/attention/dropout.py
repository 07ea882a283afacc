"""The random numbers of attention dropout: Philox-4x32-10 as a pure function of the position.

The numbers can be drawn again anywhere, such as in the backward.
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The four words drawn for one counter serve four
neighbouring keys. The Triton kernels draw the same words.
"""

from __future__ import annotations

import torch

from fastformer.ops.dropout import words_below


def dropout_keep(
    seed: int, offset: int, dropout_p: float, rows: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """Return which attention weights dropout keeps.

    Args:
        seed, offset: the two words of the generator's state.
        dropout_p: probability that a weight is dropped.
        rows: (r,) int64, batch index * heads + head.
        queries: (m,) int64 positions within the sequence.
        keys: (n,) int64 positions within the sequence, consecutive.

    Returns:
        (r, m, n) boolean, True where the weight is kept.
    """
    if keys.shape[0] == 0:
        return torch.ones(rows.shape[0], queries.shape[0], 0, dtype=torch.bool, device=keys.device)
    first, last = int(keys[0]), int(keys[-1])
    groups = torch.arange(first // 4, last // 4 + 1, device=keys.device)
    counters = (groups, queries[:, None], rows[:, None, None], torch.tensor(offset & 0xFFFFFFFF, device=keys.device))
    return ~words_below(dropout_p, seed, counters)[..., first % 4 : first % 4 + keys.shape[0]]
