"""Attention backward: weights are recomputed tile by tile from the log-sum-exp.

With P the weights, dP = dO V^T and delta = rowsum(dO * O) - dLSE: dS = P * (dP - delta), dQ = scale dS K,
dK = scale dS^T Q, dV = P^T dO (FlashAttention-2, Dao 2023, https://arxiv.org/abs/2307.08691).

A program owns a tile of keys and walks over the queries of every head that shares them, with five products for each
pair of tiles. It keeps dK and dV in registers, and adds dQ and the gradients of bias and relative bias up in memory.
The order of those additions varies. If determinism is asked for, or a launch configuration says so, the programs leave
them out: another kernel, whose programs own tiles of queries, recomputes the weights and computes dQ. That kernel runs
first and computes delta of its queries, for which a launch of its own would read dO once more.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastformer_kernels.attention.arguments import (
    AttentionArguments,
    AttentionGradients,
    Learned,
    empty_gradient,
    sum_by_distance,
)
from fastformer_kernels.attention.kernel_arguments import (
    Sizes,
    Statistics,
    addend,
    features,
    layout,
    operand,
    relative,
    rows,
    sizes,
    statistics,
)
from fastformer_kernels.attention.launch import (
    AttentionConfiguration,
    backward_configuration,
    constants_of_call,
    deterministic_configuration,
    heads_in_cache,
    launch_size,
    loops_of,
    needs_tests,
    query_gradient_configuration,
    specializes_warps,
    uses_descriptors,
    with_aligned_rows,
)
from fastformer_kernels.attention.tiles import (
    ONE_LOOP,
    UNTESTED,
    HeadFeatures,
    Span,
    at_head,
    bias_and_mask,
    bias_at_head,
    bits_at,
    dropout_keep,
    hide,
    key_bounds,
    key_limits,
    key_ranges,
    listed_at,
    listed_ranges,
    load_rows,
    mask_at_head,
    prefix_length,
    query_bounds,
    query_limits,
    query_ranges,
    relative_at_head,
    row_mask,
    row_pointers,
    rows_of,
    scale_of,
    slope_of,
    store_rows,
    tanh,
    tile_and_row,
    tile_start,
    tiles_ahead,
    tiles_in,
)
from fastformer_kernels.constants import LN_2, LOG2_E
from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.launch import COMPILER_OPTIONS
from fastformer_kernels.precision import dot, input_precision, round_to


class ScoreGradients(NamedTuple):
    """The tensors that receive the gradients of bias, relative bias, slopes and scales of the heads.

    Attributes:
        bias: float32, shaped like the bias; kernels add to it atomically. With its strides, the fields of an `Addend`.
        relative, max_distance: the fields of a `Relative`, float32; kernels add to it atomically.
        slopes, head_scales: (batch, heads, tiles) float32, one element for each tile and head.
    """

    bias: torch.Tensor | None
    bias_stride_b: int
    bias_stride_h: int
    bias_stride_m: int
    bias_stride_n: int
    relative: torch.Tensor | None
    max_distance: int
    slopes: torch.Tensor | None
    head_scales: torch.Tensor | None


class _QuerySources(NamedTuple):
    """The memory that a head's tiles are loaded from or added to: pointers, or tensor descriptors."""

    q: Any
    do: Any
    dq: Any


class _Results(NamedTuple):
    """What the forward returned: output and log-sum-exp, and the gradient of the latter, if it has one."""

    output: torch.Tensor
    lse: torch.Tensor
    grad_lse: torch.Tensor | None


class _StatisticsSource(NamedTuple):
    """The memory that a head's `Statistics` are loaded from.

    Attributes:
        lse_log2, delta: pointers to the first row, or descriptors of the numbers of all heads.
        row, column: for descriptors, the place of the first row.
    """

    lse_log2: Any
    delta: Any
    row: Any
    column: Any


class _KeyTiles(NamedTuple):
    """The keys and values that a program owns, a tile each."""

    key: Any
    value: Any


class _KeySums(NamedTuple):
    """The sums over the queries so far: a tile of dK and of dV, and those of `_add_score_gradients`."""

    dk: Any
    dv: Any
    dslope: Any
    dscale: Any


class _KeyPlace(NamedTuple):
    """The head of the queries, and the tile of keys that they meet.

    Attributes:
        batch, head: indices of the queries' sequence and head.
        dropout_row: the number of (batch, head), for the random words.
        first_key: the first key of the tile.
    """

    batch: Any
    head: Any
    dropout_row: Any
    first_key: Any


class _KeySources(NamedTuple):
    """The memory that tiles of keys and values are loaded from: pointers, or tensor descriptors."""

    k: Any
    v: Any


class _QueryTiles(NamedTuple):
    """The queries that a program owns, and the output's gradient in their rows, a tile each."""

    query: Any
    grad_output: Any


class _QuerySums(NamedTuple):
    """The sums over the keys so far: a tile of dQ, and those of `_add_score_gradients`."""

    dq: Any
    dslope: Any
    dscale: Any


class _QueryPlace(NamedTuple):
    """The tile of queries that meets the keys, and its head.

    Attributes:
        batch, head: indices of sequence and head.
        dropout_row: the number of (batch, head), for the random words.
        first_query: the first query of the tile.
    """

    batch: Any
    head: Any
    dropout_row: Any
    first_query: Any


