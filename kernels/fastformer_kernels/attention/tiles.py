"""Functions that the attention kernels share: the place of a sequence, the tiles that a tile meets, and its scores.

A query tile meets a key tile if some query in one may attend to some key in the other. Scores are kept in units of
log2, so that `exp2` needs no further multiplication. `query` and `key` are positions within a sequence. Their shapes,
(M, 1) with (1, N) or (1, M) with (N, 1), broadcast to the tile: this code works for both orientations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastformer_kernels.attention.arguments import LIST_HEADER, MASK_TILE, MASK_WORDS, WORD_BITS
from fastformer_kernels.constants import LOG2_E
from fastformer_kernels.precision import round_to

# No tile needs a test; tiles that need one have a separate loop; one loop tests all tiles.
UNTESTED, TWO_LOOPS, ONE_LOOP = (tl.constexpr(number) for number in range(3))
# The sizes of a block mask's tiles and lists.
TILE, WORDS, WORD, HEADER = (tl.constexpr(size) for size in (MASK_TILE, MASK_WORDS, WORD_BITS, LIST_HEADER))


class Span(NamedTuple):
    """The positions of one sequence.

    Attributes:
        queries, keys: the number of queries and keys.
        offset: the position of the first query; the first key has position 0.
        prefix: the number of keys that all queries may attend to in spite of the limit to the right; None without a
            prefix.
    """

    queries: Any
    keys: Any
    offset: Any
    prefix: Any


class Ranges(NamedTuple):
    """The rows of the other matrix that a tile meets.

    [low, whole_low) and [whole_high, high) lie in tiles that need a test, [whole_low, whole_high) in tiles that need
    none. All numbers except `high` are multiples of the tile's size.
    With a block mask they are rows of the list's tiles, one after the other.
    """

    low: Any
    whole_low: Any
    whole_high: Any
    high: Any


class Limits(NamedTuple):
    """The limits by position of each row of a tile of scores: what is allowed in the other direction is [low, high)."""

    low: Any
    high: Any


class HeadFeatures(NamedTuple):
    """The features that turn one head's products into scores; None for a feature that the call does not have.

    Each kernel makes it in place: with Triton 3.6 a function cannot return a tuple that contains None.

    Attributes:
        scale: multiplies the products.
        slope: the slope of ALiBi.
        mask, bias: pointers to the head's mask and bias.
        relative: the pointer to the head's bias for distance 0.
        listed: the pointer to the block mask's list of the tiles that the program's tile meets.
    """

    scale: Any
    slope: Any
    mask: Any
    bias: Any
    relative: Any
    listed: Any


# --- The tile of a program --------------------------------------------------------------------------------------------


@triton.jit
def tiles_ahead(all_tiles, PERSISTENT: tl.constexpr):
    """Return stop and step of a range from 0 over a program's tiles, counted from the program's number.

    Without PERSISTENT the program has one tile: both are constants, and the compiler removes the loop.
    """
    if PERSISTENT:
        return all_tiles - tl.program_id(0), tl.num_programs(0)
    else:
        return 1, 1


@triton.jit
def tile_and_row(number, sizes):
    """Return the rank of tile number `number` within its head, and the number of its (batch, head).

    `heads_in_cache` heads, whose keys and values the L2 cache holds, are taken together: all their tiles of one rank
    come one after another. The ranks, which go from the longest tile to the shortest, alternate in direction from
    group to group, and the last group ends with the shortest: tiles at equal distance then add up to equal work, and
    all programs end at almost the same time.
    """
    tiles = sizes.tiles
    all_heads = sizes.all_tiles // tiles
    group = number // (tiles * sizes.heads_in_cache)
    groups_after = (all_heads - 1) // sizes.heads_in_cache - group
    first_head = group * sizes.heads_in_cache
    heads = tl.minimum(sizes.heads_in_cache, all_heads - first_head)
    index = number - first_head * tiles
    rank = index // heads
    return tl.where(groups_after % 2 == 1, tiles - 1 - rank, rank), first_head + index % heads


# --- The place of a sequence ------------------------------------------------------------------------------------------


@triton.jit
def query_bounds(batch, layout, queries, query_tokens):
    """First token (0 unless packed) and length of the queries of sequence `batch`."""
    start = batch * 0
    if layout.cu_seqlens_q is not None:
        start, queries = _packed_bounds(layout.cu_seqlens_q + batch, query_tokens)
    return start, queries


@triton.jit
def key_bounds(batch, layout, keys, key_tokens):
    """First token (0 unless packed), length and stored length of the keys of sequence `batch`."""
    start = batch * 0
    if layout.cu_seqlens_k is not None:
        start, keys = _packed_bounds(layout.cu_seqlens_k + batch, key_tokens)
    stored = keys
    if layout.key_lengths is not None:
        keys = tl.maximum(tl.minimum(tl.load(layout.key_lengths + batch), keys), 0)
    return start, keys, stored


@triton.jit
def _packed_bounds(boundary_pointer, tokens):
    """First token and length of a sequence. They stay within the existing tokens even if the boundaries are wrong."""
    start = tl.maximum(tl.minimum(tl.load(boundary_pointer), tokens), 0)
    stop = tl.maximum(tl.minimum(tl.load(boundary_pointer + 1), tokens), start)
    return start.to(tl.int64), stop - start


@triton.jit
def prefix_length(batch, layout):
    """The number of keys that all queries may attend to in spite of the limit to the right, or None."""
    prefix = layout.prefix_lengths
    if layout.prefix_lengths is not None:
        prefix = tl.load(layout.prefix_lengths + batch)
    return prefix


# --- The tiles that meet ----------------------------------------------------------------------------------------------


@triton.jit
def _chunk_start(position, chunk):
    """First position of the chunk that holds `position`, which may be negative (integer division truncates)."""
    return (position - tl.where(position < 0, chunk - 1, 0)) // chunk * chunk


@triton.jit
def key_limits(query, span, features):
    """The `Limits` of the keys that each query may attend to by its position; empty for a query beyond the last."""
    position = query + span.offset
    low = query * 0
    high = low + span.keys
    if features.right is not None:
        beyond = position + features.right + 1
        if span.prefix is not None:
            beyond = tl.maximum(beyond, span.prefix)
        high = tl.minimum(high, beyond)
    if features.left is not None:
        low = tl.maximum(low, position - features.left)
    if features.chunk is not None:
        start = _chunk_start(position, features.chunk)
        low = tl.maximum(low, start)
        high = tl.minimum(high, start + features.chunk)
    return Limits(low, tl.where(query < span.queries, high, 0))


@triton.jit
def query_limits(key, span, features):
    """The `Limits` of the queries that may attend to each key by its position; empty for a key beyond the last."""
    index = key - span.offset
    low = key * 0
    high = low + span.queries
    if features.right is not None:
        low = tl.maximum(low, index - features.right)
        if span.prefix is not None:
            low = tl.where(key < span.prefix, 0, low)
    if features.left is not None:
        high = tl.minimum(high, index + features.left + 1)
    if features.chunk is not None:
        start = _chunk_start(key, features.chunk) - span.offset
        low = tl.maximum(low, start)
        high = tl.minimum(high, start + features.chunk)
    inside = key < span.keys
    return Limits(tl.where(inside, low, span.queries), tl.where(inside, high, 0))


@triton.jit
def key_ranges(first, span, features, constants):
    """The `Ranges` of keys that the tile of queries from `first` meets; empty if the tile has no query."""
    first_position = first + span.offset
    last_position = tl.minimum(first + constants.BLOCK_M, span.queries) - 1 + span.offset
    low = first * 0
    whole_low = low
    high = span.keys
    whole_high = span.keys
    if features.right is not None:
        high = tl.minimum(high, last_position + features.right + 1)
        whole_high = tl.minimum(whole_high, first_position + features.right + 1)
        if span.prefix is not None:
            high = tl.maximum(high, tl.minimum(span.prefix, span.keys))
            whole_high = tl.maximum(whole_high, tl.minimum(span.prefix, span.keys))
    if features.left is not None:
        low = tl.maximum(low, first_position - features.left)
        whole_low = tl.maximum(whole_low, last_position - features.left)
    if features.chunk is not None:
        low = tl.maximum(low, _chunk_start(first_position, features.chunk))
        whole_low = tl.maximum(whole_low, _chunk_start(last_position, features.chunk))
        high = tl.minimum(high, _chunk_start(last_position, features.chunk) + features.chunk)
        whole_high = tl.minimum(whole_high, _chunk_start(first_position, features.chunk) + features.chunk)
    low, whole_low, whole_high, high = _in_tiles(low, whole_low, whole_high, high, constants.BLOCK_N)
    # A packed sequence may have fewer tiles than the longest one. For the rest nothing is loaded or stored.
    if first >= span.queries:
        low, whole_low, whole_high, high = 0, 0, 0, 0
    if constants.LOOPS == ONE_LOOP:
        whole_low, whole_high = high, high
    return Ranges(low, whole_low, whole_high, high)


@triton.jit
def query_ranges(first, span, features, constants):
    """The `Ranges` of queries that the tile of keys from `first` meets; empty if the tile has no key."""
    last = tl.minimum(first + constants.BLOCK_N, span.keys) - 1
    low = first * 0
    whole_low = low
    high = span.queries
    whole_high = span.queries
    if features.right is not None:
        low = tl.maximum(low, first - span.offset - features.right)
        whole_low = tl.maximum(whole_low, last - span.offset - features.right)
        if span.prefix is not None:
            low = tl.where(first < span.prefix, 0, low)
            whole_low = tl.where(last < span.prefix, 0, whole_low)
    if features.left is not None:
        high = tl.minimum(high, last - span.offset + features.left + 1)
        whole_high = tl.minimum(whole_high, first - span.offset + features.left + 1)
    if features.chunk is not None:
        low = tl.maximum(low, _chunk_start(first, features.chunk) - span.offset)
        whole_low = tl.maximum(whole_low, _chunk_start(last, features.chunk) - span.offset)
        high = tl.minimum(high, _chunk_start(last, features.chunk) + features.chunk - span.offset)
        whole_high = tl.minimum(whole_high, _chunk_start(first, features.chunk) + features.chunk - span.offset)
    if last < first + constants.BLOCK_N - 1:
        # Rows beyond the last key must be masked, in every tile.
        whole_low = high
    low, whole_low, whole_high, high = _in_tiles(low, whole_low, whole_high, high, constants.BLOCK_M)
    if first >= span.keys:
        low, whole_low, whole_high, high = span.queries, span.queries, span.queries, span.queries
    if constants.LOOPS == ONE_LOOP:
        whole_low, whole_high = high, high
    return Ranges(low, whole_low, whole_high, high)


@triton.jit
def listed_at(features, batch, head, first):
    """A pointer to the list of the tiles that the tile of rows from `first` meets; None without a block mask."""
    pointer = features.lists
    if features.lists is not None:
        pointer = features.lists + batch * features.lists_stride_b + head * features.lists_stride_h
        pointer += tl.cast(first // TILE, tl.int64) * features.lists_stride_tile
    return pointer


@triton.jit
def listed_ranges(listed):
    """The `Ranges` of a block mask's list: first the tiles that need no test, then those whose bits are tested."""
    whole = tl.load(listed) * TILE
    return Ranges(0, 0, whole, whole + tl.load(listed + 1) * TILE)


