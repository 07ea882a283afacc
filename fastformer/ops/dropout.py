"""Dropout of a matrix's elements, regenerated anywhere: Philox-4x32-10 as a pure function of row and column.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The four words drawn for one counter serve four
neighbouring columns. The Triton kernels draw the same words.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

Counters = tuple[Tensor, Tensor, Tensor, Tensor]

_WORD = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_FACTOR_A, _FACTOR_B = np.uint64(_ROUND_A), np.uint64(_ROUND_B)
_LOW, _HALF = np.uint64(_WORD), np.uint64(32)
# Counters that a CPU core draws together: few enough that every intermediate stays in its cache.
_CHUNK = 16384
# And counters of one call, whose mask is held at once.
_CALL = 64 * _CHUNK
_whole = slice(None)


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
    step = max(1, _CALL // max(1, counters.shape[0]))
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
    return torch.from_numpy(_below_on_cpu(threshold, int(seed), counters)).flatten(-2)


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


def _below_on_cpu(threshold: int, seed: int, counters: Counters) -> np.ndarray:
    """(..., n, 4) boolean: which words are below the threshold, drawn a chunk at a time by all of PyTorch's threads."""
    shape = torch.broadcast_shapes(*(counter.shape for counter in counters))
    arrays = [
        counter.numpy().astype(np.uint64).reshape((1,) * (len(shape) - counter.ndim) + counter.shape)
        for counter in counters
    ]
    below = np.empty((*shape, 4), dtype=np.bool_)

    def draw(chunk: tuple[slice, ...]) -> None:
        cut = (
            array[tuple(_whole if n == 1 else part for part, n in zip(chunk, array.shape, strict=True))]
            for array in arrays
        )
        for place, word in enumerate(_philox_on_cpu(seed, *cut)):
            np.less(word, np.uint64(threshold), out=below[chunk][..., place])

    chunks = list(_chunks(shape))
    threads = min(torch.get_num_threads(), len(chunks))
    if threads > 1:
        list(_pool(threads).map(draw, chunks))
    else:
        for chunk in chunks:
            draw(chunk)
    return below


def _chunks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Parts of an array, each of at most `_CHUNK` elements, as long as they can be along the last dimensions."""
    ranges, left = [], _CHUNK
    for size in reversed(shape):
        step = max(1, min(size, left))
        ranges.append([slice(start, start + step) for start in range(0, size, step)])
        left //= step
    return product(*reversed(ranges))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="dropout")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # the threads stay with the parent


def _philox_on_cpu(
    seed: int, c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`philox` in NumPy's unsigned integers, several times as fast as in PyTorch's signed ones.

    A counter stays as small as it is, to be broadcast, until a round mixes it with the others; from then on all happens
    in place.
    """
    keys = [(np.uint64(seed + i * _KEY_A & _WORD), np.uint64((seed >> 32) + i * _KEY_B & _WORD)) for i in range(10)]
    for k0, k1 in keys[:3]:
        product_a, product_b = c0 * _FACTOR_A, c2 * _FACTOR_B
        c0, c2 = (product_b >> _HALF) ^ (c1 ^ k0), (product_a >> _HALF) ^ (c3 ^ k1)
        c1, c3 = product_b & _LOW, product_a & _LOW
    shape = np.broadcast_shapes(c0.shape, c1.shape, c2.shape, c3.shape)
    c0, c1, c2, c3 = (each if each.shape == shape else np.broadcast_to(each, shape).copy() for each in (c0, c1, c2, c3))
    product_a, product_b = np.empty(shape, np.uint64), np.empty(shape, np.uint64)
    for k0, k1 in keys[3:]:
        np.multiply(c0, _FACTOR_A, out=product_a)
        np.multiply(c2, _FACTOR_B, out=product_b)
        for word, produced, other, key in ((c0, product_b, c1, k0), (c2, product_a, c3, k1)):
            np.right_shift(produced, _HALF, out=word)
            word ^= other
            word ^= key
            np.bitwise_and(produced, _LOW, out=other)
    return c0, c1, c2, c3
