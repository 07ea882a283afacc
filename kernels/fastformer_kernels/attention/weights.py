"""Attention weights of chosen heads and query rows: P = exp(S - lse), recomputed from the log-sum-exp."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastformer_kernels.attention.arguments import AttentionArguments
from fastformer_kernels.attention.kernel_arguments import addend, features, layout, operand, rows
from fastformer_kernels.attention.launch import constants_of_call, weights_configuration
from fastformer_kernels.attention.tiles import (
    HeadFeatures,
    Span,
    at_head,
    bias_and_mask,
    bias_at_head,
    hide,
    key_bounds,
    key_limits,
    load_rows,
    mask_at_head,
    prefix_length,
    query_bounds,
    relative_at_head,
    scale_of,
    scores_of,
    slope_of,
)
from fastformer_kernels.constants import LOG2_E
from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.precision import dot, input_precision, round_to


@triton.jit(do_not_specialize=["head_count", "row_count", "row_tiles", "key_tiles", "queries", "keys"])
def _attention_weights_kernel(
    q,
    k,
    lse,
    weights,
    heads_pointer,
    rows_pointer,
    head_count,
    row_count,
    row_tiles,
    key_tiles,
    queries,
    keys,
    query_tokens,
    key_tokens,
    layout,
    features,
    constants,
):
    """Compute P = exp(S - lse) for a tile of chosen rows and of keys, for one chosen head of one sequence.

    Args:
        q, k: an `Operand` each.
        lse: a `Rows`, the log-sum-exp.
        weights: an `Addend`, (batch, head_count, row_count, keys), written.
        heads_pointer, rows_pointer: (head_count,) and (row_count,) int32, the chosen heads and rows; None for all.
        row_tiles, key_tiles: number of tiles of a head's chosen rows and of its keys.
        queries, keys, query_tokens, key_tokens: those of `Sizes`.
        layout, features, constants: a `Layout`, a `Features`, a `Constants`.
    """
    BLOCK_M: tl.constexpr = constants.BLOCK_M
    BLOCK_N: tl.constexpr = constants.BLOCK_N
    BLOCK_D: tl.constexpr = constants.BLOCK_D
    head_dim: tl.constexpr = constants.head_dim
    program = tl.program_id(0)
    start = program % key_tiles * BLOCK_N
    row_tile = program // key_tiles % row_tiles
    place = program // key_tiles // row_tiles % head_count
    batch = (program // key_tiles // row_tiles // head_count).to(tl.int64)
    head = place.to(tl.int64)
    if heads_pointer is not None:
        head = tl.load(heads_pointer + place).to(tl.int64)
    q_start, queries = query_bounds(batch, layout, queries, query_tokens)
    width = keys
    k_start, keys, _stored_keys = key_bounds(batch, layout, keys, key_tokens)
    span = Span(queries, keys, keys - queries if constants.BOTTOM_RIGHT else 0, prefix_length(batch, layout))

    index = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = index
    if rows_pointer is not None:
        query = tl.load(rows_pointer + index, mask=index < row_count, other=0)
    query = tl.where(index < row_count, query, queries)
    dim = tl.arange(0, BLOCK_D)
    q_pointer = at_head(q, batch, head, q_start)
    q_pointers = q_pointer + query.to(tl.int64)[:, None] * q.stride_row + dim.to(tl.int64)[None, :] * q.stride_dim
    q_tile = tl.load(q_pointers, mask=(query < queries)[:, None] & (dim < head_dim)[None, :], other=0.0)
    k_pointer = at_head(k, batch, head // layout.group, k_start)
    k_tile = load_rows(k_pointer, start, keys, k, head_dim, BLOCK_N, BLOCK_D, True, False)

    zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    products = dot(q_tile, tl.trans(k_tile), zeros, constants.INPUT_PRECISION)
    head_features = HeadFeatures(
        scale_of(features, head),
        slope_of(features, batch, head),
        mask_at_head(features, batch, head),
        bias_at_head(features, batch, head),
        relative_at_head(features, head),
        None,
    )
    scores = scores_of(products, head_features.scale, features, False)
    key = start + tl.arange(0, BLOCK_N)
    scores = bias_and_mask(scores, query[:, None], key[None, :], span, head_features, None, features)
    limits = key_limits(query[:, None], span, features)
    scores = hide(scores, start, limits, features, True)
    lse_pointer = lse.pointer + batch * lse.stride_b + head * lse.stride_h + (q_start + query) * lse.stride_row
    row_lse = tl.load(lse_pointer, mask=query < queries, other=float("inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    tile = tl.exp2(scores - row_lse[:, None] * LOG2_E)
    target = weights.pointer + batch * weights.stride_b + place.to(tl.int64) * weights.stride_h
    target += index.to(tl.int64)[:, None] * weights.stride_m + key.to(tl.int64)[None, :] * weights.stride_n
    inside = (index < row_count)[:, None] & (key < width)[None, :]
    tl.store(target, round_to(tile, weights.pointer.dtype.element_ty), mask=inside)


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    heads: torch.Tensor | None,
    query_rows: torch.Tensor | None,
    arguments: AttentionArguments,
) -> torch.Tensor:
    """Weights (batch, chosen heads, chosen rows, keys) in query's dtype; zero where a sequence has no such row or key.

    Args:
        heads, query_rows: int32, on query's device; None for all. Rows count within a sequence.
    """
    head_count = query.shape[1] if heads is None else len(heads)
    row_count = arguments.max_seqlen_q if query_rows is None else len(query_rows)
    weights = query.new_empty(arguments.batch(query), head_count, row_count, arguments.max_seqlen_k)
    if weights.numel() == 0:
        return weights
    precision = input_precision(query.dtype)
    _launch_weights(query, key, lse, heads, query_rows, (weights,), precision, *arguments.for_launch())
    return weights


@kept_launch
def _launch_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    heads: torch.Tensor | None,
    query_rows: torch.Tensor | None,
    outputs: tuple[torch.Tensor],
    precision: str,  # The kernel's constants depend on it, so it distinguishes kinds of calls.
    *fields: Any,
) -> Launch:
    """Describe the launch that computes the weights of the chosen heads and rows.

    Args:
        outputs: the weights, to be written.
        fields: the values of `AttentionArguments.for_launch`.
    """
    (weights,), arguments = outputs, AttentionArguments.of_launch(fields)
    batch, head_count, row_count, _ = weights.shape
    configuration = weights_configuration(query)
    row_tiles = triton.cdiv(row_count, configuration.block_m)
    key_tiles = triton.cdiv(arguments.max_seqlen_k, configuration.block_n)
    return Launch(
        _attention_weights_kernel,
        (key_tiles * row_tiles * head_count * batch,),
        {
            "q": operand(query),
            "k": operand(key),
            "lse": rows(lse),
            "weights": addend(weights),
            "heads_pointer": heads,
            "rows_pointer": query_rows,
            "head_count": head_count,
            "row_count": row_count,
            "row_tiles": row_tiles,
            "key_tiles": key_tiles,
            "queries": arguments.max_seqlen_q,
            "keys": arguments.max_seqlen_k,
            "query_tokens": query.shape[0],
            "key_tokens": key.shape[0],
            "layout": layout(query, key, arguments),
            "features": features(arguments),
            "constants": constants_of_call(query, query, arguments, configuration),
            **configuration.options,
        },
    )
