"""Attention forward: O = softmax(S) V with S = softcap(scale Q K^T) + bias, masked, and its log-sum-exp.

FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691): a program owns a tile of queries and walks over the tiles
of keys with an online softmax. Tiles that causality, window, chunk and length leave whole have a loop of their own,
without tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastformer_kernels.attention.arguments import AttentionArguments, empty_lse, empty_output
from fastformer_kernels.attention.kernel_arguments import Sizes, features, lengths, operand, rows, sizes
from fastformer_kernels.attention.launch import (
    forward_configuration,
    has_borders,
    launch_size,
    loops_of,
    options_of_call,
    section_of,
    specializes_warps,
    uses_descriptors,
)
from fastformer_kernels.attention.tiles import (
    LN_2,
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
    relative_at_head,
    rows_of,
    scale_of,
    slope_of,
    store_rows,
    tanh,
    tile_of_work,
)
from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.precision import dot, input_precision, round_to


@triton.jit
def _attend(
    accumulator,
    maximum,
    total,
    q,
    k_source,
    v_source,
    k,
    v,
    low,
    whole_low,
    whole_high,
    high,
    first,
    queries,
    keys,
    offset,
    prefix,
    scale,
    slope,
    mask_pointer,
    bias_pointer,
    relative_pointer,
    dropout_row,
    features,
    head_dim: tl.constexpr,
    value_dim: tl.constexpr,
    BORDER: tl.constexpr,
    PREFIX: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Take the border tiles, or the whole ones, into the online softmax."""
    multiplier = scale * LOG2_E if FOLD_SCALE else 1.0
    query = first + tl.arange(0, q.shape[0])
    if BORDER:
        count = border_tiles(low, whole_low, whole_high, high, BLOCK_N)
    else:
        count = (whole_high - whole_low) // BLOCK_N
    for index in tl.range(0, count, warp_specialize=WARP_SPECIALIZE):
        if BORDER:
            start = border_start(index, low, whole_low, whole_high, BLOCK_N)
        else:
            start = whole_low + index * BLOCK_N
        key_tile = load_rows(
            k_source, start, keys, k.stride_row, k.stride_dim, head_dim, BLOCK_N, BLOCK_D, BORDER, DESCRIPTORS
        )
        scores = dot(q, tl.trans(key_tile), tl.zeros((q.shape[0], BLOCK_N), tl.float32), INPUT_PRECISION)
        if features.softcap is not None:
            scores = tanh(scores * (scale / features.softcap)) * (features.softcap * LOG2_E)
        elif not FOLD_SCALE:
            scores *= scale * LOG2_E
        key = (start + tl.arange(0, BLOCK_N))[None, :]
        scores = bias_and_mask(
            scores,
            query[:, None],
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
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * multiplier)
        shift = new_maximum
        if BORDER or mask_pointer is not None or bias_pointer is not None or relative_pointer is not None:
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores * multiplier - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(weights, axis=1)
        if features.seed is not None:
            keep = dropout_keep(features, dropout_row, first, start, q.shape[0], BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        value_tile = load_rows(
            v_source, start, keys, v.stride_row, v.stride_dim, value_dim, BLOCK_N, BLOCK_V, BORDER, DESCRIPTORS
        )
        accumulator = dot(
            round_to(weights, value_tile.dtype), value_tile, accumulator * rescale[:, None], INPUT_PRECISION
        )
        maximum = new_maximum
    return accumulator, maximum, total


@triton.jit(do_not_specialize=Sizes._fields)
def _attention_forward_kernel(
    q,
    k,
    v,
    o,
    lse,
    sinks_pointer,
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
    sizes = Sizes(works, tiles, section, heads, queries, keys, query_tokens, key_tokens)
    if PERSISTENT:
        for work in range(tl.program_id(0), sizes.works, tl.num_programs(0)):
            _forward_tile(
                q,
                k,
                v,
                o,
                lse,
                sinks_pointer,
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
        _forward_tile(
            q,
            k,
            v,
            o,
            lse,
            sinks_pointer,
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
def _forward_tile(
    q,
    k,
    v,
    o,
    lse,
    sinks_pointer,
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
    """Output and log-sum-exp of a tile of queries of one head of one sequence."""
    PREFIX: tl.constexpr = lengths.prefix_lengths is not None
    rank, row = tile_of_work(work, sizes.tiles, sizes.works // sizes.tiles, sizes.section)
    head = (row % sizes.heads).to(tl.int64)
    batch = (row // sizes.heads).to(tl.int64)
    # Under causality the last queries meet the most keys.
    first = (sizes.tiles - 1 - rank) * BLOCK_M
    q_start, queries = query_bounds(batch, lengths, sizes.queries, sizes.query_tokens)
    k_start, keys, _ = key_bounds(batch, lengths, sizes.keys, sizes.key_tokens)
    prefix = prefix_length(batch, lengths)
    offset = keys - queries if BOTTOM_RIGHT else 0
    kv_head = head // group
    k_pointer = k.pointer + batch * k.stride_b + kv_head * k.stride_h + k_start * k.stride_row
    v_pointer = v.pointer + batch * v.stride_b + kv_head * v.stride_h + k_start * v.stride_row
    k_source = rows_of(k_pointer, keys, k.stride_row, head_dim, BLOCK_N, BLOCK_D, DESCRIPTORS)
    v_source = rows_of(v_pointer, keys, v.stride_row, value_dim, BLOCK_N, BLOCK_V, DESCRIPTORS)
    q_pointer = q.pointer + batch * q.stride_b + head * q.stride_h + q_start * q.stride_row
    q_source = rows_of(q_pointer, queries, q.stride_row, head_dim, BLOCK_M, BLOCK_D, DESCRIPTORS)
    # An empty sequence's descriptor has one row, which is not there: start after it.
    q_first = tl.where(first < queries, first, tl.maximum(first, 1))
    q_tile = load_rows(
        q_source, q_first, queries, q.stride_row, q.stride_dim, head_dim, BLOCK_M, BLOCK_D, True, DESCRIPTORS
    )
    scale = scale_of(features, head)
    slope = slope_of(features, batch, head)
    mask_pointer = mask_at_head(features, batch, head)
    bias_pointer = bias_at_head(features, batch, head)
    relative_pointer = relative_at_head(features, head)
    query = first + tl.arange(0, BLOCK_M)

    accumulator = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sinks_pointer is not None:
        maximum = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks_pointer + head) * LOG2_E
        total = tl.where(maximum == float("-inf"), 0.0, 1.0)
    low, whole_low, whole_high, high = key_ranges(
        first, queries, keys, offset, prefix, features, PREFIX, BLOCK_M, BLOCK_N
    )
    # A packed sequence may have fewer tiles than the longest one: nothing is loaded then, and nothing stored.
    if first >= queries:
        low, whole_low, whole_high, high = 0, 0, 0, 0
    if BORDERS == ONE_LOOP:
        whole_low, whole_high = high, high
    for part in tl.static_range(1 if BORDERS == ONE_LOOP else 0, 1 if BORDERS == NO_BORDERS else 2):
        accumulator, maximum, total = _attend(
            accumulator,
            maximum,
            total,
            q_tile,
            k_source,
            v_source,
            k,
            v,
            low,
            whole_low,
            whole_high,
            high,
            first,
            queries,
            keys,
            offset,
            prefix,
            scale,
            slope,
            mask_pointer,
            bias_pointer,
            relative_pointer,
            batch * sizes.heads + head,
            features,
            head_dim,
            value_dim,
            part == 1,
            PREFIX,
            FOLD_SCALE,
            INPUT_PRECISION,
            DESCRIPTORS,
            WARP_SPECIALIZE,
            BLOCK_N,
            BLOCK_D,
            BLOCK_V,
        )
    empty = total == 0.0
    output = accumulator * (features.kept_scale / tl.where(empty, 1.0, total))[:, None]
    row_lse = tl.where(empty, float("-inf"), maximum * LN_2 + tl.log(tl.where(empty, 1.0, total)))
    lse_pointer = lse.pointer + batch * lse.stride_b + head * lse.stride_h + q_start
    tl.store(lse_pointer + query, row_lse, mask=query < queries)
    o_pointer = o.pointer + batch * o.stride_b + head * o.stride_h + q_start * o.stride_row
    output = round_to(output, o.pointer.dtype.element_ty)
    store_rows(o_pointer, output, first, queries, o.stride_row, o.stride_dim, value_dim, BLOCK_M, BLOCK_V)


def attention_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of checked arguments; layouts as in `AttentionArguments`."""
    output, lse = empty_output(query, value), empty_lse(query)
    if query.numel():
        precision = input_precision(query.dtype)
        _launch_forward(query, key, value, (output, lse), precision, *arguments.for_launch())
    return output, lse


@kept_launch
def _launch_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    made: tuple[torch.Tensor, torch.Tensor],
    precision: str,  # which the kernel's options look up: a call with another one is of another kind
    *fields: Any,
) -> Launch | None:
    (output, lse), arguments = made, AttentionArguments.of_launch(fields)
    configuration = forward_configuration(query, key, value, arguments)
    tiles = triton.cdiv(arguments.max_seqlen_q, configuration.block_m)
    works = tiles * query.shape[1] * arguments.batch(query)
    if works == 0:
        return None
    descriptors = configuration.descriptors and uses_descriptors(query, key, value)
    borders = loops_of(configuration, has_borders(arguments, arguments.max_seqlen_k, configuration.block_n))
    programs = launch_size(works, query, arguments, configuration)
    return Launch(
        _attention_forward_kernel,
        (programs,),
        (
            operand(query),
            operand(key),
            operand(value),
            operand(output),
            rows(lse),
            arguments.sinks,
            *sizes(query, key, arguments, works=works, tiles=tiles, section=section_of(key, value, arguments)),
            query.shape[1] // key.shape[1],
            lengths(arguments),
            features(arguments),
        ),
        {
            "BORDERS": borders,
            "PERSISTENT": programs < works,
            "DESCRIPTORS": descriptors,
            "WARP_SPECIALIZE": descriptors and specializes_warps(configuration, borders),
            **options_of_call(query, value, arguments, configuration),
        },
        descriptors,
    )
