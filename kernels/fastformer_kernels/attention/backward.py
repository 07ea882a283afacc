"""Attention backward: weights are recomputed tile by tile from the log-sum-exp.

With P the weights, dP = dO V^T and delta = rowsum(dO * O) - dLSE: dS = P * (dP - delta), dQ = scale dS K,
dK = scale dS^T Q, dV = P^T dO (FlashAttention-2, Dao 2023, https://arxiv.org/abs/2307.08691). One kernel owns a tile of
keys and walks over the queries of every head that shares them (dK, dV), another owns a tile of queries (dQ, and the
gradients of bias and slopes): two clean kernels need fewer registers than one, and no atomics for dQ, dK and dV, which
are deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastformer_kernels.attention.arguments import AttentionArguments, AttentionGradients, empty_gradient
from fastformer_kernels.attention.launch import (
    backward_configuration,
    broadcast_strides,
    feature_arguments,
    row_strides,
    tensor_strides,
)
from fastformer_kernels.attention.tiles import (
    LOG2_E,
    bias_and_mask,
    dropout_keep,
    key_ranges,
    load_rows,
    query_ranges,
    sequence_bounds,
    store_rows,
    tanh,
)
from fastformer_kernels.launch import device_guard
from fastformer_kernels.precision import dot, input_precision, round_to


@triton.jit
def _delta_kernel(
    o_pointer,
    do_pointer,
    dlse_pointer,
    delta_pointer,
    o_stride_b,
    o_stride_h,
    o_stride_m,
    o_stride_d,
    do_stride_b,
    do_stride_h,
    do_stride_m,
    do_stride_d,
    dlse_stride_b,
    dlse_stride_h,
    dlse_stride_m,
    delta_stride_b,
    delta_stride_h,
    tiles,
    heads,
    queries,
    value_dim: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """delta = rowsum(dO * O) - dLSE for every row; packed tokens count as one sequence."""
    program = tl.program_id(0)
    first = program % tiles * BLOCK_M
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    o_pointer += batch * o_stride_b + head * o_stride_h
    do_pointer += batch * do_stride_b + head * do_stride_h
    o = load_rows(o_pointer, first, queries, o_stride_m, o_stride_d, value_dim, BLOCK_M, BLOCK_V, True)
    do = load_rows(do_pointer, first, queries, do_stride_m, do_stride_d, value_dim, BLOCK_M, BLOCK_V, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1)
    row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
    if dlse_pointer is not None:
        at = batch * dlse_stride_b + head * dlse_stride_h + row * dlse_stride_m
        delta -= tl.load(dlse_pointer + at, mask=row < queries, other=0.0)
    tl.store(delta_pointer + batch * delta_stride_b + head * delta_stride_h + row, delta, mask=row < queries)


@triton.jit
def _weights_and_gradient(
    raw_scores,
    dweights,
    lse,
    delta,
    query,
    key,
    queries,
    keys,
    offset,
    left,
    right,
    scale,
    softcap,
    slope,
    mask_pointer,
    mask_stride_m,
    mask_stride_n,
    bias_pointer,
    bias_stride_m,
    bias_stride_n,
    seed_pointer,
    dropout_row,
    dropout_threshold,
    dropout_scale,
    BORDER: tl.constexpr,
    LEFT_BOUNDED: tl.constexpr,
    RIGHT_BOUNDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
):
    """From raw products Q K^T and dO V^T of one tile, in either orientation: the weights as they met V, the gradient of
    the scores before the softcap (to be scaled), and after it (the bias's)."""
    multiplier = scale * LOG2_E if FOLD_SCALE else 1.0
    scores = raw_scores
    if SOFTCAP:
        capped = tanh(raw_scores * (scale / softcap))
        scores = capped * (softcap * LOG2_E)
    elif not FOLD_SCALE:
        scores = raw_scores * (scale * LOG2_E)
    scores = bias_and_mask(
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
        BORDER,
        LEFT_BOUNDED,
        RIGHT_BOUNDED,
    )
    weights = tl.exp2(scores * multiplier - lse * LOG2_E)
    dropped = weights
    if seed_pointer is not None:
        keep = dropout_keep(seed_pointer, dropout_row, query, key, dropout_threshold)
        dropped = tl.where(keep, weights * dropout_scale, 0.0)
        dweights = tl.where(keep, dweights * dropout_scale, 0.0)
    dbias = weights * (dweights - delta)
    dscores = dbias
    if SOFTCAP:
        dscores = dbias * (1.0 - capped * capped)
    return dropped, dscores, dbias


@triton.jit
def _load_row_statistics(lse_pointer, delta_pointer, query, queries):
    """Log-sum-exp and delta of some rows; a row without keys, or beyond the end, gets +inf, hence weights of zero."""
    valid = query < queries
    lse = tl.load(lse_pointer + query, mask=valid, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse), tl.load(delta_pointer + query, mask=valid, other=0.0)


@triton.jit
def _key_value_gradient_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    do_pointer,
    lse_pointer,
    delta_pointer,
    dk_pointer,
    dv_pointer,
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
    do_stride_b,
    do_stride_h,
    do_stride_m,
    do_stride_d,
    lse_stride_b,
    lse_stride_h,
    dk_stride_b,
    dk_stride_h,
    dk_stride_n,
    dk_stride_d,
    dv_stride_b,
    dv_stride_h,
    dv_stride_n,
    dv_stride_d,
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
    first = program % tiles * BLOCK_N
    kv_heads = heads // group
    kv_head = (program // tiles % kv_heads).to(tl.int64)
    batch = (program // tiles // kv_heads).to(tl.int64)
    q_start, queries = sequence_bounds(batch, cu_seqlens_q_pointer, None, queries)
    k_start, stored_keys = sequence_bounds(batch, cu_seqlens_k_pointer, None, keys)
    if first >= stored_keys:
        return
    keys = stored_keys
    if key_lengths_pointer is not None:
        keys = tl.load(key_lengths_pointer + batch)
    offset = keys - queries if BOTTOM_RIGHT else 0
    k_pointer += batch * k_stride_b + kv_head * k_stride_h + k_start * k_stride_n
    v_pointer += batch * v_stride_b + kv_head * v_stride_h + k_start * v_stride_n
    dk_pointer += batch * dk_stride_b + kv_head * dk_stride_h + k_start * dk_stride_n
    dv_pointer += batch * dv_stride_b + kv_head * dv_stride_h + k_start * dv_stride_n

    key = (first + tl.arange(0, BLOCK_N))[:, None]
    k = load_rows(k_pointer, first, keys, k_stride_n, k_stride_d, head_dim, BLOCK_N, BLOCK_D, True)
    v = load_rows(v_pointer, first, keys, v_stride_n, v_stride_d, value_dim, BLOCK_N, BLOCK_V, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    low, whole_low, whole_high, high = query_ranges(
        first, queries, offset, left, right, LEFT_BOUNDED, RIGHT_BOUNDED, BLOCK_M, BLOCK_N
    )
    if first >= keys:
        low, whole_low, whole_high, high = high, high, high, high
    for member in range(group):
        head = kv_head * group + member
        q_head = q_pointer + batch * q_stride_b + head * q_stride_h + q_start * q_stride_m
        do_head = do_pointer + batch * do_stride_b + head * do_stride_h + q_start * do_stride_m
        lse_head = lse_pointer + batch * lse_stride_b + head * lse_stride_h + q_start
        delta_head = delta_pointer + batch * lse_stride_b + head * lse_stride_h + q_start
        mask_head = None
        if mask_pointer is not None:
            mask_head = mask_pointer + batch * mask_stride_b + head * mask_stride_h
        bias_head = None
        if bias_pointer is not None:
            bias_head = bias_pointer + batch * bias_stride_b + head * bias_stride_h
        slope = None
        if slopes_pointer is not None:
            slope = tl.load(slopes_pointer + batch * slopes_stride_b + head)
        for part in tl.static_range(3):
            part_low = low if part == 0 else (whole_low if part == 1 else whole_high)
            part_high = whole_low if part == 0 else (whole_high if part == 1 else high)
            if part != 0 or RIGHT_BOUNDED:
                for start in range(part_low, part_high, BLOCK_M):
                    query = start + tl.arange(0, BLOCK_M)
                    lse, delta = _load_row_statistics(lse_head, delta_head, query, queries)
                    q = load_rows(q_head, start, queries, q_stride_m, q_stride_d, head_dim, BLOCK_M, BLOCK_D, part != 1)
                    do = load_rows(
                        do_head, start, queries, do_stride_m, do_stride_d, value_dim, BLOCK_M, BLOCK_V, part != 1
                    )
                    nothing = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                    weights, dscores, _ = _weights_and_gradient(
                        dot(k, tl.trans(q), nothing, INPUT_PRECISION),
                        dot(v, tl.trans(do), nothing, INPUT_PRECISION),
                        lse[None, :],
                        delta[None, :],
                        query[None, :],
                        key,
                        queries,
                        keys,
                        offset,
                        left,
                        right,
                        scale,
                        softcap,
                        slope,
                        mask_head,
                        mask_stride_m,
                        mask_stride_n,
                        bias_head,
                        bias_stride_m,
                        bias_stride_n,
                        seed_pointer,
                        batch * heads + head,
                        dropout_threshold,
                        dropout_scale,
                        part != 1,
                        LEFT_BOUNDED,
                        RIGHT_BOUNDED,
                        SOFTCAP,
                        FOLD_SCALE,
                    )
                    dv = dot(round_to(weights, do.dtype), do, dv, INPUT_PRECISION)
                    dk = dot(round_to(dscores, q.dtype), q, dk, INPUT_PRECISION)
    # Keys beyond a sequence's length were loaded as zeros, which whole tiles do not mask.
    dk = tl.where(key < keys, dk, 0.0)
    dv = tl.where(key < keys, dv, 0.0)
    dk = round_to(dk * scale, dk_pointer.dtype.element_ty)
    dv = round_to(dv, dv_pointer.dtype.element_ty)
    store_rows(dk_pointer, dk, first, stored_keys, dk_stride_n, dk_stride_d, head_dim, BLOCK_N, BLOCK_D)
    store_rows(dv_pointer, dv, first, stored_keys, dv_stride_n, dv_stride_d, value_dim, BLOCK_N, BLOCK_V)


@triton.jit
def _query_gradient_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    do_pointer,
    lse_pointer,
    delta_pointer,
    dq_pointer,
    dbias_pointer,
    dslopes_pointer,
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
    do_stride_b,
    do_stride_h,
    do_stride_m,
    do_stride_d,
    lse_stride_b,
    lse_stride_h,
    dq_stride_b,
    dq_stride_h,
    dq_stride_m,
    dq_stride_d,
    dbias_stride_b,
    dbias_stride_h,
    dbias_stride_m,
    dbias_stride_n,
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
    key_lengths_pointer,
    cu_seqlens_q_pointer,
    cu_seqlens_k_pointer,
    seed_pointer,
    head_dim: tl.constexpr,
    value_dim: tl.constexpr,
    BIAS_SUM_QUERIES: tl.constexpr,
    BIAS_SUM_KEYS: tl.constexpr,
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
    tile = tiles - 1 - program % tiles
    first = tile * BLOCK_M
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
    do_pointer += batch * do_stride_b + head * do_stride_h + q_start * do_stride_m
    dq_pointer += batch * dq_stride_b + head * dq_stride_h + q_start * dq_stride_m
    if mask_pointer is not None:
        mask_pointer += batch * mask_stride_b + head * mask_stride_h
    if bias_pointer is not None:
        bias_pointer += batch * bias_stride_b + head * bias_stride_h
    if dbias_pointer is not None:
        dbias_pointer += batch * dbias_stride_b + head * dbias_stride_h
    slope = None
    if slopes_pointer is not None:
        slope = tl.load(slopes_pointer + batch * slopes_stride_b + head)

    query = first + tl.arange(0, BLOCK_M)
    statistics = batch * lse_stride_b + head * lse_stride_h + q_start
    lse, delta = _load_row_statistics(lse_pointer + statistics, delta_pointer + statistics, query, queries)
    q = load_rows(q_pointer, first, queries, q_stride_m, q_stride_d, head_dim, BLOCK_M, BLOCK_D, True)
    do = load_rows(do_pointer, first, queries, do_stride_m, do_stride_d, value_dim, BLOCK_M, BLOCK_V, True)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dslope = tl.zeros((BLOCK_M,), tl.float32)
    low, whole_low, whole_high, high = key_ranges(
        first, queries, keys, offset, left, right, LEFT_BOUNDED, RIGHT_BOUNDED, BLOCK_M, BLOCK_N
    )
    for part in tl.static_range(3):
        part_low = low if part == 0 else (whole_low if part == 1 else whole_high)
        part_high = whole_low if part == 0 else (whole_high if part == 1 else high)
        if part != 0 or LEFT_BOUNDED:
            for start in range(part_low, part_high, BLOCK_N):
                key = (start + tl.arange(0, BLOCK_N))[None, :]
                k = load_rows(k_pointer, start, keys, k_stride_n, k_stride_d, head_dim, BLOCK_N, BLOCK_D, part != 1)
                v = load_rows(v_pointer, start, keys, v_stride_n, v_stride_d, value_dim, BLOCK_N, BLOCK_V, part != 1)
                nothing = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                _, dscores, dbias = _weights_and_gradient(
                    dot(q, tl.trans(k), nothing, INPUT_PRECISION),
                    dot(do, tl.trans(v), nothing, INPUT_PRECISION),
                    lse[:, None],
                    delta[:, None],
                    query[:, None],
                    key,
                    queries,
                    keys,
                    offset,
                    left,
                    right,
                    scale,
                    softcap,
                    slope,
                    mask_pointer,
                    mask_stride_m,
                    mask_stride_n,
                    bias_pointer,
                    bias_stride_m,
                    bias_stride_n,
                    seed_pointer,
                    batch * heads + head,
                    dropout_threshold,
                    dropout_scale,
                    part != 1,
                    LEFT_BOUNDED,
                    RIGHT_BOUNDED,
                    SOFTCAP,
                    FOLD_SCALE,
                )
                if dbias_pointer is not None:
                    _add_bias_gradient(
                        dbias_pointer,
                        dbias,
                        query[:, None],
                        key,
                        queries,
                        keys,
                        dbias_stride_m,
                        dbias_stride_n,
                        BIAS_SUM_QUERIES,
                        BIAS_SUM_KEYS,
                    )
                if dslopes_pointer is not None:
                    distance = tl.abs(key - query[:, None] - offset).to(tl.float32)
                    dslope -= tl.sum(dbias * distance, axis=1)
                dq = dot(round_to(dscores, k.dtype), k, dq, INPUT_PRECISION)
    if dslopes_pointer is not None:
        tl.store(dslopes_pointer + (batch * heads + head) * tiles + tile, tl.sum(dslope))
    dq = round_to(dq * scale, dq_pointer.dtype.element_ty)
    store_rows(dq_pointer, dq, first, queries, dq_stride_m, dq_stride_d, head_dim, BLOCK_M, BLOCK_D)


@triton.jit
def _add_bias_gradient(
    dbias_pointer,
    dbias,
    query,
    key,
    queries,
    keys,
    stride_m,
    stride_n,
    SUM_QUERIES: tl.constexpr,
    SUM_KEYS: tl.constexpr,
):
    """Add a tile of the bias's gradient, summed first over what the bias broadcasts within the tile."""
    at = query.to(tl.int64) * stride_m + key.to(tl.int64) * stride_n
    valid = (query < queries) & (key < keys)
    if SUM_QUERIES and SUM_KEYS:
        tl.atomic_add(dbias_pointer, tl.sum(tl.sum(dbias, axis=1), axis=0), sem="relaxed")
    elif SUM_QUERIES:
        columns = key.to(tl.int64) * stride_n
        tl.atomic_add(dbias_pointer + columns, tl.sum(dbias, axis=0)[None, :], mask=key < keys, sem="relaxed")
    elif SUM_KEYS:
        rows = query.to(tl.int64) * stride_m
        tl.atomic_add(dbias_pointer + rows, tl.sum(dbias, axis=1)[:, None], mask=query < queries, sem="relaxed")
    else:
        tl.atomic_add(dbias_pointer + at, dbias, mask=valid, sem="relaxed")


def attention_backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    arguments: AttentionArguments,
    *,
    bias_needs_grad: bool,
    slopes_need_grad: bool,
    sinks_need_grad: bool,
) -> AttentionGradients:
    """Gradients of query, key, value, bias, slopes and sinks; the last three empty where not needed."""
    grads = empty_gradient(query), empty_gradient(key), empty_gradient(value)
    configuration = backward_configuration(query, value)
    batch, heads, group = arguments.batch(query), query.shape[1], query.shape[1] // key.shape[1]
    query_tiles = triton.cdiv(arguments.max_seqlen_q, configuration.block_m)
    key_tiles = triton.cdiv(arguments.max_seqlen_k, configuration.block_n)
    bias, sinks = arguments.bias, arguments.sinks
    grad_bias = _bias_buffer(bias, batch, arguments, heads) if bias is not None and bias_needs_grad else None
    slope_parts = query.new_zeros(batch, heads, max(query_tiles, 1), dtype=torch.float32) if slopes_need_grad else None
    delta = torch.empty_like(lse)
    features = feature_arguments(arguments)
    del features["sinks_pointer"]
    shared = {
        **features,
        "head_dim": query.shape[-1],
        "value_dim": value.shape[-1],
        "INPUT_PRECISION": input_precision(query.dtype),
        **configuration.blocks(query, value),
        "num_warps": configuration.num_warps,
        "num_stages": configuration.num_stages,
    }
    strides = [stride for tensor in (query, key, value, grad_output) for stride in tensor_strides(tensor)]
    sizes = (heads, group, arguments.max_seqlen_q, arguments.max_seqlen_k)
    with device_guard(query):
        if query.numel():
            _launch_delta(output, grad_output, grad_lse, delta)
        if query_tiles * heads * batch and query.numel():
            _query_gradient_kernel[(query_tiles * heads * batch,)](
                query,
                key,
                value,
                grad_output,
                lse,
                delta,
                grads[0],
                grad_bias,
                slope_parts,
                *strides,
                *row_strides(lse),
                *tensor_strides(grads[0]),
                *broadcast_strides(grad_bias),
                query_tiles,
                *sizes,
                BIAS_SUM_QUERIES=grad_bias is not None and grad_bias.shape[2] == 1,
                BIAS_SUM_KEYS=grad_bias is not None and grad_bias.shape[3] == 1,
                **shared,
            )
        if key_tiles * heads * batch and key.numel():
            _key_value_gradient_kernel[(key_tiles * (heads // group) * batch,)](
                query,
                key,
                value,
                grad_output,
                lse,
                delta,
                grads[1],
                grads[2],
                *strides,
                *row_strides(lse),
                *tensor_strides(grads[1]),
                *tensor_strides(grads[2]),
                key_tiles,
                *sizes,
                **shared,
            )
    return (
        *grads,
        query.new_empty(0) if grad_bias is None or bias is None else grad_bias.sum_to_size(bias.shape).to(bias.dtype),
        _slopes_gradient(slope_parts, arguments.alibi_slopes, query),
        _sinks_gradient(sinks, lse, delta) if sinks is not None and sinks_need_grad else query.new_empty(0),
    )


def _bias_buffer(bias: torch.Tensor, batch: int, arguments: AttentionArguments, heads: int) -> torch.Tensor:
    """Where the bias's gradient adds up, in float32; no element is shared when determinism is asked for."""
    shape = bias.shape
    if torch.are_deterministic_algorithms_enabled():
        shape = torch.Size((batch, heads, arguments.max_seqlen_q, arguments.max_seqlen_k))
    return torch.zeros(shape, dtype=torch.float32, device=bias.device)


def _slopes_gradient(parts: torch.Tensor | None, slopes: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor:
    if parts is None or slopes is None:
        return query.new_empty(0)
    return parts.sum(-1).sum_to_size(slopes.shape)


def _sinks_gradient(sinks: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The sink's weight in each row is exp(sink - lse); it meets no value, so its gradient is -weight * delta."""
    rows = lse if lse.dim() == 3 else lse[None]
    weights = torch.exp(sinks[:, None] - rows)
    return -(weights * delta.view_as(rows)).sum((0, 2))


def _launch_delta(
    output: torch.Tensor, grad_output: torch.Tensor, grad_lse: torch.Tensor | None, delta: torch.Tensor
) -> None:
    block_v = max(16, triton.next_power_of_2(output.shape[-1]))
    block_m = max(1, 4096 // block_v)
    batch, heads, rows = delta.shape if delta.dim() == 3 else (1, *delta.shape)
    tiles = triton.cdiv(rows, block_m)
    _delta_kernel[(tiles * heads * batch,)](
        output,
        grad_output,
        grad_lse,
        delta,
        *tensor_strides(output),
        *tensor_strides(grad_output),
        *((0, 0, 0) if grad_lse is None else (*row_strides(grad_lse), grad_lse.stride(-1))),
        *row_strides(delta),
        tiles,
        heads,
        rows,
        value_dim=output.shape[-1],
        BLOCK_M=block_m,
        BLOCK_V=block_v,
    )
