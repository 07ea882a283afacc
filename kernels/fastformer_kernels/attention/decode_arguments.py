"""The arguments of a decode call besides query and caches. Every backend shares them: no triton is needed."""

from __future__ import annotations

from typing import NamedTuple

import torch


class DecodeArguments(NamedTuple):
    """The arguments of one decode call, checked and in canonical form.

    Attributes:
        lengths: (batch,) int32, contiguous; the number of keys in the cache for each sequence.
        query_lengths: (batch,) int32, contiguous; the number of queries of each sequence; None if each has all.
        block_table: (batch, max_pages) int32, the pages of each sequence in order; None for a contiguous cache.
        alibi_slopes: (1 or batch, heads) float32, contiguous; adds -slope * |query position - key position|.
        sinks: (heads,) float32, contiguous; one more logit per head that takes part in the normalisation only.
        lists, bits: the `TileLists` by query of a block mask, whose rows and columns are positions; or None.
        scale: multiplies the scores.
        left, right: how far before and after its own position a query may attend; UNBOUNDED for no limit.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
    """

    lengths: torch.Tensor
    query_lengths: torch.Tensor | None
    block_table: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    lists: torch.Tensor | None
    bits: torch.Tensor | None
    scale: float
    left: int
    right: int
    softcap: float


class CacheShape(NamedTuple):
    """The layout of a cache.

    Attributes:
        page_size: keys in a page. A contiguous cache is one page per sequence, so this is its capacity.
        capacity: the largest number of keys that a sequence can have.
    """

    page_size: int
    capacity: int
    kv_heads: int


def cache_shape(cache: torch.Tensor, block_table: torch.Tensor | None) -> CacheShape:
    """The layout of a cache: contiguous (batch, kv_heads, capacity, head_dim), or with a block table (pages, page_size,
    kv_heads, head_dim)."""
    _, first, second, _ = cache.shape
    if block_table is None:
        return CacheShape(second, second, first)
    return CacheShape(first, first * block_table.shape[1], second)


def cache_strides(cache: torch.Tensor, block_table: torch.Tensor | None) -> tuple[int, int, int, int]:
    """Strides over (page, head, key, head_dim); a contiguous cache has one page per sequence."""
    page, first, second, dim = cache.stride()
    return (page, first, second, dim) if block_table is None else (page, second, first, dim)


def empty_decode_results(query: torch.Tensor, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (batch, heads, queries, value_dim) and float32 log-sum-exp (batch, heads, queries) of a decode.

    Both lie in memory as (batch, queries, heads): merging the heads afterwards needs no copy.
    """
    batch, heads, queries, _ = query.shape
    rows = queries * heads
    output = query.new_empty_strided(
        (batch, heads, queries, value_dim), (rows * value_dim, value_dim, heads * value_dim, 1)
    )
    return output, query.new_empty_strided((batch, heads, queries), (rows, 1, heads), dtype=torch.float32)
