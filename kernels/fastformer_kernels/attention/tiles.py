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
# No tile needs a test; those that do have a loop of their own; or all tiles are tested in one loop.
NO_BORDERS, TWO_LOOPS, ONE_LOOP = (tl.constexpr(number) for number in range(3))


# --- Which tile a program works on ------------------------------------------------------------------------------------


@triton.jit
def tile_of_work(work, tiles, heads, section):
    """Rank of the tile and its (batch, head).

    Heads are taken in sections whose keys and values fit the L2 cache together; within a section every head's tile of
    rank 0 comes first, then those of rank 1: the longest first, if ranks are by length.
    """
    first = work // (tiles * section) * section
    size = tl.minimum(section, heads - first)
    index = work - first * tiles
    return index // size, first + index % size


# --- Where a sequence lies --------------------------------------------------------------------------------------------


@triton.jit
def query_bounds(batch, lengths, queries, query_tokens):
    """First token (0 unless packed) and length of the queries of sequence `batch`."""
    start = batch * 0
    if lengths.cu_seqlens_q is not None:
        start, queries = _packed_bounds(lengths.cu_seqlens_q + batch, query_tokens)
    return start, queries


@triton.jit
def key_bounds(batch, lengths, keys, key_tokens):
    """First token (0 unless packed), length and stored length of the keys of sequence `batch`."""
    start = batch * 0
    if lengths.cu_seqlens_k is not None:
        start, keys = _packed_bounds(lengths.cu_seqlens_k + batch, key_tokens)
    stored = keys
    if lengths.key_lengths is not None:
        keys = tl.maximum(tl.minimum(tl.load(lengths.key_lengths + batch), keys), 0)
    return start, keys, stored


@triton.jit
def _packed_bounds(boundary_pointer, tokens):
    """First token and length of a sequence, never beyond the tokens that there are, whatever the boundaries say."""
    start = tl.maximum(tl.minimum(tl.load(boundary_pointer), tokens), 0)
    stop = tl.maximum(tl.minimum(tl.load(boundary_pointer + 1), tokens), start)
    return start.to(tl.int64), stop - start


@triton.jit
def prefix_length(batch, lengths):
    """How many keys everyone may attend to whatever the limit to the right."""
    prefix = 0
    if lengths.prefix_lengths is not None:
        prefix = tl.load(lengths.prefix_lengths + batch)
    return prefix


# --- Which tiles meet -------------------------------------------------------------------------------------------------


@triton.jit
def _chunk_start(position, chunk):
    """First position of the chunk that holds `position`, which may be negative (integer division truncates)."""
    return (position - tl.where(position < 0, chunk - 1, 0)) // chunk * chunk


