"""Append new keys and values to a cache, and rotate keys and queries: one launch, one pass over the memory.

Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) at position p turns each pair (a, b) of the
first rotary_dim elements into (a cos_p - b sin_p, b cos_p + a sin_p); the elements of a pair are either rotary_dim / 2
apart ("half", GPT-NeoX and Llama) or neighbours ("interleaved", GPT-J). The new token i of a sequence has position
length + i, which is also its place in the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastformer_kernels.attention.decode_arguments import cache_shape
from fastformer_kernels.attention.kernel_arguments import cache_operand, operand, page_table
from fastformer_kernels.attention.tiles import at_head
from fastformer_kernels.constants import constants
from fastformer_kernels.kept_launches import Launch, kept_launch
from fastformer_kernels.launch import COMPILER_OPTIONS
from fastformer_kernels.precision import round_to
from fastformer_kernels.rows import Matrix

TILE_ELEMENTS = 2048
ELEMENTS_PER_WARP = 512


class AppendConstants(NamedTuple):
    """The compile-time constants of the kernel.

    Attributes:
        PAGE_SIZE: tokens of a page; 1 without pages.
        head_dim, value_dim, rotary_dim: elements of a key, of a value, and of a key's rotated part.
        INTERLEAVED: whether a pair's elements are neighbours.
        BLOCK_TOKENS: tokens of a program.
        BLOCK_D, BLOCK_V, BLOCK_PAIRS: powers of two, at least head_dim, value_dim and the number of pairs.
    """

    PAGE_SIZE: int
    head_dim: int
    value_dim: int
    rotary_dim: int
    INTERLEAVED: bool
    BLOCK_TOKENS: int
    BLOCK_D: int
    BLOCK_V: int
    BLOCK_PAIRS: int


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
    sin_row,
    cos,
    sin,
    rotary_dim: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """Rotate the first rotary_dim elements of each row. A row with `placed` false has no angle and is copied."""
    pair = tl.arange(0, BLOCK_PAIRS).to(tl.int64)[None, :]
    valid = present & (pair < rotary_dim // 2)
    cosine = tl.load(cos_row + pair * cos.stride_column, mask=valid & placed, other=1.0)
    sine = tl.load(sin_row + pair * sin.stride_column, mask=valid & placed, other=0.0)
    dtype = target.dtype.element_ty
    if INTERLEAVED:
        # Read and write whole rows: every second element alone would need one access each.
        dim = tl.arange(0, 2 * BLOCK_PAIRS).to(tl.int64)[None, :]
        dim_valid = present & (dim < rotary_dim)
        x = tl.load(source + dim * source_stride, mask=dim_valid, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (x.shape[0], BLOCK_PAIRS, 2)))
        rotated = tl.reshape(tl.join(a * cosine - b * sine, b * cosine + a * sine), x.shape)
        tl.store(target + dim * target_stride, round_to(rotated, dtype), mask=dim_valid)
    else:
        b_at = pair + rotary_dim // 2
        a = tl.load(source + pair * source_stride, mask=valid, other=0.0).to(tl.float32)
        b = tl.load(source + b_at * source_stride, mask=valid, other=0.0).to(tl.float32)
        tl.store(target + pair * target_stride, round_to(a * cosine - b * sine, dtype), mask=valid)
        tl.store(target + b_at * target_stride, round_to(b * cosine + a * sine, dtype), mask=valid)


@triton.jit
def _append_kernel(
    key,
    value,
    query,
    key_cache,
    value_cache,
    rotated,
    lengths_pointer,
    new_lengths_pointer,
    table,
    cos,
    sin,
    token_tiles,
    slots,
    tokens,
    kv_heads,
    capacity,
    pages,
    positions,
    constants,
):
    """Rotate new keys and put them and new values into the caches, and rotate the queries.

    A program handles some tokens of one slot. The first kv_heads slots are key/value heads, the others query heads.

    Args:
        key, value, query: an `Operand` each; without queries the pointer is None.
        key_cache, value_cache: an `Operand` each, whose first dimension is pages; written.
        rotated: an `Operand` like `query`, written.
        lengths_pointer, new_lengths_pointer: (batch,) int32, number of tokens in the cache and of new ones;
            new_lengths_pointer may be None.
        table: a `PageTable`.
        cos, sin: the rotary tables, (positions, pairs) float32, a `Matrix` each; without rotation their pointers are
            None.
        token_tiles, slots: number of tiles of a slot's tokens, and of slots of a sequence.
        tokens, kv_heads, capacity, pages, positions: sizes of the new keys, the caches and the rotary tables.
        constants: an `AppendConstants`.
    """
    rotary_dim: tl.constexpr = constants.rotary_dim
    head_dim: tl.constexpr = constants.head_dim
    INTERLEAVED: tl.constexpr = constants.INTERLEAVED
    BLOCK_D: tl.constexpr = constants.BLOCK_D
    BLOCK_PAIRS: tl.constexpr = constants.BLOCK_PAIRS
    program = tl.program_id(0)
    token = (program % token_tiles * constants.BLOCK_TOKENS + tl.arange(0, constants.BLOCK_TOKENS))[:, None]
    slot = (program // token_tiles % slots).to(tl.int64)
    batch = (program // token_tiles // slots).to(tl.int64)
    length = tl.load(lengths_pointer + batch)
    new_tokens = tokens
    if new_lengths_pointer is not None:
        new_tokens = tl.minimum(tl.load(new_lengths_pointer + batch), tokens)
    position = (length + token).to(tl.int64)
    new = token < new_tokens
    # One assertion for both conditions: each is a separate call in the compiled kernel.
    placed = (length >= 0) & (length + new_tokens <= capacity)
    tl.device_assert(placed, "lengths and the new tokens must lie within the cache's capacity")
    cos_row = cos.pointer
    sin_row = sin.pointer
    if rotary_dim:
        tl.device_assert(length + new_tokens <= positions, "a position is beyond the rotary table")
        cos_row = cos.pointer + position * cos.stride_row
        sin_row = sin.pointer + position * sin.stride_row
    if slot < kv_heads:
        key_row = at_head(key, batch, slot, token.to(tl.int64))
        value_row = at_head(value, batch, slot, token.to(tl.int64))
        page = batch
        if table.pointer is not None:
            entry = table.pointer + batch * table.stride_b + position // constants.PAGE_SIZE * table.stride_page
            page = tl.load(entry, mask=new, other=0)
            # As an unsigned number, a negative page is beyond all pages.
            new = new & (page.to(tl.uint32) < pages)
            page = page.to(tl.int64)
            position = position % constants.PAGE_SIZE
        k_row = at_head(key_cache, page, slot, position)
        v_row = at_head(value_cache, page, slot, position)
        if rotary_dim:
            _rotate(
                key_row, key.stride_dim, k_row, key_cache.stride_dim, new, new, cos_row, sin_row, cos, sin,
                rotary_dim, INTERLEAVED, BLOCK_PAIRS,
            )  # fmt: skip
        if rotary_dim != head_dim:
            _copy(key_row, key.stride_dim, k_row, key_cache.stride_dim, new, rotary_dim, head_dim, BLOCK_D)
        _copy(
            value_row, value.stride_dim, v_row, value_cache.stride_dim, new, 0, constants.value_dim, constants.BLOCK_V
        )
    elif query.pointer is not None:
        head = slot - kv_heads
        stored = token < tokens
        query_row = at_head(query, batch, head, token.to(tl.int64))
        rotated_row = at_head(rotated, batch, head, token.to(tl.int64))
        _rotate(
            query_row, query.stride_dim, rotated_row, rotated.stride_dim, stored, new, cos_row, sin_row, cos, sin,
            rotary_dim, INTERLEAVED, BLOCK_PAIRS,
        )  # fmt: skip
        if rotary_dim != head_dim:
            _copy(query_row, query.stride_dim, rotated_row, rotated.stride_dim, stored, rotary_dim, head_dim, BLOCK_D)


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
    """Write `key`, rotated, and `value` into the caches, and `query`, rotated, into `rotated`. Arguments are checked.

    Args:
        key, value: (batch, kv_heads, tokens, head_dim), any strides.
        key_cache, value_cache: (batch, kv_heads, capacity, head_dim) or, with a block table, (pages, page_size,
            kv_heads, head_dim), any strides.
        query: (batch, heads, tokens, head_dim), any strides; None for no query.
        rotated: with a query, one contiguous tensor of its shape, which is written; else empty.
        lengths: (batch,) int32, contiguous, the number of tokens already in the cache.
        new_lengths: (batch,) int32, contiguous, the number of new tokens of each sequence; None if each has all.
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
    return Launch(
        _append_kernel,
        (batch * slots * token_tiles,),
        {
            "key": operand(key),
            "value": operand(value),
            "query": operand(query),
            "key_cache": cache_operand(key_cache, block_table),
            "value_cache": cache_operand(value_cache, block_table),
            "rotated": operand(rotated[0] if rotated else None),
            "lengths_pointer": lengths,
            "new_lengths_pointer": new_lengths,
            "table": page_table(block_table),
            "cos": Matrix(cos, *((0, 0) if cos is None else cos.stride())),
            "sin": Matrix(sin, *((0, 0) if sin is None else sin.stride())),
            "token_tiles": token_tiles,
            "slots": slots,
            "tokens": tokens,
            "kv_heads": kv_heads,
            "capacity": cache.capacity,
            "pages": key_cache.shape[0],
            "positions": 0 if cos is None else cos.shape[0],
            "constants": constants(
                AppendConstants(
                    PAGE_SIZE=cache.page_size if block_table is not None else 1,
                    head_dim=head_dim,
                    value_dim=value_dim,
                    rotary_dim=2 * pairs,
                    INTERLEAVED=interleaved,
                    BLOCK_TOKENS=block_tokens,
                    BLOCK_D=block_d,
                    BLOCK_V=block_v,
                    BLOCK_PAIRS=triton.next_power_of_2(max(1, pairs)),
                )
            ),
            "num_warps": max(1, block_tokens * block_d // ELEMENTS_PER_WARP),
            # This keeps device_assert: a token without a place must fail, not overwrite a token of another sequence.
            "debug": True,
            "sanitize_overflow": False,
            **COMPILER_OPTIONS,
        },
    )
