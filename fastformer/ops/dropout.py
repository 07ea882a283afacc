"""Dropout of a matrix's elements, regenerated anywhere: Philox-4x32-10 as a pure function of row and column.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The four words drawn for one counter serve four
neighbouring columns. The Triton kernels draw the same words.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Counters = tuple[Tensor, Tensor, Tensor, Tensor]

_WORD = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
# Counters drawn together: few enough that every intermediate stays in a CPU core's cache.
_CHUNK = 16384


def check_dropout_p(dropout_p: float, name: str = "dropout_p") -> None:
    """Raise ValueError, naming the argument, unless `dropout_p` is a probability below one."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{name} must be in [0, 1); got {dropout_p}")


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed and offset from PyTorch's generator, on the device: no synchronisation, capturable in a graph."""
    return torch.randint(0, 2**63 - 1, (2,), device=device, dtype=torch.int64)


def dropout_threshold(dropout_p: float) -> int:
    """The 32-bit word below which an element is dropped."""
    return min(round(dropout_p * 2**32), _WORD)


def apply_dropout_(input: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """Drop elements of `input` (rows, columns), floating, in place, and scale those kept by ``1 / (1 - dropout_p)``.

    Args:
        seed: (2,) int64, seed and offset.
        dropout_p: probability that an element is dropped.
    """
    rows, columns = input.shape
    counters = torch.arange((columns + 3) // 4, device=input.device)
    step = max(1, _CHUNK // max(1, counters.shape[0]))
    for start in range(0, rows, step):
        chunk = input[start : start + step]
        row = torch.arange(start, start + chunk.shape[0], device=input.device)[:, None]
        drawn = words_below(dropout_p, seed[0], (counters, row & _WORD, row >> 32, seed[1] & _WORD))
        chunk.masked_fill_(drawn[:, :columns], 0.0)
        chunk.mul_(1.0 / (1.0 - dropout_p))
    return input


def words_below(dropout_p: float, seed: Tensor | int, counters: Counters) -> Tensor:
    """Which of the four words of each counter are below dropout's threshold.

    Args:
        dropout_p: the probability.
        seed: the generator's.
        counters: four int64 tensors that broadcast to (..., n).

    Returns:
        (..., 4 * n) boolean.
    """
    threshold = dropout_threshold(dropout_p)
    if counters[0].device.type != "cpu":
        below = [word < threshold for word in philox(seed, counters)]
        return torch.stack(torch.broadcast_tensors(*below), dim=-1).flatten(-2)
    words = _philox_on_cpu(int(seed), counters)
    return torch.from_numpy(np.stack([word < threshold for word in words], axis=-1)).flatten(-2)


def philox(seed: Tensor | int, counters: Counters) -> Counters:
    """The four 32-bit words of Philox-4x32-10 for each counter, in int64."""
    c0, c1, c2, c3 = counters
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # int64 products wrap modulo 2**64, which leaves both 32-bit halves intact.
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c2 = ((product_b >> 32) & _WORD) ^ c1 ^ k0, ((product_a >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = product_b & _WORD, product_a & _WORD
        k0, k1 = (k0 + _KEY_A) & _WORD, (k1 + _KEY_B) & _WORD
    return c0, c1, c2, c3


def _philox_on_cpu(seed: int, counters: Counters) -> list[np.ndarray]:
    """`philox` in NumPy's unsigned integers and in place, several times as fast as in PyTorch's signed ones."""
    c0, c1, c2, c3 = (
        each.astype(np.uint64, order="C") for each in np.broadcast_arrays(*(counter.numpy() for counter in counters))
    )
    product_a, product_b = np.empty_like(c0), np.empty_like(c0)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        np.multiply(c0, np.uint64(_ROUND_A), out=product_a)
        np.multiply(c2, np.uint64(_ROUND_B), out=product_b)
        for word, product, other, key in ((c0, product_b, c1, k0), (c2, product_a, c3, k1)):
            np.right_shift(product, np.uint64(32), out=word)
            word ^= other
            word ^= np.uint64(key)
            np.bitwise_and(product, np.uint64(_WORD), out=other)
        k0, k1 = (k0 + _KEY_A) & _WORD, (k1 + _KEY_B) & _WORD
    return [c0, c1, c2, c3]
