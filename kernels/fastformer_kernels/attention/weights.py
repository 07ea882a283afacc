"""Attention weights of chosen heads and query rows: P = exp(S - lse), recomputed from the log-sum-exp."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastformer_kernels.attention.arguments import AttentionArguments
from fastformer_kernels.attention.kernel_arguments import addend, features, lengths, operand, rows
from fastformer_kernels.attention.launch import weights_configuration
from fastformer_kernels.attention.tiles import (
    LOG2_E,
    bias_and_mask,
    bias_at_head,
    key_bounds,
    load_rows,
    mask_at_head,
    prefix_length,
    query_bounds,
    relative_at_head,
    scale_of,
    slope_of,
    tanh,
)
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
    group,
    lengths,
    features,
    head_dim: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    program = tl.program_id(0)
    start = program % key_tiles * BLOCK_N
    row_tile = program // key_tiles % row_tiles
    place = program // key_tiles // row_tiles % head_count
    batch = (program // key_tiles // row_tiles // head_count).to(tl.int64)
    head = place.to(tl.int64)
    if heads_pointer is not None:
        head = tl.load(heads_pointer + place).to(tl.int64)
    PREFIX: tl.constexpr = lengths.prefix_lengths is not None
    q_start, queries = query_bounds(batch, lengths, queries, query_tokens)
    width = keys
    k_start, keys, _stored_keys = key_bounds(batch, lengths, keys, key_tokens)
    offset = keys - queries if BOTTOM_RIGHT else 0

    index = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = index
    if rows_pointer is not None:
        query = tl.load(rows_pointer + index, mask=index < row_count, other=0)
    query = tl.where(index < row_count, query, queries)
    dim = tl.arange(0, BLOCK_D)
    q_pointer = q.pointer + batch * q.stride_b + head * q.stride_h + q_start * q.stride_row
    q_pointers = q_pointer + query.to(tl.int64)[:, None] * q.stride_row + dim.to(tl.int64)[None, :] * q.stride_dim
    q_tile = tl.load(q_pointers, mask=(query < queries)[:, None] & (dim < head_dim)[None, :], other=0.0)
    k_pointer = k.pointer + batch * k.stride_b + (head // group) * k.stride_h + k_start * k.stride_row
    k_tile = load_rows(k_pointer, start, keys, k.stride_row, k.stride_dim, head_dim, BLOCK_N, BLOCK_D, True, False)

    scores = dot(q_tile, tl.trans(k_tile), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), INPUT_PRECISION)
    scale = scale_of(features, head)
    if features.softcap is not None:
        scores = tanh(scores * (scale / features.softcap)) * (features.softcap * LOG2_E)
    else:
        scores *= scale * LOG2_E
    key = start + tl.arange(0, BLOCK_N)
    scores = bias_and_mask(
        scores,
        query[:, None],
        key[None, :],
        queries,
        keys,
        offset,
        prefix_length(batch, lengths),
        slope_of(features, batch, head),
        mask_at_head(features, batch, head),
        bias_at_head(features, batch, head),
        relative_at_head(features, head),
        features,
        PREFIX,
        True,
    )
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
        heads, query_rows: int32, on query's device, None for all; rows count within a sequence.
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
    made: tuple[torch.Tensor],
    precision: str,
    *fields: Any,
) -> Launch:
    (weights,), arguments = made, AttentionArguments.of_launch(fields)
    batch, head_count, row_count, _ = weights.shape
    configuration = weights_configuration(query)
    row_tiles = triton.cdiv(row_count, configuration.block_m)
    key_tiles = triton.cdiv(arguments.max_seqlen_k, configuration.block_n)
    return Launch(
        _attention_weights_kernel,
        (key_tiles * row_tiles * head_count * batch,),
        (
            operand(query),
            operand(key),
            rows(lse),
            addend(weights),
            heads,
            query_rows,
            head_count,
            row_count,
            row_tiles,
            key_tiles,
            arguments.max_seqlen_q,
            arguments.max_seqlen_k,
            query.shape[0],
            key.shape[0],
            query.shape[1] // key.shape[1],
            lengths(arguments),
            features(arguments),
        ),
        {
            "head_dim": query.shape[-1],
            "BOTTOM_RIGHT": arguments.bottom_right,
            "INPUT_PRECISION": precision,
            **configuration.options(query, query),
        },
    )
