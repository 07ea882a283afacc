"""What the attention kernels share: where a sequence lies, which tiles a query or key tile meets, and its scores.

Scores are kept in units of log2, so that `exp2` needs no multiplication of its own. `query` and `key` are positions
within a sequence, shaped to broadcast to the tile, (M, 1) with (1, N) or (1, M) with (N, 1): both orientations share
this code.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sequence_bounds(batch, cu_seqlens_pointer, lengths_pointer, length):
    """First token (packed) and length of sequence `batch`; `length` stands where nothing says otherwise."""
    start = batch * 0
    if cu_seqlens_pointer is not None:
        start = tl.load(cu_seqlens_pointer + batch).to(tl.int64)
        length = (tl.load(cu_seqlens_pointer + batch + 1) - start).to(tl.int32)
    elif lengths_pointer is not None:
        length = tl.load(lengths_pointer + batch)
    return start, length


@triton.jit
def key_ranges(
    first,
    queries,
    keys,
    offset,
    left,
    right,
    LEFT_BOUNDED: tl.constexpr,
    RIGHT_BOUNDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The keys that the queries from `first` meet: [low, whole_low) and [whole_high, high) in tiles that need a test,
    [whole_low, whole_high) in tiles that need none."""
    last = tl.minimum(first + BLOCK_M, queries) - 1
    low = first * 0
    whole_low = low
    high = keys
    whole_high = keys
    if LEFT_BOUNDED:
        low = tl.maximum(first + offset - left, 0) // BLOCK_N * BLOCK_N
        whole_low = tl.cdiv(tl.maximum(last + offset - left, 0), BLOCK_N) * BLOCK_N
    if RIGHT_BOUNDED:
        high = tl.minimum(keys, tl.maximum(last + offset + right + 1, 0))
        whole_high = tl.minimum(keys, tl.maximum(first + offset + right + 1, 0))
    whole_low = tl.minimum(tl.maximum(whole_low, low), high)
    return low, whole_low, tl.maximum(whole_low, whole_high // BLOCK_N * BLOCK_N), high


@triton.jit
def query_ranges(
    first,
    queries,
    offset,
    left,
    right,
    LEFT_BOUNDED: tl.constexpr,
    RIGHT_BOUNDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The queries that meet the keys from `first`, split as in `key_ranges`."""
    last = first + BLOCK_N - 1
    low = first * 0
    whole_low = low
    high = queries
    whole_high = queries
    if RIGHT_BOUNDED:
        low = tl.maximum(first - offset - right, 0) // BLOCK_M * BLOCK_M
        whole_low = tl.cdiv(tl.maximum(last - offset - right, 0), BLOCK_M) * BLOCK_M
    if LEFT_BOUNDED:
        high = tl.minimum(queries, tl.maximum(last - offset + left + 1, 0))
        whole_high = tl.minimum(queries, tl.maximum(first - offset + left + 1, 0))
    whole_low = tl.minimum(tl.maximum(whole_low, low), high)
    return low, whole_low, tl.maximum(whole_low, whole_high // BLOCK_M * BLOCK_M), high


@triton.jit
def load_rows(
    pointer,
    start,
    length,
    stride_row,
    stride_dim,
    head_dim,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Rows [start, start + BLOCK) of a (length, head_dim) matrix; with CHECK, zeros beyond its end."""
    row = start + tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_D)
    pointers = pointer + row.to(tl.int64)[:, None] * stride_row + dim.to(tl.int64)[None, :] * stride_dim
    if CHECK:
        tile = tl.load(pointers, mask=(row < length)[:, None] & (dim < head_dim)[None, :], other=0.0)
    elif head_dim != BLOCK_D:
        tile = tl.load(pointers, mask=(dim < head_dim)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(
    pointer, tile, start, length, stride_row, stride_dim, head_dim, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Store rows [start, start + BLOCK) of a (length, head_dim) matrix, up to its end."""
    row = start + tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_D)
    pointers = pointer + row.to(tl.int64)[:, None] * stride_row + dim.to(tl.int64)[None, :] * stride_dim
    tl.store(pointers, tile, mask=(row < length)[:, None] & (dim < head_dim)[None, :])


@triton.jit
def tanh(x):
    """Hyperbolic tangent; near zero its series, where 1 - 2 / (exp(2x) + 1) would cancel."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(square < 0.01, series, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0))


@triton.jit
def bias_and_mask(
    scores,
    query,
    key,
    queries,
    keys,
    offset,
    left,
    right,
    slope,
    mask_pointer,
    mask_stride_m,
    mask_stride_n,
    bias_pointer,
    bias_stride_m,
    bias_stride_n,
    BORDER: tl.constexpr,
    LEFT_BOUNDED: tl.constexpr,
    RIGHT_BOUNDED: tl.constexpr,
):
    """Add ALiBi and bias to a tile of scores, and set what may not be attended to to -inf."""
    distance = key - query - offset
    inside = (query < queries) & (key < keys)
    if slope is not None:
        scores -= slope * LOG2_E * tl.abs(distance).to(tl.float32)
    if bias_pointer is not None:
        at = query.to(tl.int64) * bias_stride_m + key.to(tl.int64) * bias_stride_n
        scores += tl.load(bias_pointer + at, mask=inside, other=0.0).to(tl.float32) * LOG2_E
    if mask_pointer is not None:
        at = query.to(tl.int64) * mask_stride_m + key.to(tl.int64) * mask_stride_n
        scores = tl.where(tl.load(mask_pointer + at, mask=inside, other=0) != 0, scores, float("-inf"))
    if BORDER:
        allowed = inside
        if LEFT_BOUNDED:
            allowed = allowed & (distance >= -left)
        if RIGHT_BOUNDED:
            allowed = allowed & (distance <= right)
        scores = tl.where(allowed, scores, float("-inf"))
    return scores


@triton.jit
def dropout_keep(seed_pointer, row, query, key, threshold):
    """Which weights dropout keeps: Philox-4x32-10 of (seed, offset, batch and head, query, key)."""
    zero = (query * 0 + key * 0).to(tl.uint32)
    counter = (key // 4).to(tl.uint32) + zero
    offset = tl.load(seed_pointer + 1).to(tl.uint32) + zero
    word_0, word_1, word_2, word_3 = tl.philox(
        tl.load(seed_pointer), counter, query.to(tl.uint32) + zero, row.to(tl.uint32) + zero, offset
    )
    lane = key % 4
    word = tl.where(lane < 2, tl.where(lane == 0, word_0, word_1), tl.where(lane == 2, word_2, word_3))
    return word.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold
