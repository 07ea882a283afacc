"""Attention backward: weights are recomputed tile by tile from the log-sum-exp.

With P the weights, dP = dO V^T and delta = rowsum(dO * O) - dLSE: dS = P * (dP - delta), dQ = scale dS K,
dK = scale dS^T Q, dV = P^T dO (FlashAttention-2, Dao 2023, https://arxiv.org/abs/2307.08691).

A program owns a tile of keys and walks over the queries of every head that shares them: five products a tile pair, dK
and dV in registers, dQ (and the gradients of bias, relative bias and slopes) added up in memory. Those additions come
in any order; when determinism is asked for, the programs leave them out and another kernel, whose programs own tiles
of queries, recomputes the weights and forms dQ by itself.
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
    addend,
    features,
    lengths,
    operand,
    relative,
    rows,
    sizes,
)
from fastformer_kernels.attention.launch import (
    AttentionConfiguration,
    backward_configuration,
    deterministic_configuration,
    has_borders,
    launch_size,
    loops_of,
    options_of_call,
    section_of,
    specializes_warps,
    uses_descriptors,
)
from fastformer_kernels.attention.tiles import (
    LOG2_E,
    NO_BORDERS,
    ONE_LOOP,
    bias_and_mask,
    bias_at_head,
    border_start,
    border_tiles,
    dropout_keep,
    key_bounds,
    key_ranges,
    load_rows,
    mask_at_head,
    prefix_length,
    query_bounds,
    query_ranges,
    relative_at_head,
    row_mask,
    row_pointers,
    rows_of,
    scale_of,
    slope_of,
    store_rows,
    tanh,
    tile_of_work,
)
from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.launch import COMPILER_OPTIONS
from fastformer_kernels.precision import dot, input_precision, round_to


class ScoreGradients(NamedTuple):
    """Where the gradients of what is added to the scores go.

    Attributes:
        bias: float32, like the bias, added to atomically; with its strides, those of an `Addend`.
        relative, max_distance: a `Relative`, float32, added to atomically.
        slopes, head_scales: (batch, heads, tiles) float32, one element for each program and head.
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


@triton.jit(do_not_specialize=["tiles", "heads", "queries"])
def _row_statistics_kernel(
    o,
    do,
    lse,
    dlse,
    exponent,
    delta,
    tiles,
    heads,
    queries,
    value_dim: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """What every tile of a row needs: its log-sum-exp in units of log2, +inf for a row without keys, which makes its
    weights zero, and delta = rowsum(dO * O) - dLSE. Packed tokens count as one sequence."""
    program = tl.program_id(0)
    first = program % tiles * BLOCK_M
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    o_pointer = o.pointer + batch * o.stride_b + head * o.stride_h
    do_pointer = do.pointer + batch * do.stride_b + head * do.stride_h
    o_tile = load_rows(o_pointer, first, queries, o.stride_row, o.stride_dim, value_dim, BLOCK_M, BLOCK_V, True, False)
    do_tile = load_rows(
        do_pointer, first, queries, do.stride_row, do.stride_dim, value_dim, BLOCK_M, BLOCK_V, True, False
    )
    sums = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), axis=1)
    row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    if dlse.pointer is not None:
        at = batch * dlse.stride_b + head * dlse.stride_h + row * dlse.stride_row
        sums -= tl.load(dlse.pointer + at, mask=row < queries, other=0.0)
    at = batch * lse.stride_b + head * lse.stride_h + row
    row_lse = tl.load(lse.pointer + at, mask=row < queries, other=0.0)
    tl.store(
        exponent.pointer + at, tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E), mask=row < queries
    )
    tl.store(delta.pointer + at, sums, mask=row < queries)


@triton.jit
def _weights_and_gradient(
    raw_scores,
    dweights,
    exponent,
    delta,
    query,
    key,
    queries,
    keys,
    offset,
    prefix,
    scale,
    slope,
    mask_pointer,
    bias_pointer,
    relative_pointer,
    keep,
    features,
    BORDER: tl.constexpr,
    PREFIX: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
):
    """From raw products Q K^T and dO V^T of one tile, in either orientation, and what dropout keeps: the weights as
    they met V, the gradient of the scores before the softcap (to be scaled), and after it (the bias's)."""
    multiplier = scale * LOG2_E if FOLD_SCALE else 1.0
    scores = raw_scores
    if features.softcap is not None:
        capped = tanh(raw_scores * (scale / features.softcap))
        scores = capped * (features.softcap * LOG2_E)
    elif not FOLD_SCALE:
        scores = raw_scores * (scale * LOG2_E)
    scores = bias_and_mask(
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
        PREFIX,
        BORDER,
    )
    weights = tl.exp2(scores * multiplier - exponent)
    dropped = weights
    if features.seed is not None:
        dropped = tl.where(keep, weights * features.kept_scale, 0.0)
        dweights = tl.where(keep, dweights * features.kept_scale, 0.0)
    dbias = weights * (dweights - delta)
    dscores = dbias
    if features.softcap is not None:
        dscores = dbias * (1.0 - capped * capped)
    return dropped, dscores, dbias


@triton.jit
def _load_row_statistics(exponent_pointer, delta_pointer, query, queries, CHECK: tl.constexpr):
    """What `_row_statistics_kernel` stored of some rows; with CHECK, weights of zero for those beyond the end."""
    if CHECK:
        valid = query < queries
        exponent = tl.load(exponent_pointer + query, mask=valid, other=float("inf"))
        return exponent, tl.load(delta_pointer + query, mask=valid, other=0.0)
    else:
        return tl.load(exponent_pointer + query), tl.load(delta_pointer + query)


@triton.jit
def _loaded_once(x):
    """A loaded vector `x`. Triton 3.6 would have each thread copy every element that it needs, which takes dozens of
    registers for addresses; it cannot move a load to the other side of a scan, here of one element each."""
    return tl.reshape(tl.cumsum(x[:, None], axis=1), x.shape)


@triton.jit
def _add_score_gradients(
    gradients,
    raw_scores,
    dscores,
    dbias,
    dslope,
    dscale,
    query,
    key,
    queries,
    keys,
    offset,
    batch,
    head,
    QUERY_AXIS: tl.constexpr,
):
    """Add a tile of the scores' gradient to that of bias and relative bias; returns the sums so far, by row of the
    tile, of the slope's gradient and the scale's."""
    if gradients.bias is not None:
        pointer = bias_at_head(gradients, batch, head)
        at_query = query.to(tl.int64) * gradients.bias_stride_m
        at_key = key.to(tl.int64) * gradients.bias_stride_n
        valid = (query < queries) & (key < keys)
        # A stride of zero means that the bias broadcasts: sum first what shares an element.
        if gradients.bias_stride_m == 0 and gradients.bias_stride_n == 0:
            total = tl.sum(tl.sum(dbias, axis=1), axis=0)
            tl.atomic_add(pointer, total, sem="relaxed")
        elif gradients.bias_stride_m == 0:
            sums = tl.sum(dbias, axis=QUERY_AXIS, keep_dims=True)
            tl.atomic_add(pointer + at_key, sums, mask=key < keys, sem="relaxed")
        elif gradients.bias_stride_n == 0:
            sums = tl.sum(dbias, axis=1 - QUERY_AXIS, keep_dims=True)
            tl.atomic_add(pointer + at_query, sums, mask=query < queries, sem="relaxed")
        else:
            tl.atomic_add(pointer + at_query + at_key, dbias, mask=valid, sem="relaxed")
    if gradients.relative is not None:
        _add_relative_gradient(gradients, dbias, query, key, offset, head, QUERY_AXIS)
    if gradients.slopes is not None:
        distance = tl.abs(key - query - offset).to(tl.float32)
        dslope -= tl.sum(dbias * distance, axis=1)
    if gradients.head_scales is not None:
        dscale += tl.sum(dscores * raw_scores, axis=1)
    return dslope, dscale


@triton.jit
def _store_program_sums(gradients, dslope, dscale, batch, head, heads, tile, tiles):
    """Store what `_add_score_gradients` summed for one head."""
    at = (batch * heads + head) * tiles + tile
    if gradients.slopes is not None:
        tl.store(gradients.slopes + at, tl.sum(dslope))
    if gradients.head_scales is not None:
        tl.store(gradients.head_scales + at, tl.sum(dscale))


@triton.jit
def _add_relative_gradient(gradients, dbias, query, key, offset, head, QUERY_AXIS: tl.constexpr):
    """Sum a tile along its diagonals, on each of which key - query is constant, and add the sums.

    Row i is rotated by i places, which turns diagonals into columns: column c then holds the diagonal c, and that
    which comes COLUMNS later, where the rotation wrapped around.
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
    exponent,
    delta,
    dq,
    dk,
    dv,
    gradients,
    works,
    tiles,
    section,
    heads,
    queries,
    keys,
    query_tokens,
    key_tokens,
    group,
    lengths,
    features,
    head_dim: tl.constexpr,
    value_dim: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BORDERS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dK and dV; with a pointer in `dq`, also what `_query_gradient_kernel` computes otherwise."""
    sizes = Sizes(works, tiles, section, heads, queries, keys, query_tokens, key_tokens)
    if PERSISTENT:
        for work in range(tl.program_id(0), sizes.works, tl.num_programs(0)):
            _key_value_gradient_tile(
                q,
                k,
                v,
                do,
                exponent,
                delta,
                dq,
                dk,
                dv,
                gradients,
                work,
                sizes,
                group,
                lengths,
                features,
                head_dim,
                value_dim,
                BOTTOM_RIGHT,
                FOLD_SCALE,
                INPUT_PRECISION,
                BORDERS,
                DESCRIPTORS,
                WARP_SPECIALIZE,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                BLOCK_V,
            )
    else:
        work = tl.program_id(0)
        _key_value_gradient_tile(
            q,
            k,
            v,
            do,
            exponent,
            delta,
            dq,
            dk,
            dv,
            gradients,
            work,
            sizes,
            group,
            lengths,
            features,
            head_dim,
            value_dim,
            BOTTOM_RIGHT,
            FOLD_SCALE,
            INPUT_PRECISION,
            BORDERS,
            DESCRIPTORS,
            WARP_SPECIALIZE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_V,
        )