@triton.jit(do_not_specialize=["tiles", "heads", "queries"])
def _row_statistics_kernel(
    o,
    do,
    lse,
    dlse,
    statistics,
    tiles,
    heads,
    queries,
    value_dim: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Compute the `Statistics` of each row: delta = rowsum(dO * O) - dLSE, and the LSE in units of log2.

    Args:
        o, do: an `Operand` each: the output and its gradient. Packed tokens count as one sequence.
        lse, dlse: a `Rows` each: the log-sum-exp and its gradient, whose pointer may be None.
        statistics: a `Statistics`, written.
        tiles, heads, queries: number of tiles of a head, and sizes of o.
    """
    program = tl.program_id(0)
    first = program % tiles * BLOCK_M
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    do_tile = load_rows(at_head(do, batch, head, 0), first, queries, do, value_dim, BLOCK_M, BLOCK_V, True, False)
    _statistics_of_tile(o, do_tile, lse, dlse, statistics, batch, head, 0, first, queries, value_dim)


@triton.jit
def _statistics_of_tile(o, do_tile, lse, dlse, statistics, batch, head, start, first, queries, value_dim: tl.constexpr):
    """Compute the `Statistics` of a tile of rows, store them, and return them: LSE in units of log2, and delta.

    Rows beyond the last get an LSE that makes their weights zero.

    Args:
        o, lse, dlse, statistics: see `_row_statistics_kernel`.
        do_tile: the output's gradient in these rows.
        start: the first row of a sequence of `queries` rows.
        first: the first row of the tile, counted from `start`.
    """
    BLOCK_M: tl.constexpr = do_tile.shape[0]
    BLOCK_V: tl.constexpr = do_tile.shape[1]
    o_tile = load_rows(at_head(o, batch, head, start), first, queries, o, value_dim, BLOCK_M, BLOCK_V, True, False)
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), axis=1)
    query = first + tl.arange(0, BLOCK_M)
    valid = query < queries
    row = start + query.to(tl.int64)
    if dlse.pointer is not None:
        at = batch * dlse.stride_b + head * dlse.stride_h + row * dlse.stride_row
        delta -= tl.load(dlse.pointer + at, mask=valid, other=0.0)
    at = batch * lse.stride_b + head * lse.stride_h + row
    row_lse = tl.load(lse.pointer + at, mask=valid, other=float("-inf"))
    lse_log2 = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
    at = batch * statistics.stride_b + head * statistics.stride_h + row
    tl.store(statistics.lse_log2 + at, lse_log2, mask=valid)
    tl.store(statistics.delta + at, delta, mask=valid)
    return lse_log2, delta


@triton.jit
def _weights_and_gradient(
    products,
    dweights,
    lse_log2,
    delta,
    query,
    key,
    start,
    limits,
    span,
    head_features,
    bits,
    keep,
    features,
    place,
    constants,
    TESTED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Compute weights and gradients of one tile, in either orientation, from its products Q K^T and dO V^T.

    start, limits, KEYS: what `hide` takes, where TESTED.

    Returns the weights after dropout, the gradient of the scores before the softcap (still to be multiplied by the
    scale), and that of the scores after the softcap, which is also the gradient of the bias.
    """
    scale = head_features.scale
    multiplier = scale * LOG2_E if constants.FOLD_SCALE else 1.0
    scores = products
    if features.softcap is not None:
        capped = tanh(products * (scale / features.softcap))
        scores = capped * (features.softcap * LOG2_E)
    elif not constants.FOLD_SCALE:
        scores = products * (scale * LOG2_E)
    if constants.SCORE_MOD is not None:
        before = scores
        scores = constants.MOD_SCORES(scores * LN_2, place.batch, place.head, query, key) * LOG2_E
    scores = bias_and_mask(scores, query, key, span, head_features, bits, features)
    if TESTED and bits is None:
        scores = hide(scores, start, limits, features, KEYS)
    weights = tl.exp2(scores * multiplier - lse_log2)
    dropped = weights
    if features.seed is not None:
        dropped = tl.where(keep, weights * features.kept_scale, 0.0)
        dweights = tl.where(keep, dweights * features.kept_scale, 0.0)
    dbias = weights * (dweights - delta)
    dscores = dbias
    if constants.SCORE_MOD is not None:
        # What a function gives where nothing is seen does not count, not even if it is infinite.
        changed = constants.MOD_GRADIENT(dbias, before * LN_2, place.batch, place.head, query, key)
        dscores = tl.where(dbias == 0.0, 0.0, changed)
    if features.softcap is not None:
        dscores *= 1.0 - capped * capped
    return dropped, dscores, dbias


@triton.jit
def _statistics_of(statistics, batch, head, q_start, sizes, layout, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """The `_StatisticsSource` of the rows of one head of one sequence."""
    if DESCRIPTORS:
        # All heads are one matrix, in which the heads of packed tokens are rows, and else those of each sequence.
        packed: tl.constexpr = layout.cu_seqlens_q is not None
        row = (head if packed else batch * sizes.heads + head).to(tl.int32)
        rows = sizes.heads if packed else sizes.heads * sizes.query_tokens
        shape = [rows, sizes.query_tokens if packed else sizes.queries]
        stride = tl.cast(statistics.stride_h, tl.int64)
        lse = tl.make_tensor_descriptor(statistics.lse_log2, shape, [stride, 1], [1, BLOCK])
        delta = tl.make_tensor_descriptor(statistics.delta, shape, [stride, 1], [1, BLOCK])
        return _StatisticsSource(lse, delta, row, tl.cast(q_start, tl.int32))
    else:
        first = batch * statistics.stride_b + head * statistics.stride_h + q_start
        return _StatisticsSource(statistics.lse_log2 + first, statistics.delta + first, 0, 0)


@triton.jit
def _load_statistics(source, start, queries, BLOCK: tl.constexpr, CHECK: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """Load LSE and delta of the rows [start, start + BLOCK) from a `_StatisticsSource`.

    With CHECK, rows beyond the end get an LSE that makes their weights zero.
    """
    query = start + tl.arange(0, BLOCK)
    valid = query < queries
    if DESCRIPTORS:
        lse_log2 = tl.reshape(source.lse_log2.load([source.row, source.column + start]), (BLOCK,))
        delta = tl.reshape(source.delta.load([source.row, source.column + start]), (BLOCK,))
        if CHECK:
            # Behind the end of a packed sequence are the numbers of the next one.
            lse_log2 = tl.where(valid, lse_log2, float("inf"))
            delta = tl.where(valid, delta, 0.0)
        return lse_log2, delta
    elif CHECK:
        lse_log2 = tl.load(source.lse_log2 + query, mask=valid, other=float("inf"))
        return lse_log2, tl.load(source.delta + query, mask=valid, other=0.0)
    else:
        return tl.load(source.lse_log2 + query), tl.load(source.delta + query)


@triton.jit
def _loaded_once(x):
    """Return the loaded vector `x`, and make the compiler load each element once.

    With Triton 3.6 each thread would load every element that it needs, which takes dozens of registers for addresses.
    The compiler cannot move a load across a scan; here each scan has one element.
    """
    return tl.reshape(tl.cumsum(x[:, None], axis=1), x.shape)


@triton.jit
def _add_score_gradients(
    gradients,
    products,
    dscores,
    dbias,
    dslope,
    dscale,
    query,
    key,
    span,
    batch,
    head,
    QUERY_AXIS: tl.constexpr,
):
    """Add a tile of the scores' gradient to the gradients of bias and relative bias.

    Returns the sums so far, for each row of the tile, of the gradients of the slope and of the head's scale.
    """
    if gradients.bias is not None:
        pointer = bias_at_head(gradients, batch, head)
        at_query = query.to(tl.int64) * gradients.bias_stride_m
        at_key = key.to(tl.int64) * gradients.bias_stride_n
        valid = (query < span.queries) & (key < span.keys)
        # A stride of zero means that the bias broadcasts: sum first over the scores that share an element of the bias.
        if gradients.bias_stride_m == 0 and gradients.bias_stride_n == 0:
            total = tl.sum(tl.sum(dbias, axis=1), axis=0)
            tl.atomic_add(pointer, total, sem="relaxed")
        elif gradients.bias_stride_m == 0:
            sums = tl.sum(dbias, axis=QUERY_AXIS, keep_dims=True)
            tl.atomic_add(pointer + at_key, sums, mask=key < span.keys, sem="relaxed")
        elif gradients.bias_stride_n == 0:
            sums = tl.sum(dbias, axis=1 - QUERY_AXIS, keep_dims=True)
            tl.atomic_add(pointer + at_query, sums, mask=query < span.queries, sem="relaxed")
        else:
            tl.atomic_add(pointer + at_query + at_key, dbias, mask=valid, sem="relaxed")
    if gradients.relative is not None:
        _add_relative_gradient(gradients, dbias, query, key, span.offset, head, QUERY_AXIS)
    if gradients.slopes is not None:
        distance = tl.abs(key - query - span.offset).to(tl.float32)
        dslope -= tl.sum(dbias * distance, axis=1)
    if gradients.head_scales is not None:
        dscale += tl.sum(dscores * products, axis=1)
    return dslope, dscale


@triton.jit
def _store_program_sums(gradients, dslope, dscale, batch, head, heads, tile, tiles):
    """Store the sums that `_add_score_gradients` returned for one head."""
    at = (batch * heads + head) * tiles + tile
    if gradients.slopes is not None:
        tl.store(gradients.slopes + at, tl.sum(dslope))
    if gradients.head_scales is not None:
        tl.store(gradients.head_scales + at, tl.sum(dscale))


@triton.jit
def _add_relative_gradient(gradients, dbias, query, key, offset, head, QUERY_AXIS: tl.constexpr):
    """Sum a tile along its diagonals, on each of which key - query is constant, and add the sums to the gradient.

    Row i is rotated by i places, which turns diagonals into columns. Column c then holds diagonal c and, in rows
    where the rotation wrapped around, the diagonal that comes COLUMNS later.
    """
    ROWS: tl.constexpr = dbias.shape[0]
    COLUMNS: tl.constexpr = dbias.shape[1]
    column = tl.arange(0, COLUMNS)
    place = tl.arange(0, ROWS)[:, None] + column[None, :]
    rotated = tl.gather(dbias, place % COLUMNS, 1)
    corner = tl.min(key) - tl.min(query) - offset
    pointer = relative_at_head(gradients, head)
    for wraps in tl.static_range((ROWS + COLUMNS - 2) // COLUMNS + 1):
        sums = tl.sum(tl.where(place // COLUMNS == wraps, rotated, 0.0), axis=0)
        shift = column - wraps * COLUMNS
        distance = corner + (shift if QUERY_AXIS == 0 else -shift)
        distance = tl.minimum(tl.maximum(distance, -gradients.max_distance), gradients.max_distance)
        tl.atomic_add(pointer + distance, sums, sem="relaxed")


@triton.jit(do_not_specialize=Sizes._fields)
def _key_value_gradient_kernel(
    q,
    k,
    v,
    do,
    statistics,
    dq,
    dk,
    dv,
    gradients,
    all_tiles,
    tiles,
    heads_in_cache,
    heads,
    queries,
    keys,
    query_tokens,
    key_tokens,
    layout,
    features,
    constants,
):
    """Compute dV = P^T dO and dK = scale dS^T Q; with a pointer in `dq` also the results of `_query_gradient_kernel`.

    Args:
        q, k, v, do: an `Operand` each.
        statistics: the `Statistics` of the queries.
        dq, dk, dv: an `Operand` each. dk and dv are written; dq, float32, is added to atomically.
        gradients: a `ScoreGradients`.
        all_tiles, tiles, heads_in_cache, heads, queries, keys, query_tokens, key_tokens: the fields of a `Sizes`.
            They are separate arguments, since Triton specialises on every number in a tuple.
        layout, features, constants: a `Layout`, a `Features`, a `Constants`.
    """
    sizes = Sizes(all_tiles, tiles, heads_in_cache, heads, queries, keys, query_tokens, key_tokens)
    stop, step = tiles_ahead(all_tiles, constants.PERSISTENT)
    for ahead in range(0, stop, step):
        number = tl.program_id(0) + ahead
        _key_value_gradient_tile(
            q, k, v, do, statistics, dq, dk, dv, gradients, number, sizes, layout, features, constants
        )


@triton.jit
def _key_value_gradient_tile(
    q, k, v, do, statistics, dq, dk, dv, gradients, number, sizes, layout, features, constants
):
    """Compute dK and dV of tile number `number` of keys, from all the queries that meet it."""
    DESCRIPTORS: tl.constexpr = constants.DESCRIPTORS
    WARP_SPECIALIZE: tl.constexpr = constants.WARP_SPECIALIZE
    head_dim: tl.constexpr = constants.head_dim
    value_dim: tl.constexpr = constants.value_dim
    BLOCK_M: tl.constexpr = constants.BLOCK_M
    BLOCK_N: tl.constexpr = constants.BLOCK_N
    BLOCK_D: tl.constexpr = constants.BLOCK_D
    BLOCK_V: tl.constexpr = constants.BLOCK_V
    # Under causality the first keys meet the most queries.
    tile, row = tile_and_row(number, sizes)
    kv_head = (row % (sizes.heads // layout.group)).to(tl.int64)
    batch = (row // (sizes.heads // layout.group)).to(tl.int64)
    first = tile * BLOCK_N
    k_start, keys, stored_keys = key_bounds(batch, layout, sizes.keys, sizes.key_tokens)
    q_start, queries = query_bounds(batch, layout, sizes.queries, sizes.query_tokens)
    span = Span(queries, keys, keys - queries if constants.BOTTOM_RIGHT else 0, prefix_length(batch, layout))
    k_pointer = at_head(k, batch, kv_head, k_start)
    v_pointer = at_head(v, batch, kv_head, k_start)
    # Specialised warps can use a tile from outside their loop only if a descriptor loaded it.
    k_source = rows_of(k_pointer, keys, k, head_dim, BLOCK_N, BLOCK_D, WARP_SPECIALIZE)
    v_source = rows_of(v_pointer, keys, v, value_dim, BLOCK_N, BLOCK_V, WARP_SPECIALIZE)
    # An empty sequence's descriptor has one row, which does not exist: start after it.
    k_first = tl.where(first < keys, first, tl.maximum(first, 1)) if WARP_SPECIALIZE else first
    key_tile = load_rows(k_source, k_first, keys, k, head_dim, BLOCK_N, BLOCK_D, True, WARP_SPECIALIZE)
    value_tile = load_rows(v_source, k_first, keys, v, value_dim, BLOCK_N, BLOCK_V, True, WARP_SPECIALIZE)
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    owned = _KeyTiles(key_tile, value_tile)
    ranges = query_ranges(first, span, features, constants)
    for member in range(layout.group):
        head = kv_head * layout.group + member
        place = _KeyPlace(batch, head, batch * sizes.heads + head, first)
        of_rows = _statistics_of(statistics, batch, head, q_start, sizes, layout, BLOCK_M, WARP_SPECIALIZE)
        q_source = rows_of(at_head(q, batch, head, q_start), queries, q, head_dim, BLOCK_M, BLOCK_D, DESCRIPTORS)
        do_source = rows_of(at_head(do, batch, head, q_start), queries, do, value_dim, BLOCK_M, BLOCK_V, DESCRIPTORS)
        dq_source = dq.pointer
        if dq.pointer is not None:
            dq_pointer = at_head(dq, batch, head, q_start)
            dq_source = rows_of(dq_pointer, queries, dq, head_dim, BLOCK_M, BLOCK_D, DESCRIPTORS)
        head_features = HeadFeatures(
            scale_of(features, head),
            slope_of(features, batch, head),
            mask_at_head(features, batch, head),
            bias_at_head(features, batch, head),
            relative_at_head(features, head),
            listed_at(features, batch, head, first),
        )
        if features.lists is not None:
            ranges = listed_ranges(head_features.listed)
        sources = _QuerySources(q_source, do_source, dq_source)
        no_sums = tl.zeros((BLOCK_N,), tl.float32)
        sums = _KeySums(dk_tile, dv_tile, no_sums, no_sums)
        for tested in tl.static_range(1 if constants.LOOPS == ONE_LOOP else 0, 1 if constants.LOOPS == UNTESTED else 2):
            sums = _add_queries(
                sums, owned, sources, of_rows, q, do, dq, gradients, place, ranges, span, head_features, features,
                constants, tested == 1,
            )  # fmt: skip
        dk_tile, dv_tile, dslope, dscale = sums
        _store_program_sums(gradients, dslope, dscale, batch, head, sizes.heads, tile, sizes.tiles)
    # With a scale per head, the gradients of the scores were already scaled, head by head.
    dk_scale = features.scale if features.head_scales is None else 1.0
    dk_pointer = at_head(dk, batch, kv_head, k_start)
    dv_pointer = at_head(dv, batch, kv_head, k_start)
    store_rows(dk_pointer, dk_tile * dk_scale, first, stored_keys, dk, head_dim, BLOCK_N, BLOCK_D)
    store_rows(dv_pointer, dv_tile, first, stored_keys, dv, value_dim, BLOCK_N, BLOCK_V)


@triton.jit
def _add_queries(
    sums,
    owned,
    sources,
    of_rows,
    q,
    do,
    dq,
    gradients,
    place,
    ranges,
    span,
    head_features,
    features,
    constants,
    TESTED: tl.constexpr,
):
    """Add the part of one head's queries to the `_KeySums` of the `_KeyTiles` that the program owns.

    It takes the tiles of queries that need a test if TESTED, else those that need none.
    """
    DESCRIPTORS: tl.constexpr = constants.DESCRIPTORS
    INPUT_PRECISION: tl.constexpr = constants.INPUT_PRECISION
    head_dim: tl.constexpr = constants.head_dim
    value_dim: tl.constexpr = constants.value_dim
    BLOCK_M: tl.constexpr = constants.BLOCK_M
    BLOCK_N: tl.constexpr = constants.BLOCK_N
    BLOCK_D: tl.constexpr = constants.BLOCK_D
    BLOCK_V: tl.constexpr = constants.BLOCK_V
    dk_tile, dv_tile, dslope, dscale = sums
    key_tile, value_tile = owned
    key = (place.first_key + tl.arange(0, BLOCK_N))[:, None]
    limits = query_limits(key, span, features)
    for index in tl.range(
        0,
        tiles_in(ranges, TESTED, BLOCK_M),
        warp_specialize=constants.WARP_SPECIALIZE,
        disable_licm=not constants.HOIST,
    ):
        start = tile_start(index, ranges, head_features.listed, TESTED, BLOCK_M)
        query = start + tl.arange(0, BLOCK_M)
        lse_log2, delta = _load_statistics(of_rows, start, span.queries, BLOCK_M, TESTED, constants.WARP_SPECIALIZE)
        if not constants.WARP_SPECIALIZE:
            lse_log2 = _loaded_once(lse_log2)
            delta = _loaded_once(delta)
        q_tile = load_rows(sources.q, start, span.queries, q, head_dim, BLOCK_M, BLOCK_D, TESTED, DESCRIPTORS)
        do_tile = load_rows(sources.do, start, span.queries, do, value_dim, BLOCK_M, BLOCK_V, TESTED, DESCRIPTORS)
        zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        products = dot(key_tile, tl.trans(q_tile), zeros, INPUT_PRECISION)
        keep = None
        if features.seed is not None:
            keep = tl.trans(dropout_keep(features, place.dropout_row, start, place.first_key, BLOCK_M, BLOCK_N))
        bits = bits_at(features, head_features.listed, place.first_key, index, start, TESTED, BLOCK_M)
        weights, dscores, dbias = _weights_and_gradient(
            products,
            dot(value_tile, tl.trans(do_tile), zeros, INPUT_PRECISION),
            lse_log2[None, :],
            delta[None, :],
            query[None, :],
            key,
            start,
            limits,
            span,
            head_features,
            bits,
            keep,
            features,
            place,
            constants,
            TESTED,
            False,
        )
        dv_tile = dot(round_to(weights, do_tile.dtype), do_tile, dv_tile, INPUT_PRECISION)
        dslope, dscale = _add_score_gradients(
            gradients, products, dscores, dbias, dslope, dscale, query[None, :], key, span, place.batch, place.head, 1
        )
        if features.head_scales is not None:
            dscores *= head_features.scale
        dscores = round_to(dscores, q_tile.dtype)
        dk_tile = dot(dscores, q_tile, dk_tile, INPUT_PRECISION)
        if dq.pointer is not None:
            if DESCRIPTORS and BLOCK_M < 64:
                # wgmma needs 64 rows. BLOCK_M has fewer, head_dim has enough: dQ^T = K^T dS.
                zeros = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
                dq_tile = tl.trans(dot(tl.trans(key_tile), dscores, zeros, INPUT_PRECISION))
            else:
                zeros = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
                dq_tile = dot(tl.trans(dscores), key_tile, zeros, INPUT_PRECISION)
            if DESCRIPTORS:
                sources.dq.atomic_add([start, 0], dq_tile)
            else:
                tl.atomic_add(
                    row_pointers(sources.dq, start, dq, BLOCK_M, BLOCK_D),
                    dq_tile,
                    mask=row_mask(start, span.queries, head_dim, BLOCK_M, BLOCK_D),
                    sem="relaxed",
                )
    return _KeySums(dk_tile, dv_tile, dslope, dscale)


@triton.jit(do_not_specialize=Sizes._fields)
def _query_gradient_kernel(
    q,
    k,
    v,
    do,
    o,
    lse,
    dlse,
    statistics,
    dq,
    gradients,
    all_tiles,
    tiles,
    heads_in_cache,
    heads,
    queries,
    keys,
    query_tokens,
    key_tokens,
    layout,
    features,
    constants,
):
    """Compute dQ = scale dS K in registers, without additions in memory, and the `ScoreGradients`.

    Args:
        o, lse, dlse: see `_row_statistics_kernel`, in whose place this kernel writes `statistics`. Specialised warps
            need them written before.

    The other arguments are those of `_key_value_gradient_kernel`; dq is written.
    """
    sizes = Sizes(all_tiles, tiles, heads_in_cache, heads, queries, keys, query_tokens, key_tokens)
    stop, step = tiles_ahead(all_tiles, constants.PERSISTENT)
    for ahead in range(0, stop, step):
        number = tl.program_id(0) + ahead
        _query_gradient_tile(
            q, k, v, do, o, lse, dlse, statistics, dq, gradients, number, sizes, layout, features, constants
        )


@triton.jit
def _query_gradient_tile(
    q, k, v, do, o, lse, dlse, statistics, dq, gradients, number, sizes, layout, features, constants
):
    """Compute dQ of tile number `number` of queries, from all the keys that it meets."""
    heads = sizes.heads
    DESCRIPTORS: tl.constexpr = constants.DESCRIPTORS
    head_dim: tl.constexpr = constants.head_dim
    value_dim: tl.constexpr = constants.value_dim
    BLOCK_M: tl.constexpr = constants.BLOCK_M
    BLOCK_N: tl.constexpr = constants.BLOCK_N
    BLOCK_D: tl.constexpr = constants.BLOCK_D
    BLOCK_V: tl.constexpr = constants.BLOCK_V
    rank, row = tile_and_row(number, sizes)
    head = (row % heads).to(tl.int64)
    batch = (row // heads).to(tl.int64)
    # Under causality the last queries meet the most keys.
    tile = sizes.tiles - 1 - rank
    first = tile * BLOCK_M
    q_start, queries = query_bounds(batch, layout, sizes.queries, sizes.query_tokens)
    k_start, keys, _stored_keys = key_bounds(batch, layout, sizes.keys, sizes.key_tokens)
    span = Span(queries, keys, keys - queries if constants.BOTTOM_RIGHT else 0, prefix_length(batch, layout))
    kv_head = head // layout.group
    k_source = rows_of(at_head(k, batch, kv_head, k_start), keys, k, head_dim, BLOCK_N, BLOCK_D, DESCRIPTORS)
    v_source = rows_of(at_head(v, batch, kv_head, k_start), keys, v, value_dim, BLOCK_N, BLOCK_V, DESCRIPTORS)
    q_source = rows_of(at_head(q, batch, head, q_start), queries, q, head_dim, BLOCK_M, BLOCK_D, DESCRIPTORS)
    do_source = rows_of(at_head(do, batch, head, q_start), queries, do, value_dim, BLOCK_M, BLOCK_V, DESCRIPTORS)
    # An empty sequence's descriptor has one row, which does not exist: start after it.
    q_first = tl.where(first < queries, first, tl.maximum(first, 1))
    q_tile = load_rows(q_source, q_first, queries, q, head_dim, BLOCK_M, BLOCK_D, True, DESCRIPTORS)
    do_tile = load_rows(do_source, q_first, queries, do, value_dim, BLOCK_M, BLOCK_V, True, DESCRIPTORS)
    if constants.WARP_SPECIALIZE:
        of_rows = _statistics_of(statistics, batch, head, q_start, sizes, layout, BLOCK_M, True)
    else:
        of_rows = _statistics_of_tile(
            o, do_tile, lse, dlse, statistics, batch, head, q_start, first, queries, value_dim
        )
    head_features = HeadFeatures(
        scale_of(features, head),
        slope_of(features, batch, head),
        mask_at_head(features, batch, head),
        bias_at_head(features, batch, head),
        relative_at_head(features, head),
        listed_at(features, batch, head, first),
    )
    owned = _QueryTiles(q_tile, do_tile)
    sources = _KeySources(k_source, v_source)
    place = _QueryPlace(batch, head, batch * heads + head, first)
    sums = _QuerySums(
        tl.zeros((BLOCK_M, BLOCK_D), tl.float32), tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    )
    if features.lists is not None:
        ranges = listed_ranges(head_features.listed)
    else:
        ranges = key_ranges(first, span, features, constants)
    for tested in tl.static_range(1 if constants.LOOPS == ONE_LOOP else 0, 1 if constants.LOOPS == UNTESTED else 2):
        sums = _add_keys(
            sums, owned, sources, of_rows, k, v, gradients, place, ranges, span, head_features, features, constants,
            tested == 1,
        )  # fmt: skip
    dq_tile, dslope, dscale = sums
    _store_program_sums(gradients, dslope, dscale, batch, head, heads, tile, sizes.tiles)
    dq_pointer = at_head(dq, batch, head, q_start)
    store_rows(dq_pointer, dq_tile * head_features.scale, first, queries, dq, head_dim, BLOCK_M, BLOCK_D)


@triton.jit
def _add_keys(
    sums,
    owned,
    sources,
    of_rows,
    k,
    v,
    gradients,
    place,
    ranges,
    span,
    head_features,
    features,
    constants,
    TESTED: tl.constexpr,
):
    """Add the part of the keys to the `_QuerySums` of the `_QueryTiles` that the program owns.

    It takes the tiles of keys that need a test if TESTED, else those that need none. of_rows is LSE and delta of the
    queries or, for specialised warps, the `_StatisticsSource`: the compiler cannot give these warps a vector from
    outside their loop.
    """
    BLOCK_M: tl.constexpr = constants.BLOCK_M
    BLOCK_N: tl.constexpr = constants.BLOCK_N
    DESCRIPTORS: tl.constexpr = constants.DESCRIPTORS
    dq_tile, dslope, dscale = sums
    q_tile, do_tile = owned
    query = (place.first_query + tl.arange(0, BLOCK_M))[:, None]
    limits = key_limits(query, span, features)
    if not constants.WARP_SPECIALIZE:
        lse_log2, delta = of_rows
    for index in tl.range(
        0,
        tiles_in(ranges, TESTED, BLOCK_N),
        warp_specialize=constants.WARP_SPECIALIZE,
        disable_licm=not constants.HOIST,
    ):
        start = tile_start(index, ranges, head_features.listed, TESTED, BLOCK_N)
        key = (start + tl.arange(0, BLOCK_N))[None, :]
        key_tile = load_rows(
            sources.k, start, span.keys, k, constants.head_dim, BLOCK_N, constants.BLOCK_D, TESTED, DESCRIPTORS
        )
        value_tile = load_rows(
            sources.v, start, span.keys, v, constants.value_dim, BLOCK_N, constants.BLOCK_V, TESTED, DESCRIPTORS
        )
        if constants.WARP_SPECIALIZE:
            lse_log2, delta = _load_statistics(of_rows, place.first_query, span.queries, BLOCK_M, True, True)
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        products = dot(q_tile, tl.trans(key_tile), zeros, constants.INPUT_PRECISION)
        keep = None
        if features.seed is not None:
            keep = dropout_keep(features, place.dropout_row, place.first_query, start, BLOCK_M, BLOCK_N)
        bits = bits_at(features, head_features.listed, place.first_query, index, start, TESTED, BLOCK_N)
        _, dscores, dbias = _weights_and_gradient(
            products,
            dot(do_tile, tl.trans(value_tile), zeros, constants.INPUT_PRECISION),
            lse_log2[:, None],
            delta[:, None],
            query,
            key,
            start,
            limits,
            span,
            head_features,
            bits,
            keep,
            features,
            place,
            constants,
            TESTED,
            True,
        )
        dslope, dscale = _add_score_gradients(
            gradients, products, dscores, dbias, dslope, dscale, query, key, span, place.batch, place.head, 0
        )
        dq_tile = dot(round_to(dscores, key_tile.dtype), key_tile, dq_tile, constants.INPUT_PRECISION)
    return _QuerySums(dq_tile, dslope, dscale)


@triton.jit(do_not_specialize=["tiles", "heads", "queries"])
def _scale_and_round_kernel(
    total, dq, tiles, heads, queries, scale, head_dim: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Compute dQ = scale * `total`, the float32 sum of its parts; an `Operand` each.

    Packed tokens count as one sequence. tiles is the number of tiles of a head; heads and queries are sizes of dq.
    """
    program = tl.program_id(0)
    first = program % tiles * BLOCK_M
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    source = at_head(total, batch, head, 0)
    tile = load_rows(source, first, queries, total, head_dim, BLOCK_M, BLOCK_D, True, False)
    store_rows(at_head(dq, batch, head, 0), tile * scale, first, queries, dq, head_dim, BLOCK_M, BLOCK_D)


def attention_backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    arguments: AttentionArguments,
    needed: Learned[bool],
) -> AttentionGradients:
    """Return the gradients of checked arguments; None for learned arguments that are not `needed`."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    configuration = _key_configuration(query, value, arguments, deterministic)
    two_kernels = deterministic or configuration.two_kernels
    lse_log2, delta = _empty_statistic(lse), _empty_statistic(lse)
    grad_query, grad_key, grad_value = empty_gradient(query), empty_gradient(key), empty_gradient(value)
    sums = _NO_SUMS
    if True in needed:
        length, block = arguments.max_seqlen_k, configuration.block_n
        if two_kernels:
            length, block = arguments.max_seqlen_q, query_gradient_configuration(query, value, arguments).block_m
        sums = _score_sums(query, arguments, needed, deterministic, triton.cdiv(length, block))
    outputs = [lse_log2, delta, grad_query, grad_key, grad_value]
    if not two_kernels:
        outputs.append(torch.zeros_like(grad_query, dtype=torch.float32))
    inputs = (*with_aligned_rows(query, key, value, grad_output, output), lse, grad_lse)
    precision = input_precision(query.dtype)
    _launch_backward(*inputs, tuple(outputs), deterministic, precision, *sums, *arguments.for_launch())
    learned = _learned_gradients(sums, lse, delta, arguments, needed) if True in needed else _NOTHING_LEARNED
    return AttentionGradients(grad_query, grad_key, grad_value, *learned)


def _key_configuration(
    query: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments, deterministic: bool
) -> AttentionConfiguration:
    """The configuration of the kernel whose programs own tiles of keys."""
    choose = deterministic_configuration if deterministic else backward_configuration
    return choose(query, value, arguments)


def _empty_statistic(lse: torch.Tensor) -> torch.Tensor:
    """A float32 number for each row, like `lse`, in rows of a multiple of 16 bytes, as descriptors need them."""
    rows = lse.shape[-1]
    if rows % 4 == 0:
        return torch.empty_like(lse)
    return lse.new_empty((*lse.shape[:-1], (rows + 3) // 4 * 4))[..., :rows]


class _ScoreSums(NamedTuple):
    """The tensors in which the gradients of `ScoreGradients` add up."""

    bias: torch.Tensor | None
    relative: torch.Tensor | None
    slopes: torch.Tensor | None
    head_scales: torch.Tensor | None

    def as_argument(self) -> ScoreGradients:
        """Return the tensors as kernels take them."""
        return ScoreGradients(*addend(self.bias), *relative(self.relative), self.slopes, self.head_scales)


_NO_SUMS = _ScoreSums(None, None, None, None)
_NOTHING_LEARNED: Learned[torch.Tensor | None] = Learned(None, None, None, None, None)


def _score_sums(
    query: torch.Tensor, arguments: AttentionArguments, needed: Learned[bool], deterministic: bool, tiles: int
) -> _ScoreSums:
    """Return zeros for the sums that are needed.

    If determinism is asked for, programs share no element: the whole gradient of the scores is stored, and the
    gradients of bias and relative bias are summed from it later.
    """
    batch, heads = arguments.batch(query), query.shape[1]
    zeros = functools.partial(torch.zeros, dtype=torch.float32, device=query.device)
    parts = functools.partial(zeros, batch, heads, max(tiles, 1))
    bias_shape = arguments.bias.shape if arguments.bias is not None and needed.bias else None
    relative_shape = arguments.relative_bias.shape if arguments.relative_bias is not None and needed.relative else None
    if deterministic and (bias_shape is not None or relative_shape is not None):
        bias_shape = torch.Size((batch, heads, arguments.max_seqlen_q, arguments.max_seqlen_k))
        relative_shape = None
    return _ScoreSums(
        bias=None if bias_shape is None else zeros(bias_shape),
        relative=None if relative_shape is None else zeros(relative_shape),
        slopes=parts() if needed.alibi_slopes else None,
        head_scales=parts() if needed.head_scales else None,
    )


def _learned_gradients(
    sums: _ScoreSums,
    lse: torch.Tensor,
    delta: torch.Tensor,
    arguments: AttentionArguments,
    needed: Learned[bool],
) -> Learned[torch.Tensor | None]:
    """Return the gradients in the shapes and dtypes of their arguments."""
    grad_bias = grad_relative = grad_slopes = grad_scales = grad_sinks = None
    scores, by_distance = sums.bias, sums.relative
    if needed.bias and arguments.bias is not None and scores is not None:
        grad_bias = scores.sum_to_size(arguments.bias.shape).to(arguments.bias.dtype)
    if needed.relative and arguments.relative_bias is not None:
        if by_distance is None:
            assert scores is not None
            by_distance = sum_by_distance(scores, arguments)
        grad_relative = by_distance.to(arguments.relative_bias.dtype)
    if sums.slopes is not None and arguments.alibi_slopes is not None:
        grad_slopes = sums.slopes.sum(-1).sum_to_size(arguments.alibi_slopes.shape)
    if sums.head_scales is not None:
        grad_scales = sums.head_scales.sum((0, 2)) * arguments.scale
    if needed.sinks and arguments.sinks is not None:
        # A sink's weight in each row is exp(sink - lse). It has no value, so its gradient is -weight * delta.
        weights = torch.exp(arguments.sinks[:, None] - lse)
        grad_sinks = -(weights * delta).sum((0, 2) if lse.dim() == 3 else 1)
    return Learned(grad_bias, grad_relative, grad_slopes, grad_scales, grad_sinks)


@kept_launch
def _launch_backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_output: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None,
    outputs: tuple[torch.Tensor, ...],
    deterministic: bool,
    precision: str,  # The kernels' constants depend on it, so it distinguishes kinds of calls.
    *fields: Any,
) -> list[Launch]:
    """Describe the launches of a backward, in their order.

    Args:
        outputs: lse_log2, delta, the gradients of query, key and value, and with one kernel a float32 sum for query's.
        fields: the four tensors of a `_ScoreSums`, then the values of `AttentionArguments.for_launch`.
    """
    lse_log2, delta, grad_query, grad_key, grad_value, *totals = outputs
    sums = _ScoreSums(*fields[: len(_NO_SUMS)])
    arguments = AttentionArguments.of_launch(fields[len(_NO_SUMS) :])
    results, of_rows = _Results(output, lse, grad_lse), statistics(lse_log2, delta)
    inputs, key_grads = (query, key, value, grad_output, of_rows), (grad_key, grad_value)
    configuration = _key_configuration(query, value, arguments, deterministic)
    if totals:
        scale = 1.0 if arguments.head_scales is not None else arguments.scale
        launches = [
            _row_statistics(results, grad_output, of_rows),
            _key_value_gradient(*inputs, totals[0], *key_grads, sums, arguments, configuration),
            _scale_and_round(totals[0], grad_query, scale),
        ]
    else:
        launches = [
            *_query_gradient(*inputs, results, grad_query, sums, arguments),
            _key_value_gradient(*inputs, None, *key_grads, _NO_SUMS, arguments, configuration),
        ]
    return [launch for launch in launches if launch is not None]


def _key_value_gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_output: torch.Tensor,
    of_rows: Statistics,
    total: torch.Tensor | None,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    sums: _ScoreSums,
    arguments: AttentionArguments,
    configuration: AttentionConfiguration,
) -> Launch | None:
    """Describe the launch that computes the gradients of key and value, or return None if there is nothing to do.

    Args:
        of_rows: the statistics that a launch before this one writes.
        total: the float32 sum to which query's gradient is added; None if another kernel computes that gradient.
        sums: the sums to which this kernel adds the gradients of the scores.
    """
    tiles = triton.cdiv(arguments.max_seqlen_k, configuration.block_n)
    all_tiles = tiles * key.shape[1] * arguments.batch(query)
    if all_tiles == 0 or key.numel() == 0:
        return None
    descriptors = configuration.descriptors and uses_descriptors(
        query, grad_output, *([] if total is None else [total])
    )
    loops = loops_of(
        configuration,
        arguments,
        needs_tests(arguments, arguments.max_seqlen_q, configuration.block_m)
        or needs_tests(arguments, arguments.max_seqlen_k, configuration.block_n),
    )
    programs = launch_size(all_tiles, query, arguments, configuration)
    together = heads_in_cache(query, grad_output, arguments)
    return Launch(
        _key_value_gradient_kernel,
        (programs,),
        {
            "q": operand(query),
            "k": operand(key),
            "v": operand(value),
            "do": operand(grad_output),
            "statistics": of_rows,
            "dq": operand(total),
            "dk": operand(grad_key),
            "dv": operand(grad_value),
            "gradients": sums.as_argument(),
            **sizes(query, key, arguments, all_tiles=all_tiles, tiles=tiles, heads_in_cache=together)._asdict(),
            "layout": layout(query, key, arguments),
            "features": features(arguments, by_key=True),
            "constants": constants_of_call(
                query,
                value,
                arguments,
                configuration,
                loops=loops,
                persistent=programs < all_tiles,
                descriptors=descriptors,
                warp_specialize=descriptors
                and specializes_warps(configuration, arguments, loops)
                and uses_descriptors(key, value)
                # The loop over the heads that share keys would be around the specialised one: the compiler refuses.
                and query.shape[1] == key.shape[1],
            ),
            **configuration.options,
        },
        descriptors,
    )


def _query_gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_output: torch.Tensor,
    of_rows: Statistics,
    results: _Results,
    grad_query: torch.Tensor,
    sums: _ScoreSums,
    arguments: AttentionArguments,
) -> list[Launch | None]:
    """Describe the launches that compute the statistics of the queries and their gradient alone."""
    configuration = query_gradient_configuration(query, value, arguments)
    tiles = triton.cdiv(arguments.max_seqlen_q, configuration.block_m)
    all_tiles = tiles * query.shape[1] * arguments.batch(query)
    if all_tiles == 0 or query.numel() == 0:
        return []
    descriptors = configuration.descriptors and uses_descriptors(query, key, value, grad_output)
    loops = loops_of(configuration, arguments, needs_tests(arguments, arguments.max_seqlen_k, configuration.block_n))
    warp_specialize = descriptors and specializes_warps(configuration, arguments, loops)
    programs = launch_size(all_tiles, query, arguments, configuration)
    together = heads_in_cache(key, value, arguments)
    launch = Launch(
        _query_gradient_kernel,
        (programs,),
        {
            "q": operand(query),
            "k": operand(key),
            "v": operand(value),
            "do": operand(grad_output),
            "o": operand(results.output),
            "lse": rows(results.lse),
            "dlse": rows(results.grad_lse),
            "statistics": of_rows,
            "dq": operand(grad_query),
            "gradients": sums.as_argument(),
            **sizes(query, key, arguments, all_tiles=all_tiles, tiles=tiles, heads_in_cache=together)._asdict(),
            "layout": layout(query, key, arguments),
            "features": features(arguments),
            "constants": constants_of_call(
                query,
                value,
                arguments,
                configuration,
                loops=loops,
                persistent=programs < all_tiles,
                descriptors=descriptors,
                warp_specialize=warp_specialize,
            ),
            **configuration.options,
        },
        descriptors,
    )
    return [_row_statistics(results, grad_output, of_rows), launch] if warp_specialize else [launch]


def _row_statistics(results: _Results, grad_output: torch.Tensor, of_rows: Statistics) -> Launch | None:
    """Describe the launch that writes the statistics of each query, or return None if there is none."""
    output, lse, grad_lse = results
    if lse.numel() == 0:
        return None
    block_v, block_m = _row_blocks(output)
    batch, heads, length = lse.shape if lse.dim() == 3 else (1, *lse.shape)
    tiles = triton.cdiv(length, block_m)
    return Launch(
        _row_statistics_kernel,
        (tiles * heads * batch,),
        {
            "o": operand(output),
            "do": operand(grad_output),
            "lse": rows(lse),
            "dlse": rows(grad_lse),
            "statistics": of_rows,
            "tiles": tiles,
            "heads": heads,
            "queries": length,
            "value_dim": output.shape[-1],
            "BLOCK_M": block_m,
            "BLOCK_V": block_v,
            **COMPILER_OPTIONS,
        },
    )


def _scale_and_round(total: torch.Tensor, grad_query: torch.Tensor, scale: float) -> Launch | None:
    """Describe the launch that rounds the float32 sum `total` to query's gradient, or return None if it is empty."""
    if total.numel() == 0:
        return None
    block_d, block_m = _row_blocks(total)
    batch, heads, length, head_dim = (
        total.shape if total.dim() == 4 else (1, total.shape[1], len(total), total.shape[2])
    )
    tiles = triton.cdiv(length, block_m)
    return Launch(
        _scale_and_round_kernel,
        (tiles * heads * batch,),
        {
            "total": operand(total),
            "dq": operand(grad_query),
            "tiles": tiles,
            "heads": heads,
            "queries": length,
            "scale": scale,
            "head_dim": head_dim,
            "BLOCK_M": block_m,
            "BLOCK_D": block_d,
            **COMPILER_OPTIONS,
        },
    )


def _row_blocks(tensor: torch.Tensor) -> tuple[int, int]:
    """Return columns and rows of a tile of about 4,096 elements."""
    columns = max(16, triton.next_power_of_2(tensor.shape[-1]))
    return columns, 4096 // columns