@triton.jit
def bits_at(features, listed, first, index, start, TESTED: tl.constexpr, BLOCK: tl.constexpr):
    """A pointer to the first word of bits of a tile, number `index` among those that are tested, or None.

    Its rows begin at `first`, its columns at `start`.
    """
    pointer = features.bits
    if not TESTED:
        pointer = None
    if pointer is not None:
        tile = tl.load(listed + 2) + index // (TILE // BLOCK)
        pointer += tl.cast(tile, tl.int64) * (TILE * WORDS) + first % TILE * WORDS + start % TILE // WORD
    return pointer


@triton.jit
def shown_by_bits(row, column, COLUMNS: tl.constexpr):
    """True where a block mask shows a tile's elements. `row`, (rows, 1), points to the first word of each row."""
    words = tl.load(row)
    if COLUMNS >= WORD:
        column = tl.arange(0, COLUMNS)[None, :]
        for word in tl.static_range(1, COLUMNS // WORD):
            words = tl.where(column // WORD == word, tl.load(row + word), words)
    return (words >> (column % WORD)) & 1 != 0


@triton.jit
def _in_tiles(low, whole_low, whole_high, high, BLOCK: tl.constexpr):
    """Round low down to a multiple of BLOCK, and the whole tiles' bounds inwards; low <= whole_low <= whole_high."""
    low = tl.maximum(low, 0) // BLOCK * BLOCK
    high = tl.maximum(high, low)
    end = tl.cdiv(high, BLOCK) * BLOCK
    whole_low = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(whole_low, 0), BLOCK) * BLOCK, low), end)
    whole_high = tl.minimum(tl.maximum(tl.maximum(whole_high, 0) // BLOCK * BLOCK, whole_low), end)
    return low, whole_low, whole_high, high


@triton.jit
def tiles_in(ranges, TESTED: tl.constexpr, BLOCK: tl.constexpr):
    """The number of tiles that need a test if TESTED, else of those that need none."""
    if TESTED:
        return tl.cdiv(ranges.whole_low - ranges.low + tl.maximum(ranges.high - ranges.whole_high, 0), BLOCK)
    else:
        return (ranges.whole_high - ranges.whole_low) // BLOCK


@triton.jit
def tile_start(index, ranges, listed, TESTED: tl.constexpr, BLOCK: tl.constexpr):
    """The start of tile number `index` among those that need a test if TESTED, else among those that need none.

    The tiles that need a test come before and after the whole tiles.
    """
    if listed is not None:
        place = index * BLOCK + (ranges.whole_high if TESTED else 0)
        return tl.load(listed + HEADER + place // TILE) * TILE + place % TILE
    elif TESTED:
        start = ranges.low + index * BLOCK
        return tl.where(start < ranges.whole_low, start, start - ranges.whole_low + ranges.whole_high)
    else:
        return ranges.whole_low + index * BLOCK


# --- Rows of a (length, head_dim) matrix ------------------------------------------------------------------------------


@triton.jit
def at_head(operand, batch, head, start):
    """A pointer to row `start` of an `Operand`'s matrix at (batch, head)."""
    return operand.pointer + batch * operand.stride_b + head * operand.stride_h + start * operand.stride_row


@triton.jit
def rows_of(
    pointer,
    length,
    operand,
    head_dim: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """The source of a matrix for `load_rows`: a tensor descriptor (for the bulk copy engine), or its pointer."""
    if DESCRIPTOR:
        shape = [tl.maximum(length, 1), head_dim]
        return tl.make_tensor_descriptor(pointer, shape, [tl.cast(operand.stride_row, tl.int64), 1], [BLOCK, BLOCK_D])
    else:
        return pointer


@triton.jit
def tensor_rows(operand, batches, heads, length, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """A descriptor of a whole tensor, as rows of `stride_row` elements: see `place_in_tensor`.

    A program makes it once for all its tiles. It gives the next sequence's rows beyond the end of a sequence, and the
    next head's elements beyond head_dim: tiles must reach beyond neither.
    """
    last = tl.cast(batches - 1, tl.int64) * operand.stride_b + tl.cast(heads - 1, tl.int64) * operand.stride_h
    rows = (last // operand.stride_row).to(tl.int32) + length
    columns, stride = tl.cast(operand.stride_row, tl.int32), tl.cast(operand.stride_row, tl.int64)
    return tl.make_tensor_descriptor(operand.pointer, [rows, columns], [stride, 1], [BLOCK, BLOCK_D])


@triton.jit
def place_in_tensor(operand, batch, head):
    """Row and column of the first element of (batch, head) in a descriptor of `tensor_rows`."""
    first = batch * operand.stride_b + head * operand.stride_h
    return (first // operand.stride_row).to(tl.int32), (first % operand.stride_row).to(tl.int32)


@triton.jit
def load_rows(
    source,
    start,
    length,
    operand,
    head_dim: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHECK: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    first_row=0,
    column=0,
):
    """Load rows [start, start + BLOCK) of a matrix of `operand`; with CHECK or a descriptor, zeros beyond its end.

    first_row, column: for a descriptor, the place of the matrix in what it describes.
    """
    if DESCRIPTOR:
        return source.load([first_row + start, column])
    else:
        row = tl.arange(0, BLOCK)
        dim = tl.arange(0, BLOCK_D)
        pointers = source + tl.cast(start, tl.int64) * operand.stride_row
        pointers += row.to(tl.int64)[:, None] * operand.stride_row + dim.to(tl.int64)[None, :] * operand.stride_dim
        if CHECK:
            return tl.load(pointers, mask=(row < length - start)[:, None] & (dim < head_dim)[None, :], other=0.0)
        elif head_dim != BLOCK_D:
            return tl.load(pointers, mask=(dim < head_dim)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def row_pointers(pointer, start, operand, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to rows [start, start + BLOCK) of a matrix of `operand`, with 64-bit offsets."""
    row = start + tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_D)
    return pointer + row.to(tl.int64)[:, None] * operand.stride_row + dim.to(tl.int64)[None, :] * operand.stride_dim


@triton.jit
def row_mask(start, length, head_dim: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """True for the elements of rows [start, start + BLOCK) that lie in a (length, head_dim) matrix."""
    return (start + tl.arange(0, BLOCK) < length)[:, None] & (tl.arange(0, BLOCK_D) < head_dim)[None, :]


@triton.jit
def store_rows(
    pointer, tile, start, length, operand, head_dim: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Store rows [start, start + BLOCK) of a matrix of `operand`, in its dtype, up to the matrix's end."""
    tile = round_to(tile, operand.pointer.dtype.element_ty)
    pointers = row_pointers(pointer, start, operand, BLOCK, BLOCK_D)
    tl.store(pointers, tile, mask=row_mask(start, length, head_dim, BLOCK, BLOCK_D))


# --- Scores -----------------------------------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """The hyperbolic tangent. Near zero it is computed by its series: 1 - 2 / (exp(2x) + 1) would cancel there."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(square < 0.01, series, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0))


@triton.jit
def scale_of(features, head):
    """The factor of this head's products of queries and keys."""
    scale = features.scale
    if features.head_scales is not None:
        scale = scale * tl.load(features.head_scales + head)
    return scale


@triton.jit
def slope_of(features, batch, head):
    """The ALiBi slope of (batch, head), or None."""
    slope = features.slopes
    if features.slopes is not None:
        slope = tl.load(features.slopes + batch * features.slopes_stride_b + head)
    return slope


@triton.jit
def mask_at_head(features, batch, head):
    """A pointer to the mask at (batch, head), or None."""
    pointer = features.mask
    if features.mask is not None:
        pointer = features.mask + batch * features.mask_stride_b + head * features.mask_stride_h
    return pointer


@triton.jit
def bias_at_head(features, batch, head):
    """A pointer to the bias, or to its gradient, at (batch, head); None without it."""
    pointer = features.bias
    if features.bias is not None:
        pointer = features.bias + batch * features.bias_stride_b + head * features.bias_stride_h
    return pointer


@triton.jit
def relative_at_head(features, head):
    """A pointer to a head's bias for distance 0, or to its gradient; or None."""
    pointer = features.relative
    if features.relative is not None:
        pointer = features.relative + head * (2 * features.max_distance + 1) + features.max_distance
    return pointer


@triton.jit
def scores_of(products, scale, features, FOLD_SCALE: tl.constexpr):
    """Scores in units of log2 from products of queries and keys: softcap(scale products), before anything is added.

    With FOLD_SCALE the products are returned unchanged, since exp2 takes the scale.
    """
    if features.softcap is not None:
        return tanh(products * (scale / features.softcap)) * (features.softcap * LOG2_E)
    elif FOLD_SCALE:
        return products
    else:
        return products * (scale * LOG2_E)


@triton.jit
def bias_and_mask(scores, query, key, span, head_features, bits, features):
    """Add every bias to a tile of scores, and set scores that the mask does not allow to -inf.

    bits: the pointer to the tile's bits of a block mask, in the orientation of the scores; or None.
    """
    distance = key - query - span.offset
    if head_features.slope is not None:
        scores -= head_features.slope * LOG2_E * tl.abs(distance).to(tl.float32)
    if head_features.relative is not None:
        at = tl.minimum(tl.maximum(distance, -features.max_distance), features.max_distance)
        scores += tl.load(head_features.relative + at).to(tl.float32) * LOG2_E
    inside = (query < span.queries) & (key < span.keys)
    if head_features.bias is not None:
        at = query.to(tl.int64) * features.bias_stride_m + key.to(tl.int64) * features.bias_stride_n
        scores += tl.load(head_features.bias + at, mask=inside, other=0.0).to(tl.float32) * LOG2_E
    if head_features.mask is not None:
        at = query.to(tl.int64) * features.mask_stride_m + key.to(tl.int64) * features.mask_stride_n
        scores = tl.where(tl.load(head_features.mask + at, mask=inside, other=0) != 0, scores, float("-inf"))
    if bits is not None:
        # No bit is set beyond the ends.
        column = key if key.shape[0] == 1 else query
        row = bits + tl.arange(0, scores.shape[0])[:, None] * WORDS
        scores = tl.where(shown_by_bits(row, column, scores.shape[1]), scores, float("-inf"))
    return scores


@triton.jit
def hide(scores, start, limits, features, KEYS: tl.constexpr):
    """Set the scores outside the `Limits` of their rows to -inf.

    The limits are known before the loop over tiles, so each score costs one comparison of a constant with a limit.

    Args:
        scores: rows of queries and columns of keys if KEYS, else rows of keys and columns of queries.
        start: the position of the first column.
        limits: those of each row, (rows, 1).
    """
    column = tl.arange(0, scores.shape[1])[None, :]
    low, high = limits.low - start, limits.high - start
    if features.left is not None or features.chunk is not None:
        # One comparison for both limits: below `low` the difference is a large number without sign.
        width = tl.maximum(high - low, 0).to(tl.uint32, bitcast=True)
        allowed = (column - low).to(tl.uint32, bitcast=True) < width
    elif KEYS:
        allowed = column < high
    else:
        allowed = column >= low
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def dropout_keep(features, row, first_query, first_key, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """True for the weights that dropout keeps, (BLOCK_M, BLOCK_N).

    The words are Philox-4x32-10 of (seed, offset, batch and head, query, key). The four words drawn at once serve four
    neighbouring keys; `first_key` is a multiple of four.
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
