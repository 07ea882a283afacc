"""Attention forward: O = softmax(S) V with S = softcap(scale Q K^T) + bias, masked, and its log-sum-exp.

FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691): a program owns a tile of queries and walks over the tiles
of keys with an online softmax. Tiles that causality, window and length leave whole have a loop of their own, without
tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastformer_kernels.attention.arguments import AttentionArguments, empty_lse, empty_output
from fastformer_kernels.attention.launch import feature_arguments, forward_configuration, row_strides, tensor_strides
from fastformer_kernels.attention.tiles import (
    LN_2,
    LOG2_E,
    bias_and_mask,
    dropout_keep,
    key_ranges,
    load_rows,
    sequence_bounds,
    store_rows,
    tanh,
)
from fastformer_kernels.launch import device_guard
from fastformer_kernels.precision import dot, input_precision, round_to


@triton.jit
def _attend(
    accumulator,
    maximum,
    total,
    q,
    k_pointer,
    v_pointer,
    low,
    high,
    query,
    queries,
    keys,
    offset,
    left,
    right,
    scale,
    softcap,
    slope,
    k_stride_n,
    k_stride_d,
    v_stride_n,
    v_stride_d,
    head_dim,
    value_dim,
    mask_pointer,
    mask_stride_m,
    mask_stride_n,
    bias_pointer,
    bias_stride_m,
    bias_stride_n,
    seed_pointer,
    dropout_row,
    dropout_threshold,
    BORDER: tl.constexpr,
    LEFT_BOUNDED: tl.constexpr,
    RIGHT_BOUNDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Take the keys [low, high) into the online softmax."""
    multiplier = scale * LOG2_E if FOLD_SCALE else 1.0
    for start in range(low, high, BLOCK_N):
        k = load_rows(k_pointer, start, keys, k_stride_n, k_stride_d, head_dim, BLOCK_N, BLOCK_D, BORDER)
        scores = dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32), INPUT_PRECISION)
        if SOFTCAP:
            scores = tanh(scores * (scale / softcap)) * (softcap * LOG2_E)
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
            left,
            right,
            slope,
            mask_pointer,
            mask_stride_m,
            mask_stride_n,
            bias_pointer,
            bias_stride_m,
            bias_stride_n,
            BORDER,
            LEFT_BOUNDED,
            RIGHT_BOUNDED,
        )
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * multiplier)
        shift = new_maximum
        if BORDER or mask_pointer is not None or bias_pointer is not None:
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores * multiplier - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(weights, axis=1)
        if seed_pointer is not None:
            keep = dropout_keep(seed_pointer, dropout_row, query[:, None], key, dropout_threshold)
            weights = tl.where(keep, weights, 0.0)
        v = load_rows(v_pointer, start, keys, v_stride_n, v_stride_d, value_dim, BLOCK_N, BLOCK_V, BORDER)
        accumulator = dot(round_to(weights, v.dtype), v, accumulator * rescale[:, None], INPUT_PRECISION)
        maximum = new_maximum
    return accumulator, maximum, total


