"""Attention dropout's random numbers, regenerated anywhere: Philox-4x32-10 as a pure function of the position.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The four words drawn for one counter serve four
neighbouring keys. The Triton kernels draw the same words.
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


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
    counters = (keys // 4, queries[:, None], rows[:, None, None], torch.tensor(offset & _WORD, device=keys.device))
    words = torch.stack(torch.broadcast_tensors(*_philox(seed, counters)), dim=-1)
    lane = (keys % 4).expand(words.shape[:-1])[..., None]
    return words.gather(-1, lane).squeeze(-1) >= dropout_threshold(dropout_p)


def dropout_threshold(dropout_p: float) -> int:
    """The 32-bit word below which a weight is dropped."""
    return min(round(dropout_p * 2**32), _WORD)


def _philox(seed: int, counters: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    c0, c1, c2, c3 = counters
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # int64 products wrap modulo 2**64, which leaves both 32-bit halves intact.
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c2 = ((product_b >> 32) & _WORD) ^ c1 ^ k0, ((product_a >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = product_b & _WORD, product_a & _WORD
        k0, k1 = (k0 + _KEY_A) & _WORD, (k1 + _KEY_B) & _WORD
    return c0, c1, c2, c3
