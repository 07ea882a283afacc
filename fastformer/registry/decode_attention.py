"""Attention of new tokens to a cache, which is contiguous or in pages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from fastformer.ops.attention.block_mask import BlockMask
from fastformer.registry.attention import fused_attention, plain_attention
from fastformer.registry.make import Make
from fastformer.registry.operator import Call, Operator


def caches(
    make: Make, batch: int, kv_heads: int, capacity: int, head_dim: int, page_size: int | None, value_scale: float = 1.0
) -> dict[str, Tensor]:
    """Key and value caches for `capacity` tokens of each sequence.

    With `page_size`, they consist of pages in random order, and there is a block table.
    """
    shape = (batch, kv_heads, capacity, head_dim)
    if page_size is not None:
        pages = batch * -(-capacity // page_size)
        shape = (pages, page_size, kv_heads, head_dim)
    found = {"key_cache": make.normal(*shape), "value_cache": make.normal(*shape, scale=value_scale)}
    if page_size is not None:
        order = torch.randperm(pages, dtype=torch.int32, generator=torch.Generator().manual_seed(0), device="cpu")
        found["block_table"] = make.constant(order.view(batch, -1))
    return found


def _inputs(
    make: Make,
    lengths: Sequence[int] = (70, 33),
    heads: int = 4,
    kv_heads: int = 1,
    queries: int = 2,
    head_dim: int = 32,
    *,
    latent_dim: int | None = None,
    page_size: int | None = None,
    block_mask: bool = False,
    scale: float = 1.0,
    value_scale: float = 1.0,
) -> Call:
    """Queries of the last `queries` tokens of sequences of these lengths, and caches as long as the longest one.

    With `latent_dim`, the values are the first `latent_dim` elements of the keys (multi-head latent attention).
    """
    places = max(lengths) if page_size is None else -(-max(lengths) // page_size) * page_size
    options = {"mask": make.block_mask(places, places)} if block_mask else {}
    query = make.normal(len(lengths), heads, queries, head_dim, scale=scale)
    cached = caches(make, len(lengths), kv_heads, places, head_dim, page_size, value_scale)
    if latent_dim is not None:
        cached["value_cache"] = cached["key_cache"][..., :latent_dim]
    ends = make.constant(torch.tensor(lengths, dtype=torch.int32, device="cpu"))
    return Call({"query": query, **cached, "lengths": ends}, options)


def contiguous_cache(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """The cache as one tensor (batch, kv_heads, capacity, head_dim)."""
    if block_table is None:
        return cache
    return rearrange(cache[block_table], "batch pages slots heads dim -> batch heads (pages slots) dim")


def _seen(query: Tensor, key: Tensor, lengths: Tensor, mask: BlockMask | None) -> Tensor:
    """A mask (batch, 1, queries, keys): each query sees the keys up to its own position that `mask` shows it."""
    position = lengths[:, None] + torch.arange(query.shape[2], device=query.device) - query.shape[2]
    earlier = (torch.arange(key.shape[2], device=query.device) <= position[..., None])[:, None]
    return earlier if mask is None else earlier & mask.to_dense()[0, 0, position][:, None]


def _plain(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None = None,
    *,
    mask: BlockMask | None = None,
    splits: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute the attention by the formula. It ignores `splits`, which does not change the result."""
    key, value = contiguous_cache(key_cache, block_table), contiguous_cache(value_cache, block_table)
    return plain_attention(query, key, value, _seen(query, key, lengths, mask), softcap=softcap)


def _fused(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None = None,
    *,
    mask: BlockMask | None = None,
) -> Tensor:
    key, value = contiguous_cache(key_cache, block_table), contiguous_cache(value_cache, block_table)
    return fused_attention(query, key, value, _seen(query, key, lengths, mask))


DECODE_ATTENTION = Operator(
    "decode_attention", _inputs, _plain, _fused, constants=frozenset({"query", "key_cache", "value_cache"})
)