@triton.jit
def _attention_forward_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    o_pointer,
    lse_pointer,
    q_stride_b,
    q_stride_h,
    q_stride_m,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    v_stride_d,
    o_stride_b,
    o_stride_h,
    o_stride_m,
    o_stride_d,
    lse_stride_b,
    lse_stride_h,
    tiles,
    heads,
    group,
    queries,
    keys,
    scale,
    softcap,
    left,
    right,
    dropout_threshold,
    dropout_scale,
    mask_pointer,
    mask_stride_b,
    mask_stride_h,
    mask_stride_m,
    mask_stride_n,
    bias_pointer,
    bias_stride_b,
    bias_stride_h,
    bias_stride_m,
    bias_stride_n,
    slopes_pointer,
    slopes_stride_b,
    sinks_pointer,
    key_lengths_pointer,
    cu_seqlens_q_pointer,
    cu_seqlens_k_pointer,
    seed_pointer,
    head_dim: tl.constexpr,
    value_dim: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    LEFT_BOUNDED: tl.constexpr,
    RIGHT_BOUNDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    program = tl.program_id(0)
    # Later queries see more keys when causal: the longest tiles start first.
    first = (tiles - 1 - program % tiles) * BLOCK_M
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    q_start, queries = sequence_bounds(batch, cu_seqlens_q_pointer, None, queries)
    if first >= queries:
        return
    k_start, keys = sequence_bounds(batch, cu_seqlens_k_pointer, key_lengths_pointer, keys)
    offset = keys - queries if BOTTOM_RIGHT else 0
    q_pointer += batch * q_stride_b + head * q_stride_h + q_start * q_stride_m
    k_pointer += batch * k_stride_b + (head // group) * k_stride_h + k_start * k_stride_n
    v_pointer += batch * v_stride_b + (head // group) * v_stride_h + k_start * v_stride_n
    o_pointer += batch * o_stride_b + head * o_stride_h + q_start * o_stride_m
    lse_pointer += batch * lse_stride_b + head * lse_stride_h + q_start
    if mask_pointer is not None:
        mask_pointer += batch * mask_stride_b + head * mask_stride_h
    if bias_pointer is not None:
        bias_pointer += batch * bias_stride_b + head * bias_stride_h
    slope = None
    if slopes_pointer is not None:
        slope = tl.load(slopes_pointer + batch * slopes_stride_b + head)

    query = first + tl.arange(0, BLOCK_M)
    q = load_rows(q_pointer, first, queries, q_stride_m, q_stride_d, head_dim, BLOCK_M, BLOCK_D, True)
    accumulator = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sinks_pointer is not None:
        sink = tl.load(sinks_pointer + head) * LOG2_E
        maximum = tl.zeros((BLOCK_M,), tl.float32) + sink
        total = tl.where(maximum == float("-inf"), 0.0, 1.0)
    low, whole_low, whole_high, high = key_ranges(
        first, queries, keys, offset, left, right, LEFT_BOUNDED, RIGHT_BOUNDED, BLOCK_M, BLOCK_N
    )
    for part in tl.static_range(3):
        if part != 0 or LEFT_BOUNDED:
            accumulator, maximum, total = _attend(
                accumulator,
                maximum,
                total,
                q,
                k_pointer,
                v_pointer,
                low if part == 0 else (whole_low if part == 1 else whole_high),
                whole_low if part == 0 else (whole_high if part == 1 else high),
                query,
                queries,
                keys,
                offset,
                left,
                right,
                scale,
                softcap,
                slope,
                k_stride_n,
                k_stride_d,
                v_stride_n,
                v_stride_d,
                head_dim,
                value_dim,
                mask_pointer,
                mask_stride_m,
                mask_stride_n,
                bias_pointer,
                bias_stride_m,
                bias_stride_n,
                seed_pointer,
                batch * heads + head,
                dropout_threshold,
                part != 1,
                LEFT_BOUNDED,
                RIGHT_BOUNDED,
                SOFTCAP,
                FOLD_SCALE,
                INPUT_PRECISION,
                BLOCK_N,
                BLOCK_D,
                BLOCK_V,
            )
    empty = total == 0.0
    output = accumulator * (dropout_scale / tl.where(empty, 1.0, total))[:, None]
    lse = tl.where(empty, float("-inf"), maximum * LN_2 + tl.log(tl.where(empty, 1.0, total)))
    tl.store(lse_pointer + query, lse, mask=query < queries)
    output = round_to(output, o_pointer.dtype.element_ty)
    store_rows(o_pointer, output, first, queries, o_stride_m, o_stride_d, value_dim, BLOCK_M, BLOCK_V)


def attention_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: AttentionArguments
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of checked arguments; layouts as in `AttentionArguments`."""
    output, lse = empty_output(query, value), empty_lse(query)
    configuration = forward_configuration(query, value)
    heads = query.shape[1]
    tiles = triton.cdiv(arguments.max_seqlen_q, configuration.block_m)
    if query.numel() == 0 or tiles == 0:
        return output, lse
    with device_guard(query):
        _attention_forward_kernel[(tiles * heads * arguments.batch(query),)](
            query,
            key,
            value,
            output,
            lse,
            *tensor_strides(query),
            *tensor_strides(key),
            *tensor_strides(value),
            *tensor_strides(output),
            *row_strides(lse),
            tiles,
            heads,
            heads // key.shape[1],
            arguments.max_seqlen_q,
            arguments.max_seqlen_k,
            **feature_arguments(arguments),
            head_dim=query.shape[-1],
            value_dim=value.shape[-1],
            INPUT_PRECISION=input_precision(query.dtype),
            **configuration.blocks(query, value),
            num_warps=configuration.num_warps,
            num_stages=configuration.num_stages,
        )
    return output, lse