@triton.jit
def _key_value_gradient_tile(
    q,
    k,
    v,
    do,
    exponent,
    delta,
    dq,
    dk,
    dv,
    gradients,
    work,
    sizes,
    group,
    lengths,
    features,
    head_dim: tl.constexpr,
    value_dim: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BORDERS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One tile of keys and all the queries that meet it."""
    PREFIX: tl.constexpr = lengths.prefix_lengths is not None
    # Under causality the first keys meet the most queries.
    tile, row = tile_of_work(work, sizes.tiles, sizes.works // sizes.tiles, sizes.section)
    kv_head = (row % (sizes.heads // group)).to(tl.int64)
    batch = (row // (sizes.heads // group)).to(tl.int64)
    first = tile * BLOCK_N
    k_start, keys, stored_keys = key_bounds(batch, lengths, sizes.keys, sizes.key_tokens)
    q_start, queries = query_bounds(batch, lengths, sizes.queries, sizes.query_tokens)
    prefix = prefix_length(batch, lengths)
    offset = keys - queries if BOTTOM_RIGHT else 0
    k_pointer = k.pointer + batch * k.stride_b + kv_head * k.stride_h + k_start * k.stride_row
    v_pointer = v.pointer + batch * v.stride_b + kv_head * v.stride_h + k_start * v.stride_row
    # Specialised warps can take from outside their loop only what a descriptor loaded.
    k_source = rows_of(k_pointer, keys, k.stride_row, head_dim, BLOCK_N, BLOCK_D, WARP_SPECIALIZE)
    v_source = rows_of(v_pointer, keys, v.stride_row, value_dim, BLOCK_N, BLOCK_V, WARP_SPECIALIZE)
    # An empty sequence's descriptor has one row, which is not there: start after it.
    k_first = tl.where(first < keys, first, tl.maximum(first, 1)) if WARP_SPECIALIZE else first
    key_tile = load_rows(
        k_source, k_first, keys, k.stride_row, k.stride_dim, head_dim, BLOCK_N, BLOCK_D, True, WARP_SPECIALIZE
    )
    value_tile = load_rows(
        v_source, k_first, keys, v.stride_row, v.stride_dim, value_dim, BLOCK_N, BLOCK_V, True, WARP_SPECIALIZE
    )
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    low, whole_low, whole_high, high = query_ranges(
        first, queries, keys, offset, prefix, features, PREFIX, BLOCK_M, BLOCK_N
    )
    if first >= keys:
        low, whole_low, whole_high, high = queries, queries, queries, queries
    for member in range(group):
        head = kv_head * group + member
        q_pointer = q.pointer + batch * q.stride_b + head * q.stride_h + q_start * q.stride_row
        do_pointer = do.pointer + batch * do.stride_b + head * do.stride_h + q_start * do.stride_row
        statistics = batch * exponent.stride_b + head * exponent.stride_h + q_start
        q_source = rows_of(q_pointer, queries, q.stride_row, head_dim, BLOCK_M, BLOCK_D, DESCRIPTORS)
        do_source = rows_of(do_pointer, queries, do.stride_row, value_dim, BLOCK_M, BLOCK_V, DESCRIPTORS)
        dq_source = dq.pointer
        if dq.pointer is not None:
            dq_pointer = dq.pointer + batch * dq.stride_b + head * dq.stride_h + q_start * dq.stride_row
            dq_source = rows_of(dq_pointer, queries, dq.stride_row, head_dim, BLOCK_M, BLOCK_D, DESCRIPTORS)
        dk_tile, dv_tile = _meet_queries(
            dk_tile,
            dv_tile,
            key_tile,
            value_tile,
            q_source,
            do_source,
            dq_source,
            q,
            do,
            dq,
            exponent.pointer + statistics,
            delta.pointer + statistics,
            gradients,
            batch,
            head,
            sizes.heads,
            tile,
            sizes.tiles,
            low,
            whole_low,
            whole_high,
            high,
            queries,
            keys,
            offset,
            prefix,
            features,
            head_dim,
            value_dim,
            PREFIX,
            FOLD_SCALE,
            INPUT_PRECISION,
            BORDERS,
            DESCRIPTORS,
            WARP_SPECIALIZE,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_V,
        )
    # With a scale per head, the queries' products were scaled head by head.
    dk_scale = features.scale if features.head_scales is None else 1.0
    dk_pointer = dk.pointer + batch * dk.stride_b + kv_head * dk.stride_h + k_start * dk.stride_row
    dv_pointer = dv.pointer + batch * dv.stride_b + kv_head * dv.stride_h + k_start * dv.stride_row
    dk_tile = round_to(dk_tile * dk_scale, dk.pointer.dtype.element_ty)
    dv_tile = round_to(dv_tile, dv.pointer.dtype.element_ty)
    store_rows(dk_pointer, dk_tile, first, stored_keys, dk.stride_row, dk.stride_dim, head_dim, BLOCK_N, BLOCK_D)
    store_rows(dv_pointer, dv_tile, first, stored_keys, dv.stride_row, dv.stride_dim, value_dim, BLOCK_N, BLOCK_V)


@triton.jit
def _meet_queries(
    dk_tile,
    dv_tile,
    key_tile,
    value_tile,
    q_source,
    do_source,
    dq_source,
    q,
    do,
    dq,
    exponent_pointer,
    delta_pointer,
    gradients,
    batch,
    head,
    heads,
    tile,
    tiles,
    low,
    whole_low,
    whole_high,
    high,
    queries,
    keys,
    offset,
    prefix,
    features,
    head_dim: tl.constexpr,
    value_dim: tl.constexpr,
    PREFIX: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BORDERS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Take one head's queries into dK and dV of a tile of keys, whole tiles first, then those that need a test."""
    scale = scale_of(features, head)
    slope = slope_of(features, batch, head)
    mask_pointer = mask_at_head(features, batch, head)
    bias_pointer = bias_at_head(features, batch, head)
    relative_pointer = relative_at_head(features, head)
    key = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    dslope = tl.zeros((BLOCK_N,), tl.float32)
    dscale = tl.zeros((BLOCK_N,), tl.float32)
    if BORDERS == ONE_LOOP:
        whole_low, whole_high = high, high
    for part in tl.static_range(1 if BORDERS == ONE_LOOP else 0, 1 if BORDERS == NO_BORDERS else 2):
        if part == 1:
            count = border_tiles(low, whole_low, whole_high, high, BLOCK_M)
        else:
            count = (whole_high - whole_low) // BLOCK_M
        for index in tl.range(0, count, warp_specialize=WARP_SPECIALIZE):
            if part == 1:
                start = border_start(index, low, whole_low, whole_high, BLOCK_M)
            else:
                start = whole_low + index * BLOCK_M
            query = start + tl.arange(0, BLOCK_M)
            row_exponent, row_delta = _load_row_statistics(exponent_pointer, delta_pointer, query, queries, part == 1)
            if not WARP_SPECIALIZE:  # the compiler cannot divide a scan among warps
                row_exponent = _loaded_once(row_exponent)
                row_delta = _loaded_once(row_delta)
            q_tile = load_rows(
                q_source, start, queries, q.stride_row, q.stride_dim, head_dim, BLOCK_M, BLOCK_D, part == 1, DESCRIPTORS
            )
            do_tile = load_rows(
                do_source,
                start,
                queries,
                do.stride_row,
                do.stride_dim,
                value_dim,
                BLOCK_M,
                BLOCK_V,
                part == 1,
                DESCRIPTORS,
            )
            nothing = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            raw_scores = dot(key_tile, tl.trans(q_tile), nothing, INPUT_PRECISION)
            keep = None
            if features.seed is not None:
                keep = tl.trans(dropout_keep(features, batch * heads + head, start, tile * BLOCK_N, BLOCK_M, BLOCK_N))
            weights, dscores, dbias = _weights_and_gradient(
                raw_scores,
                dot(value_tile, tl.trans(do_tile), nothing, INPUT_PRECISION),
                row_exponent[None, :],
                row_delta[None, :],
                query[None, :],
                key,
                queries,
                keys,
                offset,
                prefix,
                scale,
                slope,
                mask_pointer,
                bias_pointer,
                relative_pointer,
                keep,
                features,
                part == 1,
                PREFIX,
                FOLD_SCALE,
            )
            dv_tile = dot(round_to(weights, do_tile.dtype), do_tile, dv_tile, INPUT_PRECISION)
            dslope, dscale = _add_score_gradients(
                gradients,
                raw_scores,
                dscores,
                dbias,
                dslope,
                dscale,
                query[None, :],
                key,
                queries,
                keys,
                offset,
                batch,
                head,
                1,
            )
            if features.head_scales is not None:
                dscores *= scale
            dscores = round_to(dscores, q_tile.dtype)
            dk_tile = dot(dscores, q_tile, dk_tile, INPUT_PRECISION)
            if dq.pointer is not None:
                if DESCRIPTORS and BLOCK_M < 64:
                    # wgmma needs 64 rows, which head_dim has: dQ^T = K^T dS.
                    nothing = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
                    dq_tile = tl.trans(dot(tl.trans(key_tile), dscores, nothing, INPUT_PRECISION))
                else:
                    nothing = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
                    dq_tile = dot(tl.trans(dscores), key_tile, nothing, INPUT_PRECISION)
                if DESCRIPTORS:
                    dq_source.atomic_add([start, 0], dq_tile)
                else:
                    tl.atomic_add(
                        row_pointers(dq_source, start, dq.stride_row, dq.stride_dim, BLOCK_M, BLOCK_D),
                        dq_tile,
                        mask=row_mask(start, queries, head_dim, BLOCK_M, BLOCK_D),
                        sem="relaxed",
                    )
    _store_program_sums(gradients, dslope, dscale, batch, head, heads, tile, tiles)
    return dk_tile, dv_tile


@triton.jit(do_not_specialize=Sizes._fields)
def _query_gradient_kernel(
    q,
    k,
    v,
    do,
    exponent,
    delta,
    dq,
    gradients,
    works,
    tiles,
    section,
    heads,
    queries,
    keys,
    query_tokens,
    key_tokens,
    group,
    lengths,
    features,
    head_dim: tl.constexpr,
    value_dim: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BORDERS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dQ in registers, without additions in memory; also the scores' gradients."""
    sizes = Sizes(works, tiles, section, heads, queries, keys, query_tokens, key_tokens)
    if PERSISTENT:
        for work in range(tl.program_id(0), sizes.works, tl.num_programs(0)):
            _query_gradient_tile(
                q,
                k,
                v,
                do,
                exponent,
                delta,
                dq,
                gradients,
                work,
                sizes,
                group,
                lengths,
                features,
                head_dim,
                value_dim,
                BOTTOM_RIGHT,
                FOLD_SCALE,
                INPUT_PRECISION,
                BORDERS,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
                BLOCK_V,
            )
    else:
        work = tl.program_id(0)
        _query_gradient_tile(
            q,
            k,
            v,
            do,
            exponent,
            delta,
            dq,
            gradients,
            work,
            sizes,
            group,
            lengths,
            features,
            head_dim,
            value_dim,
            BOTTOM_RIGHT,
            FOLD_SCALE,
            INPUT_PRECISION,
            BORDERS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            BLOCK_V,
        )


@triton.jit
def _query_gradient_tile(
    q,
    k,
    v,
    do,
    exponent,
    delta,
    dq,
    gradients,
    work,
    sizes,
    group,
    lengths,
    features,
    head_dim: tl.constexpr,
    value_dim: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BORDERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One tile of queries and all the keys that it meets."""
    heads = sizes.heads
    PREFIX: tl.constexpr = lengths.prefix_lengths is not None
    rank, row = tile_of_work(work, sizes.tiles, sizes.works // sizes.tiles, sizes.section)
    head = (row % heads).to(tl.int64)
    batch = (row // heads).to(tl.int64)
    # Under causality the last queries meet the most keys.
    tile = sizes.tiles - 1 - rank
    first = tile * BLOCK_M
    q_start, queries = query_bounds(batch, lengths, sizes.queries, sizes.query_tokens)
    k_start, keys, _stored_keys = key_bounds(batch, lengths, sizes.keys, sizes.key_tokens)
    prefix = prefix_length(batch, lengths)
    offset = keys - queries if BOTTOM_RIGHT else 0
    kv_head = head // group
    q_pointer = q.pointer + batch * q.stride_b + head * q.stride_h + q_start * q.stride_row
    k_pointer = k.pointer + batch * k.stride_b + kv_head * k.stride_h + k_start * k.stride_row
    v_pointer = v.pointer + batch * v.stride_b + kv_head * v.stride_h + k_start * v.stride_row
    do_pointer = do.pointer + batch * do.stride_b + head * do.stride_h + q_start * do.stride_row
    statistics = batch * exponent.stride_b + head * exponent.stride_h + q_start
    query = first + tl.arange(0, BLOCK_M)
    row_exponent, row_delta = _load_row_statistics(
        exponent.pointer + statistics, delta.pointer + statistics, query, queries, True
    )
    q_tile = load_rows(q_pointer, first, queries, q.stride_row, q.stride_dim, head_dim, BLOCK_M, BLOCK_D, True, False)
    do_tile = load_rows(
        do_pointer, first, queries, do.stride_row, do.stride_dim, value_dim, BLOCK_M, BLOCK_V, True, False
    )
    scale = scale_of(features, head)
    slope = slope_of(features, batch, head)
    mask_pointer = mask_at_head(features, batch, head)
    bias_pointer = bias_at_head(features, batch, head)
    relative_pointer = relative_at_head(features, head)
    dq_tile = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dslope = tl.zeros((BLOCK_M,), tl.float32)
    dscale = tl.zeros((BLOCK_M,), tl.float32)
    low, whole_low, whole_high, high = key_ranges(
        first, queries, keys, offset, prefix, features, PREFIX, BLOCK_M, BLOCK_N
    )
    # A packed sequence may have fewer tiles than the longest one: nothing is loaded then, and nothing stored.
    if first >= queries:
        low, whole_low, whole_high, high = 0, 0, 0, 0
    for part in tl.static_range(2 if BORDERS else 1):
        if part == 1:
            count = border_tiles(low, whole_low, whole_high, high, BLOCK_N)
        else:
            count = (whole_high - whole_low) // BLOCK_N
        for index in range(count):
            if part == 1:
                start = border_start(index, low, whole_low, whole_high, BLOCK_N)
            else:
                start = whole_low + index * BLOCK_N
            key = (start + tl.arange(0, BLOCK_N))[None, :]
            key_tile = load_rows(
                k_pointer, start, keys, k.stride_row, k.stride_dim, head_dim, BLOCK_N, BLOCK_D, part == 1, False
            )
            value_tile = load_rows(
                v_pointer, start, keys, v.stride_row, v.stride_dim, value_dim, BLOCK_N, BLOCK_V, part == 1, False
            )
            nothing = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            raw_scores = dot(q_tile, tl.trans(key_tile), nothing, INPUT_PRECISION)
            keep = None
            if features.seed is not None:
                keep = dropout_keep(features, batch * heads + head, first, start, BLOCK_M, BLOCK_N)
            _, dscores, dbias = _weights_and_gradient(
                raw_scores,
                dot(do_tile, tl.trans(value_tile), nothing, INPUT_PRECISION),
                row_exponent[:, None],
                row_delta[:, None],
                query[:, None],
                key,
                queries,
                keys,
                offset,
                prefix,
                scale,
                slope,
                mask_pointer,
                bias_pointer,
                relative_pointer,
                keep,
                features,
                part == 1,
                PREFIX,
                FOLD_SCALE,
            )
            dslope, dscale = _add_score_gradients(
                gradients,
                raw_scores,
                dscores,
                dbias,
                dslope,
                dscale,
                query[:, None],
                key,
                queries,
                keys,
                offset,
                batch,
                head,
                0,
            )
            dq_tile = dot(round_to(dscores, key_tile.dtype), key_tile, dq_tile, INPUT_PRECISION)
    _store_program_sums(gradients, dslope, dscale, batch, head, heads, tile, sizes.tiles)
    dq_pointer = dq.pointer + batch * dq.stride_b + head * dq.stride_h + q_start * dq.stride_row
    dq_tile = round_to(dq_tile * scale, dq.pointer.dtype.element_ty)
    store_rows(dq_pointer, dq_tile, first, queries, dq.stride_row, dq.stride_dim, head_dim, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["tiles", "heads", "queries"])
def _scale_and_round_kernel(
    total, dq, tiles, heads, queries, scale, head_dim: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """dQ from the float32 sums of its parts; packed tokens count as one sequence."""
    program = tl.program_id(0)
    first = program % tiles * BLOCK_M
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    source = total.pointer + batch * total.stride_b + head * total.stride_h
    target = dq.pointer + batch * dq.stride_b + head * dq.stride_h
    tile = load_rows(
        source, first, queries, total.stride_row, total.stride_dim, head_dim, BLOCK_M, BLOCK_D, True, False
    )
    tile = round_to(tile * scale, dq.pointer.dtype.element_ty)
    store_rows(target, tile, first, queries, dq.stride_row, dq.stride_dim, head_dim, BLOCK_M, BLOCK_D)


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
    """Gradients of checked arguments; those of learned ones that are not `needed` are None."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    configuration = _key_configuration(query, value, arguments, deterministic)
    two_kernels = deterministic or configuration.two_kernels
    exponent, delta = torch.empty_like(lse), torch.empty_like(lse)
    grad_query, grad_key, grad_value = empty_gradient(query), empty_gradient(key), empty_gradient(value)
    sums = _NO_SUMS
    if True in needed:
        length, block = arguments.max_seqlen_k, configuration.block_n
        if two_kernels:
            length, block = arguments.max_seqlen_q, deterministic_configuration(query, value, arguments).block_m
        sums = _score_sums(query, arguments, needed, deterministic, triton.cdiv(length, block))
    made = [exponent, delta, grad_query, grad_key, grad_value]
    if not two_kernels:
        made.append(torch.zeros_like(grad_query, dtype=torch.float32))
    inputs = (query, key, value, grad_output, output, lse, grad_lse)
    precision = input_precision(query.dtype)
    _launch_backward(*inputs, tuple(made), deterministic, precision, *sums, *arguments.for_launch())
    learned = _learned_gradients(sums, lse, delta, arguments, needed) if True in needed else _NOTHING_LEARNED
    return AttentionGradients(grad_query, grad_key, grad_value, *learned)


def _key_configuration(
    query: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments, deterministic: bool
) -> AttentionConfiguration:
    """The configuration of the kernel whose programs own tiles of keys."""
    choose = deterministic_configuration if deterministic else backward_configuration
    return choose(query, value, arguments)


class _ScoreSums(NamedTuple):
    """Where the gradients of what is added to the scores add up; see `ScoreGradients`."""

    bias: torch.Tensor | None
    relative: torch.Tensor | None
    slopes: torch.Tensor | None
    head_scales: torch.Tensor | None

    def as_argument(self) -> ScoreGradients:
        """As kernels take them."""
        return ScoreGradients(*addend(self.bias), *relative(self.relative), self.slopes, self.head_scales)


_NO_SUMS = _ScoreSums(None, None, None, None)
_NOTHING_LEARNED: Learned[torch.Tensor | None] = Learned(None, None, None, None, None)


def _score_sums(
    query: torch.Tensor, arguments: AttentionArguments, needed: Learned[bool], deterministic: bool, tiles: int
) -> _ScoreSums:
    """Zeros for the sums that are needed.

    No element is shared when determinism is asked for: bias and relative bias then add up from the whole gradient of
    the scores.
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
    found: _ScoreSums,
    lse: torch.Tensor,
    delta: torch.Tensor,
    arguments: AttentionArguments,
    needed: Learned[bool],
) -> Learned[torch.Tensor | None]:
    """The gradients in the shapes and dtypes of their arguments."""
    grad_bias = grad_relative = grad_slopes = grad_scales = grad_sinks = None
    scores, sums = found.bias, found.relative
    if needed.bias and arguments.bias is not None and scores is not None:
        grad_bias = scores.sum_to_size(arguments.bias.shape).to(arguments.bias.dtype)
    if needed.relative and arguments.relative_bias is not None:
        if sums is None:
            assert scores is not None
            sums = sum_by_distance(scores, arguments)
        grad_relative = sums.to(arguments.relative_bias.dtype)
    if found.slopes is not None and arguments.alibi_slopes is not None:
        grad_slopes = found.slopes.sum(-1).sum_to_size(arguments.alibi_slopes.shape)
    if found.head_scales is not None:
        grad_scales = found.head_scales.sum((0, 2)) * arguments.scale
    if needed.sinks and arguments.sinks is not None:
        # A sink's weight in each row is exp(sink - lse); it meets no value, so its gradient is -weight * delta.
        by_row = lse if lse.dim() == 3 else lse[None]
        grad_sinks = -(torch.exp(arguments.sinks[:, None] - by_row) * delta.view_as(by_row)).sum((0, 2))
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
    made: tuple[torch.Tensor, ...],
    deterministic: bool,
    precision: str,  # which the kernels' options look up: a call with another one is of another kind
    *fields: Any,
) -> list[Launch]:
    exponent, delta, grad_query, grad_key, grad_value, *totals = made
    sums = _ScoreSums(*fields[: len(_NO_SUMS)])
    arguments = AttentionArguments.of_launch(fields[len(_NO_SUMS) :])
    launches: list[Launch | None] = []
    if query.numel():
        launches.append(_row_statistics(output, grad_output, lse, grad_lse, exponent, delta))
    inputs, statistics, key_grads = (query, key, value), (grad_output, exponent, delta), (grad_key, grad_value)
    configuration = _key_configuration(query, value, arguments, deterministic)
    if totals:
        scale = 1.0 if arguments.head_scales is not None else arguments.scale
        launches.append(
            _key_value_gradient(*inputs, *statistics, totals[0], *key_grads, sums, arguments, configuration)
        )
        launches.append(_scale_and_round(totals[0], grad_query, scale))
    else:
        launches.append(_query_gradient(*inputs, *statistics, grad_query, sums, arguments))
        launches.append(_key_value_gradient(*inputs, *statistics, None, *key_grads, _NO_SUMS, arguments, configuration))
    return [launch for launch in launches if launch is not None]


def _key_value_gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_output: torch.Tensor,
    exponent: torch.Tensor,
    delta: torch.Tensor,
    total: torch.Tensor | None,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    sums: _ScoreSums,
    arguments: AttentionArguments,
    configuration: AttentionConfiguration,
) -> Launch | None:
    tiles = triton.cdiv(arguments.max_seqlen_k, configuration.block_n)
    works = tiles * key.shape[1] * arguments.batch(query)
    if works == 0 or key.numel() == 0:
        return None
    descriptors = configuration.descriptors and uses_descriptors(
        query, grad_output, *([] if total is None else [total])
    )
    borders = loops_of(
        configuration,
        has_borders(arguments, arguments.max_seqlen_q, configuration.block_m)
        or has_borders(arguments, arguments.max_seqlen_k, configuration.block_n),
    )
    programs = launch_size(works, query, arguments, configuration)
    return Launch(
        _key_value_gradient_kernel,
        (programs,),
        (
            *(operand(tensor) for tensor in (query, key, value, grad_output)),
            rows(exponent),
            rows(delta),
            operand(total),
            operand(grad_key),
            operand(grad_value),
            sums.as_argument(),
            *sizes(query, key, arguments, works=works, tiles=tiles, section=section_of(query, grad_output, arguments)),
            query.shape[1] // key.shape[1],
            lengths(arguments),
            features(arguments),
        ),
        {
            "BORDERS": borders,
            "PERSISTENT": programs < works,
            "DESCRIPTORS": descriptors,
            "WARP_SPECIALIZE": descriptors
            and specializes_warps(configuration, borders)
            and uses_descriptors(key, value),
            **options_of_call(query, value, arguments, configuration),
        },
        descriptors,
    )


def _query_gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grad_output: torch.Tensor,
    exponent: torch.Tensor,
    delta: torch.Tensor,
    grad_query: torch.Tensor,
    sums: _ScoreSums,
    arguments: AttentionArguments,
) -> Launch | None:
    configuration = deterministic_configuration(query, value, arguments)
    tiles = triton.cdiv(arguments.max_seqlen_q, configuration.block_m)
    works = tiles * query.shape[1] * arguments.batch(query)
    if works == 0 or query.numel() == 0:
        return None
    programs = launch_size(works, query, arguments, configuration)
    return Launch(
        _query_gradient_kernel,
        (programs,),
        (
            *(operand(tensor) for tensor in (query, key, value, grad_output)),
            rows(exponent),
            rows(delta),
            operand(grad_query),
            sums.as_argument(),
            *sizes(query, key, arguments, works=works, tiles=tiles, section=section_of(key, value, arguments)),
            query.shape[1] // key.shape[1],
            lengths(arguments),
            features(arguments),
        ),
        {
            "BORDERS": has_borders(arguments, arguments.max_seqlen_k, configuration.block_n),
            "PERSISTENT": programs < works,
            **options_of_call(query, value, arguments, configuration),
        },
    )


def _row_statistics(
    output: torch.Tensor,
    grad_output: torch.Tensor,
    lse: torch.Tensor,
    grad_lse: torch.Tensor | None,
    exponent: torch.Tensor,
    delta: torch.Tensor,
) -> Launch:
    block_v, block_m = _row_blocks(output)
    batch, heads, length = delta.shape if delta.dim() == 3 else (1, *delta.shape)
    tiles = triton.cdiv(length, block_m)
    return Launch(
        _row_statistics_kernel,
        (tiles * heads * batch,),
        (
            operand(output),
            operand(grad_output),
            rows(lse),
            rows(grad_lse),
            rows(exponent),
            rows(delta),
            tiles,
            heads,
            length,
        ),
        {"value_dim": output.shape[-1], "BLOCK_M": block_m, "BLOCK_V": block_v, **COMPILER_OPTIONS},
    )


def _scale_and_round(total: torch.Tensor, grad_query: torch.Tensor, scale: float) -> Launch | None:
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
        (operand(total), operand(grad_query), tiles, heads, length, scale),
        {"head_dim": head_dim, "BLOCK_M": block_m, "BLOCK_D": block_d, **COMPILER_OPTIONS},
    )


def _row_blocks(tensor: torch.Tensor) -> tuple[int, int]:
    """Columns and rows of a tile of about 4,096 elements."""
    columns = max(16, triton.next_power_of_2(tensor.shape[-1]))
    return columns, 4096 // columns