@triton.jit
def key_ranges(
    first, queries, keys, offset, prefix, features, PREFIX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The keys that the queries from `first` meet: [low, whole_low) and [whole_high, high) in tiles that need a test,
    [whole_low, whole_high) in tiles that need none. All but `high` are multiples of BLOCK_N."""
    first_position = first + offset
    last_position = tl.minimum(first + BLOCK_M, queries) - 1 + offset
    low = first * 0
    whole_low = low
    high = keys
    whole_high = keys
    if features.right is not None:
        high = tl.minimum(high, last_position + features.right + 1)
        whole_high = tl.minimum(whole_high, first_position + features.right + 1)
        if PREFIX:
            high = tl.maximum(high, tl.minimum(prefix, keys))
            whole_high = tl.maximum(whole_high, tl.minimum(prefix, keys))
    if features.left is not None:
        low = tl.maximum(low, first_position - features.left)
        whole_low = tl.maximum(whole_low, last_position - features.left)
    if features.chunk is not None:
        low = tl.maximum(low, _chunk_start(first_position, features.chunk))
        whole_low = tl.maximum(whole_low, _chunk_start(last_position, features.chunk))
        high = tl.minimum(high, _chunk_start(last_position, features.chunk) + features.chunk)
        whole_high = tl.minimum(whole_high, _chunk_start(first_position, features.chunk) + features.chunk)
    return _in_tiles(low, whole_low, whole_high, high, BLOCK_N)


@triton.jit
def query_ranges(
    first, queries, keys, offset, prefix, features, PREFIX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The queries that meet the keys from `first`, split as in `key_ranges`."""
    last = tl.minimum(first + BLOCK_N, keys) - 1
    low = first * 0
    whole_low = low
    high = queries
    whole_high = queries
    if features.right is not None:
        low = tl.maximum(low, first - offset - features.right)
        whole_low = tl.maximum(whole_low, last - offset - features.right)
        if PREFIX:
            low = tl.where(first < prefix, 0, low)
            whole_low = tl.where(last < prefix, 0, whole_low)
    if features.left is not None:
        high = tl.minimum(high, last - offset + features.left + 1)
        whole_high = tl.minimum(whole_high, first - offset + features.left + 1)
    if features.chunk is not None:
        low = tl.maximum(low, _chunk_start(first, features.chunk) - offset)
        whole_low = tl.maximum(whole_low, _chunk_start(last, features.chunk) - offset)
        high = tl.minimum(high, _chunk_start(last, features.chunk) + features.chunk - offset)
        whole_high = tl.minimum(whole_high, _chunk_start(first, features.chunk) + features.chunk - offset)
    if last < first + BLOCK_N - 1:
        # Rows beyond the last key must be masked, in every tile.
        whole_low = high
    return _in_tiles(low, whole_low, whole_high, high, BLOCK_M)


@triton.jit
def _in_tiles(low, whole_low, whole_high, high, BLOCK: tl.constexpr):
    """Round ranges to multiples of BLOCK, outwards and for the whole tiles inwards, in rising order."""
    low = tl.maximum(low, 0) // BLOCK * BLOCK
    high = tl.maximum(high, low)
    end = tl.cdiv(high, BLOCK) * BLOCK
    whole_low = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(whole_low, 0), BLOCK) * BLOCK, low), end)
    whole_high = tl.minimum(tl.maximum(tl.maximum(whole_high, 0) // BLOCK * BLOCK, whole_low), end)
    return low, whole_low, whole_high, high


@triton.jit
def border_tiles(low, whole_low, whole_high, high, BLOCK: tl.constexpr):
    """How many tiles need a test."""
    return tl.cdiv(whole_low - low + tl.maximum(high - whole_high, 0), BLOCK)


@triton.jit
def border_start(index, low, whole_low, whole_high, BLOCK: tl.constexpr):
    """Where the border tile `index` starts: those before the whole tiles first, then those after."""
    start = low + index * BLOCK
    return tl.where(start < whole_low, start, start - whole_low + whole_high)


# --- Rows of a (length, head_dim) matrix ------------------------------------------------------------------------------


@triton.jit
def rows_of(
    pointer,
    length,
    stride_row,
    head_dim: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """What `load_rows` takes a matrix from: a tensor descriptor (for the bulk copy engine), or its pointer."""
    if DESCRIPTOR:
        shape = [tl.maximum(length, 1), head_dim]
        return tl.make_tensor_descriptor(pointer, shape, [tl.cast(stride_row, tl.int64), 1], [BLOCK, BLOCK_D])
    else:
        return pointer


@triton.jit
def load_rows(
    source,
    start,
    length,
    stride_row,
    stride_dim,
    head_dim: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Rows [start, start + BLOCK) of a matrix; with CHECK or a descriptor, zeros beyond its end."""
    if DESCRIPTOR:
        return source.load([start, 0])
    else:
        row = tl.arange(0, BLOCK)
        dim = tl.arange(0, BLOCK_D)
        pointers = source + tl.cast(start, tl.int64) * stride_row
        pointers += row.to(tl.int64)[:, None] * stride_row + dim.to(tl.int64)[None, :] * stride_dim
        if CHECK:
            return tl.load(pointers, mask=(row < length - start)[:, None] & (dim < head_dim)[None, :], other=0.0)
        elif head_dim != BLOCK_D:
            return tl.load(pointers, mask=(dim < head_dim)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def row_pointers(pointer, start, stride_row, stride_dim, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to rows [start, start + BLOCK) of a matrix, with 64-bit offsets."""
    row = start + tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_D)
    return pointer + row.to(tl.int64)[:, None] * stride_row + dim.to(tl.int64)[None, :] * stride_dim


@triton.jit
def row_mask(start, length, head_dim: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of rows [start, start + BLOCK) lie in a (length, head_dim) matrix."""
    return (start + tl.arange(0, BLOCK) < length)[:, None] & (tl.arange(0, BLOCK_D) < head_dim)[None, :]


@triton.jit
def store_rows(
    pointer,
    tile,
    start,
    length,
    stride_row,
    stride_dim,
    head_dim: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store rows [start, start + BLOCK) of a matrix, up to its end."""
    pointers = row_pointers(pointer, start, stride_row, stride_dim, BLOCK, BLOCK_D)
    tl.store(pointers, tile, mask=row_mask(start, length, head_dim, BLOCK, BLOCK_D))


# --- Scores -----------------------------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """Hyperbolic tangent; near zero its series, where 1 - 2 / (exp(2x) + 1) would cancel."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(square < 0.01, series, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0))


@triton.jit
def mask_at_head(features, batch, head):
    """The pointer of the mask at (batch, head), or None."""
    pointer = features.mask
    if features.mask is not None:
        pointer = features.mask + batch * features.mask_stride_b + head * features.mask_stride_h
    return pointer


@triton.jit
def bias_at_head(features, batch, head):
    """The pointer of the bias, or of its gradient, at (batch, head), or None."""
    pointer = features.bias
    if features.bias is not None:
        pointer = features.bias + batch * features.bias_stride_b + head * features.bias_stride_h
    return pointer


@triton.jit
def slope_of(features, batch, head):
    """The ALiBi slope of (batch, head), or None."""
    slope = None
    if features.slopes is not None:
        slope = tl.load(features.slopes + batch * features.slopes_stride_b + head)
    return slope


@triton.jit
def relative_at_head(features, head):
    """The pointer of a head's bias for distance 0, or of its gradient, or None."""
    pointer = features.relative
    if features.relative is not None:
        pointer = features.relative + head * (2 * features.max_distance + 1) + features.max_distance
    return pointer


@triton.jit
def scale_of(features, head):
    """What multiplies this head's products of queries and keys."""
    scale = features.scale
    if features.head_scales is not None:
        scale = scale * tl.load(features.head_scales + head)
    return scale


@triton.jit
def bias_and_mask(
    scores,
    query,
    key,
    queries,
    keys,
    offset,
    prefix,
    slope,
    mask_pointer,
    bias_pointer,
    relative_pointer,
    features,
    PREFIX: tl.constexpr,
    BORDER: tl.constexpr,
):
    """Add every bias to a tile of scores, and set what may not be attended to to -inf."""
    distance = key - query - offset
    inside = (query < queries) & (key < keys)
    if slope is not None:
        scores -= slope * LOG2_E * tl.abs(distance).to(tl.float32)
    if relative_pointer is not None:
        at = tl.minimum(tl.maximum(distance, -features.max_distance), features.max_distance)
        scores += tl.load(relative_pointer + at).to(tl.float32) * LOG2_E
    if bias_pointer is not None:
        at = query.to(tl.int64) * features.bias_stride_m + key.to(tl.int64) * features.bias_stride_n
        scores += tl.load(bias_pointer + at, mask=inside, other=0.0).to(tl.float32) * LOG2_E
    if mask_pointer is not None:
        at = query.to(tl.int64) * features.mask_stride_m + key.to(tl.int64) * features.mask_stride_n
        scores = tl.where(tl.load(mask_pointer + at, mask=inside, other=0) != 0, scores, float("-inf"))
    if BORDER:
        allowed = inside
        if features.right is not None:
            if PREFIX:
                allowed = allowed & ((distance <= features.right) | (key < prefix))
            else:
                allowed = allowed & (distance <= features.right)
        if features.left is not None:
            allowed = allowed & (distance >= -features.left)
        if features.chunk is not None:
            start = _chunk_start(query + offset, features.chunk)
            allowed = allowed & (key >= start) & (key < start + features.chunk)
        scores = tl.where(allowed, scores, float("-inf"))
    return scores


@triton.jit
def dropout_keep(features, row, first_query, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights dropout keeps, (BLOCK_M, BLOCK_N): Philox-4x32-10 of (seed, offset, batch and head, query, key).

    The four words drawn at once serve four neighbouring keys; `first_key` is a multiple of four.
    """
    query = (first_query + tl.arange(0, BLOCK_M)).to(tl.uint32)[:, None]
    group = (first_key // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)[None, :]
    zero = query * 0 + group * 0
    word_0, word_1, word_2, word_3 = tl.philox(
        tl.load(features.seed),
        group + zero,
        query + zero,
        row.to(tl.uint32) + zero,
        tl.load(features.seed + 1).to(tl.uint32) + zero,
    )
    threshold = tl.full((1, 1), features.threshold, tl.uint32)
    even = tl.join(word_0.to(tl.uint32, bitcast=True) >= threshold, word_2.to(tl.uint32, bitcast=True) >= threshold)
    odd = tl.join(word_1.to(tl.uint32, bitcast=True) >= threshold, word_3.to(tl.uint32, bitcast=True) >= threshold)
    return tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_N))
