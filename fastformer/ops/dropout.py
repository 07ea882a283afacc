"""Dropout of a matrix's elements: Philox-4x32-10 as a pure function of row and column.

The mask can be drawn again anywhere, such as in the backward.
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The four words drawn for one counter serve four
neighbouring columns. The Triton kernels draw the same words.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fastformer_kernels.dropout_numbers import dropout_threshold, kept_scale
from torch import Tensor

from fastformer.backends import use_triton
from fastformer.ops.operator import operator

Counters = tuple[Tensor, Tensor, Tensor, Tensor]

_WORD = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_FACTOR_A, _FACTOR_B = np.array(_ROUND_A, np.uint64), np.array(_ROUND_B, np.uint64)
# The numbers added to the key's two words before each round.
_KEY_STEPS = np.arange(10, dtype=np.uint64)[:, None] * np.array([_KEY_A, _KEY_B], np.uint64)
_LOW, _HALF = np.array(_WORD, np.uint64), np.array(32, np.uint64)
# The number of counters that a CPU core handles together: few enough that all intermediates stay in its cache.
_CHUNK = 16384
# The number of counters in one call, whose whole mask is held at once.
_CALL = 64 * _CHUNK
_whole = slice(None)


def check_dropout_p(dropout_p: float, name: str = "dropout_p") -> None:
    """Raise ValueError with the argument's name unless `dropout_p` is a probability."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{name} must be in [0, 1]; got {dropout_p}")


def draw_seed(device: torch.device) -> Tensor:
    """Draw a seed and offset from PyTorch's generator, on the device: no synchronisation, capturable in a graph."""
    return torch.randint(0, 2**63 - 1, (2,), device=device, dtype=torch.int64)


def seed_words(seed: Tensor) -> list[int]:
    """Read the seed and the offset that `draw_seed` returned, even if transforms of `torch.func` have wrapped them."""
    while torch._C._functorch.is_functorch_wrapped_tensor(seed):
        seed = torch._C._functorch.get_unwrapped(seed)
    if seed.dim() != 1:
        raise NotImplementedError("dropout in forward mode needs one mask for a whole vmap: pass randomness='same'")
    return seed.tolist()


def kernel_dropout(seed: Tensor | None, dropout_p: float) -> Any:
    """Return dropout as the kernels of rows take it, their `Dropout`; None without a seed, which drops nothing."""
    if seed is None:
        return None
    from fastformer_kernels.dropout import Dropout

    return Dropout(seed, dropout_threshold(dropout_p), kept_scale(dropout_p))


def apply_dropout_(input: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """Drop elements of floating `input` (rows, columns) in place and scale the kept ones by ``1 / (1 - dropout_p)``.

    Args:
        seed: (2,) int64, seed and offset.
        dropout_p: probability that an element is dropped.
    """
    rows, columns = input.shape
    groups = (columns + 3) // 4
    step = max(1, _CALL // max(1, groups))
    for start in range(0, rows, step):
        chunk = input[start : start + step]
        dropped = _dropped_rows(start, chunk.shape[0], groups, seed, dropout_p)
        chunk.masked_fill_(dropped[:, :columns], 0.0)
        chunk.mul_(kept_scale(dropout_p))
    return input


def dropped(input: Tensor, seed: Tensor, dropout_p: float) -> Tensor:
    """Return what `apply_dropout_` makes of the rows of `input` (..., columns), by differentiable functions.

    A compiler sees one operator that draws the mask, and fuses the rest with its neighbours.
    """
    columns, rows = input.shape[-1], input[..., 0].numel()
    if torch.compiler.is_compiling():
        places = torch.arange(8, dtype=torch.uint8, device=input.device)
        absent = ((_dropout_flags(seed, rows, columns, dropout_p)[..., None] >> places) & 1).bool().flatten(-2)
    else:
        absent = _dropped_rows(0, rows, (columns + 3) // 4, seed, dropout_p)
    return input.masked_fill(absent[:, :columns].view(input.shape), 0.0) * kept_scale(dropout_p)


@operator("fastformer::dropout_flags")
def _dropout_flags(seed: Tensor, rows: int, columns: int, dropout_p: float) -> Tensor:
    """The elements of a matrix that are dropped, (rows, columns / 8 rounded up) uint8, each byte's lowest bit first.

    The compiler keeps these bits for the backward. It would take long to compile the generator's integer arithmetic.
    """
    groups = (columns + 3) // 4
    if seed.is_cpu and not use_triton(seed):
        step = max(1, _CALL // max(1, groups))
        packed = np.empty((rows, (columns + 7) // 8), np.uint8)
        for start in range(0, rows, step):
            flags = _dropped_rows(start, min(step, rows - start), groups, seed, dropout_p)
            packed[start : start + step] = np.packbits(flags.numpy(), axis=-1, bitorder="little")
        return torch.from_numpy(packed)
    if use_triton(seed) and rows * columns:
        from fastformer_kernels.dropout import Dropout
        from fastformer_kernels.feed_forward import apply_dropout

        ones = torch.ones((), device=seed.device).expand(rows, columns)
        flags = apply_dropout(ones, Dropout(seed, dropout_threshold(dropout_p), 1.0), torch.uint8) ^ 1
    else:
        flags = _dropped_rows(0, rows, groups, seed, dropout_p).to(torch.uint8)
    flags = F.pad(flags, (0, -flags.shape[1] % 8)).view(rows, (columns + 7) // 8, 8)
    return (flags << torch.arange(8, dtype=torch.uint8, device=seed.device)).sum(-1, dtype=torch.uint8)


@_dropout_flags.register_fake
def _(seed: Tensor, rows: int, columns: int, dropout_p: float) -> Tensor:
    return seed.new_empty(rows, (columns + 7) // 8, dtype=torch.uint8)


def _dropped_rows(first: int, rows: int, groups: int, seed: Tensor, dropout_p: float) -> Tensor:
    """Return the elements of rows from `first` on that are dropped, (rows, 4 * groups) boolean on the seed's device."""
    if not seed.is_cpu:
        row = torch.arange(first, first + rows, device=seed.device)[:, None]
        counters = (torch.arange(groups, device=seed.device), row & _WORD, row >> 32, seed[1] & _WORD)
        return words_below(dropout_p, seed[0], counters)
    key, offset = seed_words(seed)
    numbers = np.arange(first, first + rows, dtype=np.uint64)[:, None]
    arrays = [np.arange(groups, dtype=np.uint64)[None], numbers & _LOW, numbers >> _HALF, np.array([[offset & _WORD]])]
    return torch.from_numpy(_below_on_cpu(dropout_threshold(dropout_p), key, arrays)).flatten(-2)


def words_below(dropout_p: float, seed: Tensor | int, counters: Counters) -> Tensor:
    """Tell which of the four words of each counter are below dropout's threshold.

    Args:
        dropout_p: the probability of dropping an element.
        seed: the generator's seed.
        counters: four int64 tensors that broadcast to (..., n).

    Returns:
        (..., 4 * n) boolean.
    """
    threshold = dropout_threshold(dropout_p)
    if not counters[0].is_cpu:
        below = [word < threshold for word in philox(seed, counters)]
        return torch.stack(torch.broadcast_tensors(*below), dim=-1).flatten(-2)
    dimensions = max(counter.dim() for counter in counters)
    arrays = [counter[(None,) * (dimensions - counter.dim())].numpy() for counter in counters]
    return torch.from_numpy(_below_on_cpu(threshold, int(seed), arrays)).flatten(-2)


def philox(seed: Tensor | int, counters: Counters) -> Counters:
    """The four 32-bit words of Philox-4x32-10 for each counter, in int64."""
    c0, c1, c2, c3 = counters
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # int64 products wrap modulo 2**64, which leaves both 32-bit halves intact. Factors are cut to 32 bits, and what
        # is only mixed in is cut with the result.
        product_a, product_b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c2 = ((product_b >> 32) ^ c1 ^ k0) & _WORD, ((product_a >> 32) ^ c3 ^ k1) & _WORD
        c1, c3 = product_b, product_a
        k0, k1 = k0 + _KEY_A, k1 + _KEY_B
    return c0, c1 & _WORD, c2, c3 & _WORD


def _below_on_cpu(threshold: int, seed: int, counters: list[np.ndarray]) -> np.ndarray:
    """Draw which words are below the threshold, (..., n, 4) boolean, in chunks by all of PyTorch's threads.

    All counters have the same number of dimensions.
    """
    shape = np.broadcast(*counters).shape
    arrays = [counter.astype(np.uint64, copy=False) for counter in counters]
    below = np.empty((*shape, 4), dtype=np.bool_)

    def draw(chunk: tuple[slice, ...]) -> None:
        cut = (
            array[tuple(_whole if n == 1 else part for part, n in zip(chunk, array.shape, strict=True))]
            for array in arrays
        )
        _write_below(np.uint64(threshold), _philox_on_cpu(seed, *cut), below[chunk])

    if below.size <= 4 * _CHUNK:
        _write_below(np.uint64(threshold), _philox_on_cpu(seed, *arrays), below)
        return below
    chunks = list(_chunks(shape))
    threads = min(torch.get_num_threads(), len(chunks))
    if threads > 1:
        list(_pool(threads).map(draw, chunks))
    else:
        for chunk in chunks:
            draw(chunk)
    return below


def _write_below(threshold: np.uint64, words: tuple[np.ndarray, ...], below: np.ndarray) -> None:
    for place, word in enumerate(words):
        np.less(word, threshold, out=below[..., place])


def _chunks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Split an array into parts of at most `_CHUNK` elements, as long as possible along the last dimensions."""
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
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process does not inherit the threads


def _philox_on_cpu(
    seed: int, c0: np.ndarray, c1: np.ndarray, c2: np.ndarray, c3: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Compute `philox` in NumPy's unsigned integers, several times as fast as in PyTorch's signed ones.

    Counters broadcast: each stays small until a round mixes it with the others. From then on all operations are in
    place, mostly on two words at once.
    """
    words = (np.array([seed & _WORD, seed >> 32 & _WORD], np.uint64) + _KEY_STEPS) & _LOW
    # Arrays instead of numbers, since NumPy uses arrays without conversion.
    keys = [(words[i, 0, ...], words[i, 1, ...]) for i in range(10)]
    for k0, k1 in keys[:3]:
        product_a, product_b = c0 * _FACTOR_A, c2 * _FACTOR_B
        c0, c2 = (product_b >> _HALF) ^ (c1 ^ k0), (product_a >> _HALF) ^ (c3 ^ k1)
        c1, c3 = product_b & _LOW, product_a & _LOW
    shape = np.broadcast(c0, c1, c2, c3).shape
    even, odd, products = np.empty((3, 2, *shape), np.uint64)
    even[0], odd[0], even[1], odd[1] = c0, c1, c2, c3
    (c0, c2), (product_b, product_a) = even, products
    for k0, k1 in keys[3:]:
        np.multiply(c0, _FACTOR_A, out=product_a)
        np.multiply(c2, _FACTOR_B, out=product_b)
        np.right_shift(products, _HALF, out=even)
        even ^= odd
        c0 ^= k0
        c2 ^= k1
        np.bitwise_and(products, _LOW, out=odd)
    return c0, odd[0], c2, odd[1]
