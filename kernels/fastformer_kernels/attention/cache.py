"""Append new keys and values to a cache, rotating keys and queries on the way: one launch, one pass over the memory.

Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) at position p turns each pair (a, b) of the
first rotary_dim elements into (a cos_p - b sin_p, b cos_p + a sin_p); a pair is either half a rotary_dim apart ("half",
GPT-NeoX and Llama) or neighbours ("interleaved", GPT-J). The token i of a sequence has position length + i, which is
also where it goes in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastformer_kernels.attention.decode_arguments import cache_shape, cache_strides
from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.launch import COMPILER_OPTIONS
from fastformer_kernels.precision import round_to

TILE_ELEMENTS = 2048
ELEMENTS_PER_WARP = 512


@triton.jit
def _copy(source, source_stride, target, target_stride, present, first, last, BLOCK: tl.constexpr):
    """Copy the elements [first, last) of each row."""
    dim = tl.arange(0, BLOCK).to(tl.int64)[None, :]
    valid = present & (dim >= first) & (dim < last)
    tl.store(target + dim * target_stride, tl.load(source + dim * source_stride, mask=valid), mask=valid)


@triton.jit
def _rotate(
    source,
    source_stride,
    target,
    target_stride,
    present,
    placed,
    cos_row,
    cos_stride,
    sin_row,
    sin_stride,
    rotary_dim: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """Rotate the first rotary_dim elements of each row; one that has no place in the tables is copied."""
    pair = tl.arange(0, BLOCK_PAIRS).to(tl.int64)[None, :]
    valid = present & (pair < rotary_dim // 2)
    cos = tl.load(cos_row + pair * cos_stride, mask=valid & placed, other=1.0)
    sin = tl.load(sin_row + pair * sin_stride, mask=valid & placed, other=0.0)
    dtype = target.dtype.element_ty
    if INTERLEAVED:
        # Read and written whole, since every other element alone would take an access each.
        dim = tl.arange(0, 2 * BLOCK_PAIRS).to(tl.int64)[None, :]
        dim_valid = present & (dim < rotary_dim)
        x = tl.load(source + dim * source_stride, mask=dim_valid, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (x.shape[0], BLOCK_PAIRS, 2)))
        rotated = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), x.shape)
        tl.store(target + dim * target_stride, round_to(rotated, dtype), mask=dim_valid)
    else:
        b_at = pair + rotary_dim // 2
        a = tl.load(source + pair * source_stride, mask=valid, other=0.0).to(tl.float32)
        b = tl.load(source + b_at * source_stride, mask=valid, other=0.0).to(tl.float32)
        tl.store(target + pair * target_stride, round_to(a * cos - b * sin, dtype), mask=valid)
        tl.store(target + b_at * target_stride, round_to(b * cos + a * sin, dtype), mask=valid)


@triton.jit
def _append_kernel(
    key_pointer,
    value_pointer,
    query_pointer,
    k_cache_pointer,
    v_cache_pointer,
    rotated_pointer,
    lengths_pointer,
    new_lengths_pointer,
    table_pointer,
    cos_pointer,
    sin_pointer,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    key_stride_d,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    value_stride_d,
    query_stride_b,
    query_stride_h,
    query_stride_n,
    query_stride_d,
    k_cache_stride_page,
    k_cache_stride_h,
    k_cache_stride_n,
    k_cache_stride_d,
    v_cache_stride_page,
    v_cache_stride_h,
    v_cache_stride_n,
    v_cache_stride_d,
    rotated_stride_b,
    rotated_stride_h,
    rotated_stride_n,
    rotated_stride_d,
    table_stride_b,
    table_stride_page,
    cos_stride_position,
    cos_stride_pair,
    sin_stride_position,
    sin_stride_pair,
    token_tiles,
    slots,
    tokens,
    kv_heads,
    capacity,
    pages,
    positions,
    PAGE_SIZE: tl.constexpr,
    head_dim: tl.constexpr,
    value_dim: tl.constexpr,
    rotary_dim: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """A program has some tokens of one slot: the first kv_heads slots are key/value heads, the others query heads."""
    program = tl.program_id(0)
    token = (program % token_tiles * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS))[:, None]
    slot = (program // token_tiles % slots).to(tl.int64)
    batch = (program // token_tiles // slots).to(tl.int64)
    length = tl.load(lengths_pointer + batch)
    new_tokens = tokens
    if new_lengths_pointer is not None:
        new_tokens = tl.minimum(tl.load(new_lengths_pointer + batch), tokens)
    position = (length + token).to(tl.int64)
    new = token < new_tokens
    # One assertion: each is a call of its own in the compiled kernel.
    placed = (length >= 0) & (length + new_tokens <= capacity)
    tl.device_assert(placed, "lengths and the new tokens must lie within the cache's capacity")
    cos_row = cos_pointer
    sin_row = sin_pointer
    if rotary_dim:
        tl.device_assert(length + new_tokens <= positions, "a position is beyond the rotary table")
        cos_row = cos_pointer + position * cos_stride_position
        sin_row = sin_pointer + position * sin_stride_position
    if slot < kv_heads:
        key = key_pointer + batch * key_stride_b + slot * key_stride_h + token.to(tl.int64) * key_stride_n
        value = value_pointer + batch * value_stride_b + slot * value_stride_h + token.to(tl.int64) * value_stride_n
        page = batch
        if table_pointer is not None:
            entry = table_pointer + batch * table_stride_b + position // PAGE_SIZE * table_stride_page
            page = tl.load(entry, mask=new, other=0)
            # Negative ones are beyond all others.
            new = new & (page.to(tl.uint32) < pages)
            page = page.to(tl.int64)
            position = position % PAGE_SIZE
        k_row = k_cache_pointer + page * k_cache_stride_page + slot * k_cache_stride_h + position * k_cache_stride_n
        v_row = v_cache_pointer + page * v_cache_stride_page + slot * v_cache_stride_h + position * v_cache_stride_n
        if rotary_dim:
            _rotate(
                key,
                key_stride_d,
                k_row,
                k_cache_stride_d,
                new,
                new,
                cos_row,
                cos_stride_pair,
                sin_row,
                sin_stride_pair,
                rotary_dim,
                INTERLEAVED,
                BLOCK_PAIRS,
            )
        if rotary_dim != head_dim:
            _copy(key, key_stride_d, k_row, k_cache_stride_d, new, rotary_dim, head_dim, BLOCK_D)
        _copy(value, value_stride_d, v_row, v_cache_stride_d, new, 0, value_dim, BLOCK_V)
    elif query_pointer is not None:
        head = slot - kv_heads
        stored = token < tokens
        query = query_pointer + batch * query_stride_b + head * query_stride_h + token.to(tl.int64) * query_stride_n
        rotated = rotated_pointer + batch * rotated_stride_b + head * rotated_stride_h
        rotated += token.to(tl.int64) * rotated_stride_n
        _rotate(
            query,
            query_stride_d,
            rotated,
            rotated_stride_d,
            stored,
            new,
            cos_row,
            cos_stride_pair,
            sin_row,
            sin_stride_pair,
            rotary_dim,
            INTERLEAVED,
            BLOCK_PAIRS,
        )
        if rotary_dim != head_dim:
            _copy(query, query_stride_d, rotated, rotated_stride_d, stored, rotary_dim, head_dim, BLOCK_D)


@kept_launch
def append(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    query: torch.Tensor | None,
    rotated: tuple[torch.Tensor, ...],
    lengths: torch.Tensor,
    new_lengths: torch.Tensor | None,
    block_table: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    interleaved: bool,
) -> Launch | None:
    """Write `key` and `value` into the caches and the rotated `query`; checked arguments.

    Args:
        key, value: (batch, kv_heads, tokens, head_dim), any strides.
        key_cache, value_cache: (batch, kv_heads, capacity, head_dim) or, with a block table, (pages, page_size,
            kv_heads, head_dim), any strides.
        query: (batch, heads, tokens, head_dim), any strides; None for no query.
        rotated: for a query, a contiguous tensor like it to write to.
        lengths: (batch,) int32, contiguous, the tokens already in the cache.
        new_lengths: (batch,) int32, contiguous, how many of the tokens each sequence has; None for all.
        block_table: (batch, max_pages) int32.
        cos, sin: (positions, rotary_dim // 2) float32; None for no rotation.
    """
    batch, kv_heads, tokens, head_dim = key.shape
    value_dim = value.shape[-1]
    slots = kv_heads + (0 if query is None else query.shape[1])
    if batch * slots * tokens == 0:
        return None
    cache = cache_shape(key_cache, block_table)
    block_d, block_v = triton.next_power_of_2(head_dim), triton.next_power_of_2(value_dim)
    block_tokens = max(1, min(TILE_ELEMENTS // max(block_d, block_v), triton.next_power_of_2(tokens)))
    token_tiles = triton.cdiv(tokens, block_tokens)
    pairs = 0 if cos is None else cos.shape[1]
    rotated_query = rotated[0] if rotated else None
    return Launch(
        _append_kernel,
        (batch * slots * token_tiles,),
        (
            key,
            value,
            query,
            key_cache,
            value_cache,
            rotated_query,
            lengths,
            new_lengths,
            block_table,
            cos,
            sin,
            *key.stride(),
            *value.stride(),
            *((0,) * 4 if query is None else query.stride()),
            *cache_strides(key_cache, block_table),
            *cache_strides(value_cache, block_table),
            *((0,) * 4 if rotated_query is None else rotated_query.stride()),
            *((0, 0) if block_table is None else block_table.stride()),
            *((0, 0) if cos is None else cos.stride()),
            *((0, 0) if sin is None else sin.stride()),
            token_tiles,
            slots,
            tokens,
            kv_heads,
            cache.capacity,
            key_cache.shape[0],
            0 if cos is None else cos.shape[0],
        ),
        {
            "PAGE_SIZE": cache.page_size if block_table is not None else 1,
            "head_dim": head_dim,
            "value_dim": value_dim,
            "rotary_dim": 2 * pairs,
            "INTERLEAVED": interleaved,
            "BLOCK_TOKENS": block_tokens,
            "BLOCK_D": block_d,
            "BLOCK_V": block_v,
            "BLOCK_PAIRS": triton.next_power_of_2(max(1, pairs)),
            "num_warps": max(1, block_tokens * block_d // ELEMENTS_PER_WARP),
            # Keeps device_assert: a token without a place must fail, not overwrite another sequence's.
            "debug": True,
            "sanitize_overflow": False,
            **COMPILER_OPTIONS,
        },
    )
